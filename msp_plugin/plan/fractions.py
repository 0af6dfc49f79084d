"""Exact numbers of recipes and command lines."""

from __future__ import annotations

from fractions import Fraction
from numbers import Number

from msp_plugin.errors import RecipeError, shown


def parse_fraction(value: object) -> Fraction:
    """Return the exact value of a number or of its text; a float counts as its shortest decimal form.

    Raises:
        ValueError: the value is not a finite number.
    """
    if isinstance(value, bool) or not isinstance(value, str | Number):
        raise ValueError("not a number")
    try:
        return Fraction(str(value))
    except ZeroDivisionError as error:
        raise ValueError(str(error)) from None


def parse_sparsity(value: object) -> Fraction:
    """Return the exact share of zeros that a number or text such as ``0.75`` or ``"5/8"`` asks for.

    Raises:
        RecipeError: the value is not a number in [0, 1). The hint rewrites a percentage.
    """
    try:
        exact = parse_fraction(value)
    except ValueError:
        raise RecipeError(
            f"sparsity {shown(value)} is not a number", hint="give the share of zeros in [0, 1), e.g. 0.75"
        ) from None
    if not 0 <= exact < 1:
        percent = f"; for {value} % write {float(exact) / 100:g}" if 1 < exact <= 100 else ""
        raise RecipeError(
            f"sparsity {shown(value)} is outside [0, 1)",
            hint=f"give the share of zeros among the prunable weights{percent}",
        )
    return exact
