"""The callbacks by which long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

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
