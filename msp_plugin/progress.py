"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

#: Called with (done, total) as long work goes on.
Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Report nothing."""
