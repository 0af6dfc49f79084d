"""The callbacks by which long work reports its progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

#: Seconds between two lines about one step.
_EVERY = 30.0

#: Called with (done, total) while work goes on.
Progress = Callable[[int, int], None]


class NotedProgress(Protocol):
    """Called with (done, total) while work goes on, and sometimes with a note on the result so far."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None: ...


class StepProgress(Protocol):
    """Called with (step, done, total, note) while the steps of a run go on.

    ``step`` is a few words such as "search"; ``note`` tells the result so far, e.g. "round 3, loss 0.2163,
    -0.0041".
    """

    def __call__(self, step: str, done: int, total: int, note: str = "", /) -> None: ...


class Repeated:
    """A NotedProgress whose last report can be given again, so that a long part of a step is not silent."""

    def __init__(self, report: NotedProgress):
        self._report = report
        self._last: tuple[int, int, *tuple[str, ...]] = (0, 0)

    def __call__(self, done: int, total: int, /, *note: str) -> None:
        self._last = (done, total, *note)
        self._report(done, total, *note)

    def again(self) -> None:
        """Repeat the last report of an unfinished step, if there is one."""
        if self._last[0] < self._last[1]:
            self._report(*self._last)


def silent(done: int, total: int, note: str = "") -> None:
    """Report nothing."""


def no_progress(step: str, done: int, total: int, note: str = "") -> None:
    """Report nothing."""


def prefixed(prefix: str, progress: StepProgress) -> StepProgress:
    """Return a StepProgress that puts ``prefix`` before the name of each step."""
    return lambda step, *at: progress(prefix + step, *at)


@dataclass
class _Running:
    """An unfinished step: the times of its start and last printed line, its first count, and that count's time."""

    began: float
    printed: float
    first: int
    reported: float


class ProgressLines:
    """A StepProgress that prints a line every half minute of a step, and one at its end.

    A step counts from the last report of the step before it.
    """

    def __init__(self, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic):
        self._write, self._clock = write, clock
        self._steps: dict[str, _Running] = {}
        self._last = clock()

    def __call__(self, step: str, done: int, total: int, note: str = "") -> None:
        now = self._clock()
        running = self._steps.setdefault(step, _Running(self._last, self._last, done, now))
        self._last = now
        suffix = f"; {note}" if note else ""
        if done >= total:
            del self._steps[step]
            self._write(f"{step}: {done} of {total} done in {_minutes(now - running.began)}{suffix}")
        elif now - running.printed >= _EVERY:
            running.printed = now
            left = ""
            if done > running.first:  # results from the cache took no time and must not speed up the estimate
                seconds = (now - running.reported) * (total - done) / (done - running.first)
                left = f", about {_minutes(seconds)} left"
            self._write(f"{step}: {done} of {total}, {100 * done // total} %{left}{suffix}")


def _minutes(seconds: float) -> str:
    """Return a duration as text: 0:07, 12:30, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
