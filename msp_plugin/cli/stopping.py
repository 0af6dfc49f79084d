"""End a command after Ctrl-C or SIGTERM with exit code 130 or 143, and leave nothing half-written."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

#: Seconds after which Stopped is raised again if something caught it: some packages import others in a bare
#: ``except:``, and Python only prints an exception that leaves a destructor.
_AGAIN = 0.5


class Stopped(SystemExit):
    """A signal asked to end the command; ``code`` is the conventional exit code."""


@contextmanager
def stopping() -> Iterator[Callable[[], int]]:
    """Let SIGINT and SIGTERM raise Stopped in the block; ignored signals stay ignored.

    If something catches a Stopped, it is raised again until it leaves the block. One that leaves a destructor prints no
    traceback.

    Yields a function that returns the exit code once a signal has come, and 0 before. With it the caller recognises a
    Stopped that compiled code has turned into an error of its own.
    """
    code = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal code
        if number != signal.SIGALRM:
            code = 128 + number
            signal.setitimer(signal.ITIMER_REAL, _AGAIN, _AGAIN)
        if not _unwinds():  # a second Ctrl-C does not interrupt the clean-up
            raise Stopped(code)

    report = sys.unraisablehook

    def report_others(lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, Stopped):
            report(lost)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in (*numbers, signal.SIGALRM)}
    sys.unraisablehook = report_others
    try:
        yield lambda: code
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = report


def _unwinds() -> bool:
    """Return True if a Stopped is being handled, by a ``finally`` or an ``except``."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None
