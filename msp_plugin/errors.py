"""Errors that the caller can cause. Each says what was found, what was expected and what to do."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class MSPError(Exception):
    """Base of every error that msp_plugin raises on purpose.

    Args:
        message: what was found, and what was expected.
        hint: what to do about it; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(message if hint is None else f"{message}\n  -> {hint}")
        self.message = message
        self.hint = hint


class RecipeError(MSPError):
    """The recipe or the options are wrong; nothing was loaded yet."""

    exit_code = 2


class PluginError(MSPError):
    """A plugin is missing, broken or in conflict with another one."""

    exit_code = 2


class DataError(MSPError):
    """The calibration or evaluation text cannot be used."""

    exit_code = 2


class ModelError(MSPError):
    """The model cannot be pruned as asked."""

    exit_code = 2


class BudgetError(MSPError):
    """The levels cannot express the asked sparsity."""

    exit_code = 2


class OutputError(MSPError):
    """The output directory cannot be used."""

    exit_code = 2


class HostError(MSPError):
    """A host framework is missing, or did something other than what was asked of it."""


class NumericsError(MSPError):
    """Weights, activations or statistics are not finite, or a Hessian is singular."""


class FormatError(MSPError):
    """A checkpoint or a tensor is not in the format that it claims, or cannot be brought into it."""


class ServingError(MSPError):
    """A server did not start, died or answered something else than was asked."""


class VerificationError(MSPError):
    """What was written is not what was planned."""


class _Short(reprlib.Repr):
    """A repr of bounded length and depth, whatever a file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong, self.maxother = 3, _WIDEST, _WIDEST, _WIDEST

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() > 4 * _WIDEST:  # Python refuses to write out more than 4,300 digits
            return f"an integer of {value.bit_length():,} bits"
        return super().repr_int(value, level)


#: Characters of one value in a message.
_WIDEST = 100


def shown(value: object) -> str:
    """Return a value that was found as an error quotes it: its repr, shortened where it is long or deep."""
    return _Short().repr(value)


def plain(name: object) -> str:
    """Return a name or path on one line: what cannot be printed, or is no character, is written as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(name))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that names the known word nearest to ``name``, or all known words."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name)[:_WIDEST], known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}? Known: {', '.join(known)}"
    return f"known: {', '.join(known) or '(none)'}"
