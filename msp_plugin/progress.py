"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

#: Called with (done, total) as long work goes on.
Progress = Callable[[int, int], None]


class NotedProgress(Protocol):
    """Called with (done, total) as long work goes on, and where it helps with a note on how well."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None: ...


class StepProgress(Protocol):
    """Called with (step, done, total, note) as the steps of a run go on.

    ``step`` is a few words such as "search"; ``note`` says how well it goes, e.g. "round 3, loss 0.2163, -0.0041".
    """

    def __call__(self, step: str, done: int, total: int, note: str = "", /) -> None: ...


def silent(done: int, total: int, note: str = "") -> None:
    """Report nothing."""


def no_progress(step: str, done: int, total: int, note: str = "") -> None:
    """Report nothing."""


def prefixed(prefix: str, progress: StepProgress) -> StepProgress:
    """Return a StepProgress whose steps have ``prefix`` before their names."""
    return lambda step, *at: progress(prefix + step, *at)
