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
    """The levels cannot reach the requested sparsity."""

    exit_code = 2


class OutputError(MSPError):
    """The output directory cannot be used."""

    exit_code = 2


class HostError(MSPError):
    """A host framework is missing, or did something else than it was told to."""


class NumericsError(MSPError):
    """Weights, activations or statistics are not finite, or a Hessian is singular."""


class FormatError(MSPError):
    """A checkpoint or a tensor is not in the format that it names, or cannot be stored in it."""


class ServingError(MSPError):
    """A server did not start, stopped, or answered in an unexpected form."""


class VerificationError(MSPError):
    """A written checkpoint differs from its plan."""


#: A value in a message is cut to this many characters.
_WIDEST = 100
_QUOTED = reprlib.Repr()
_QUOTED.maxlevel, _QUOTED.maxstring, _QUOTED.maxlong, _QUOTED.maxother = 3, _WIDEST, _WIDEST, _WIDEST


def shown(value: object) -> str:
    """Return the repr of a value for a message, shortened where it is long or deep."""
    return _QUOTED.repr(value)


def plain(name: object) -> str:
    """Return a name or path on one line, with an escape for each character that cannot be printed."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(name))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that lists the known names, after "did you mean" and the closest one if any is close."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name)[:_WIDEST], known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}? Known: {', '.join(known)}"
    return f"known: {', '.join(known) or '(none)'}"
