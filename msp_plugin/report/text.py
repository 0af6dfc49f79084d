"""Format numbers for a report."""

from __future__ import annotations

import math
from fractions import Fraction

NOTHING = "–"


def number(value: float | None, digits: int = 3) -> str:
    """Return a perplexity, a loss or a divergence with ``digits`` decimals; none from 10,000 on."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:,.{digits}f}" if abs(value) < 10_000 else f"{value:,.0f}"
    return text.replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """Return a change with its sign."""
    text = number(value, digits)
    return f"+{text}" if value is not None and value > 0 else text


def short(value: float | None) -> str:
    """Return a number of any size in up to four significant digits."""
    if value is None or not math.isfinite(value):
        return number(value)
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.4g}".replace("-", "−")
    return scientific(value)


def scientific(value: float | None) -> str:
    """Return a number of any size in two significant digits and its power of ten."""
    if value is None or not math.isfinite(value):
        return number(value)
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def count(value: int | float | None) -> str:
    """Return a count with commas between its thousands."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{round(value):,}"


def percent(value: float | Fraction | None, digits: int = 2) -> str:
    """Return a share in percent."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{100 * float(value):.{digits}f} %".replace("-", "−")


def rounded_percent(value: float | Fraction) -> str:
    """Return a share in percent without trailing zeros: ``75 %``, ``62.5 %``."""
    return f"{100 * float(value):.4g} %"


def seconds(value: float | None) -> str:
    """Return a duration."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def mebibytes(value: int) -> str:
    """Return bytes in GiB, MiB, KiB or B."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:,.2f} {unit}"
    return f"{value} B"


def thousands(value: float, _: object = None) -> str:
    """Return a count for the axis of a chart: ``20k``, ``1.5M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
