"""Levels: what a unit may be, and the menus that an allocation chooses from.

``N:M`` keeps N of every M consecutive weights along in_features, as in the papers and NVIDIA's documentation.
(llm-compressor's ``mask_structure`` counts the pruned weights instead; hosts/llm_compressor/ converts.) ``N:M
in 2:4`` also keeps at most two of every aligned four, so that 2:4 kernels run it. A plain fraction is a share
of zeros, placed anywhere in each output row. ``dropped`` keeps nothing of an attention, an MLP or a block.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from numbers import Number

from msp_plugin.errors import RecipeError, shown
from msp_plugin.plan.units import Layer, Unit

_PATTERN = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*(?:(?:in|@)\s*(\d+)\s*:\s*(\d+)\s*)?", re.IGNORECASE)
_SHARE = re.compile(r"\s*(\d+\s*/\s*0*[1-9]\d*|\d*\.?\d+(e-?\d{1,2})?)\s*", re.IGNORECASE)
_FORMS = (
    'write "dense", "N:M" (N kept of M, e.g. "2:4"), "N:M in 2:4", a share of zeros, e.g. "0.7", or "dropped"'
)


class Level(ABC):
    """What a unit may be. Recipes and files hold its name, and ``parse`` gives the level of a name.

    Levels are values: equal levels have equal names. A layer stands for a unit that holds it alone.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name, from which ``parse`` gives this level."""

    @property
    @abstractmethod
    def sparsity(self) -> Fraction:
        """The nominal share of zeros."""

    @property
    @abstractmethod
    def servable(self) -> bool:
        """True if every weight at this level keeps at most two in each aligned group of four.

        Then 2:4 kernels can run it.
        """

    @abstractmethod
    def kept(self, unit: Unit | Layer) -> int:
        """Return the exact count of weights that a unit keeps.

        Raises:
            RecipeError: the level does not fit the unit.
        """

    @abstractmethod
    def misfit(self, unit: Unit | Layer) -> str | None:
        """Return why the level does not fit a unit, as what follows its name in a sentence; None if it fits."""

    @property
    def is_dense(self) -> bool:
        """True if nothing is pruned."""
        return not self.sparsity

    @staticmethod
    def parse(text: object) -> Level:
        """Return the level of a recipe's text: ``"dense"``, ``"N:M"``, ``"N:M in 2:4"``, a share of zeros, ``"dropped"``.

        Raises:
            RecipeError: the text is not a level. The message explains an unquoted ``2:4``, which YAML 1.1
                reads as the number 124.
        """
        if isinstance(text, Level):
            return text
        if isinstance(text, str) and text.strip().lower() == DROPPED.name:
            return DROPPED
        return _parse_pattern(text)

    def __str__(self) -> str:
        return self.name


class Kind(Enum):
    """How a level's kept weights may lie: a share of a row, N of each M, or that inside 2:4; freest first."""

    SHARE = 0
    NM = 1
    NM_IN_24 = 2


@dataclass(frozen=True)
class Pattern(Level):
    """A pattern of zeros: ``n`` kept of every ``m`` weights along in_features, the same in all layers of a unit.

    ``dense`` is 1:1. A share of zeros keeps n/m of each row, rounded down to whole weights. Make patterns with
    ``Level.parse``, which gives equal patterns equal fields.
    """

    n: int
    m: int
    kind: Kind = Kind.NM

    @property
    def name(self) -> str:
        """``"dense"``, ``"N:M"``, ``"N:M in 2:4"``, or the share of zeros as a fraction."""
        if self.is_dense:
            return "dense"
        if self.kind is Kind.SHARE:
            return str(self.sparsity)
        return f"{self.n}:{self.m}" + (" in 2:4" if self.kind is Kind.NM_IN_24 else "")

    @property
    def sparsity(self) -> Fraction:
        """The nominal share of zeros. A row whose length the share does not divide has slightly more."""
        return Fraction(self.m - self.n, self.m)

    @property
    def servable(self) -> bool:
        """True if every mask of this level keeps at most two in each aligned group of four.

        Then 2:4 kernels can run it. A group of four overlaps with at most two groups of M > 1, each of which
        keeps at most N. So N = 1 always fits, and N = 2 fits if no group of four crosses a border between
        groups of M.
        """
        if self.kind is not Kind.NM:
            return self.kind is Kind.NM_IN_24
        return (self.n == 1 and self.m > 1) or (self.n == 2 and self.m % 4 == 0)

    def group(self, in_features: int) -> tuple[int, int]:
        """Return (n, m): exactly n of every m consecutive weights of a row are kept; m divides in_features.

        Raises:
            RecipeError: the pattern does not fit the width.
        """
        if why := self._misfit(in_features):
            raise RecipeError(
                f"level {self.name} {why}",
                hint="use another level, or ignore the layer"
                if self.kind is Kind.SHARE
                else f"use an M that divides it, or ignore the layer (remainder {in_features % self.m})",
            )
        if self.kind is Kind.SHARE:
            return in_features * self.n // self.m, in_features
        return self.n, self.m

    def _misfit(self, in_features: int) -> str | None:
        if self.kind is Kind.SHARE:
            fits, why = in_features * self.n >= self.m, "keeps nothing of"
        else:
            fits, why = in_features % self.m == 0, "does not divide"
        return None if fits else f"{why} in_features = {in_features}"

    def misfit(self, unit: Unit | Layer) -> str | None:
        for layer in unit.layers:
            if why := self._misfit(layer.in_features):
                return f"{why} of {layer.name}"
        return None

    def kept(self, unit: Unit | Layer) -> int:
        kept = 0
        for layer in unit.layers:
            n, m = self.group(layer.in_features)
            kept += layer.weights // m * n
        return kept


@dataclass(frozen=True)
class Dropped(Level):
    """No weight of an attention, an MLP or a block is kept: it adds nothing but its biases to its input.

    The weights stay in the model, as zeros.
    """

    name = "dropped"
    sparsity = Fraction(1)
    servable = True

    def kept(self, unit: Unit | Layer) -> int:
        return 0

    def misfit(self, unit: Unit | Layer) -> str | None:
        return None


def _parse_pattern(text: object) -> Pattern:
    """Return the pattern of a text (see Level.parse)."""
    if isinstance(text, int) and not isinstance(text, bool) and text >= 60:
        n, m = divmod(text, 60)
        raise RecipeError(
            f"level {text} is a number; YAML 1.1 reads an unquoted {n}:{m} in base 60",
            hint=f'write it with quotes: "{n}:{m}"',
        )
    if isinstance(text, str) and text.strip().lower() == "dense":
        return DENSE
    if isinstance(text, str) and (match := _PATTERN.fullmatch(text)):
        return _groups(text, *(int(number) for number in match.groups() if number))
    if isinstance(text, str | int | float | Fraction) and _SHARE.fullmatch(str(text)):
        zeros = Fraction(str(text).replace(" ", ""))
        if zeros < 1:
            kept = 1 - zeros
            return Pattern(kept.numerator, kept.denominator, Kind.SHARE) if zeros else DENSE
    raise RecipeError(f"level {shown(text)} is not a level", hint=_FORMS)


def _groups(text: str, n: int, m: int, *inside: int) -> Pattern:
    """Return the level N:M, or N:M in 2:4; equal patterns give equal levels."""
    if not 1 <= n <= m:
        raise RecipeError(f"level {text!r} keeps {n} of {m}", hint="N:M needs 1 <= N <= M: N are kept of M")
    if not inside:
        return DENSE if n == m else Pattern(n, m)
    if inside != (2, 4) or m % 4 or 2 * n > m:
        raise RecipeError(
            f"level {text!r} is not a level",
            hint='"N:M in 2:4" needs an M that is a multiple of 4 and N <= M/2, e.g. "3:8 in 2:4"',
        )
    if 2 * n == m:
        return Pattern(2, 4)
    return Pattern(n, m) if n <= 2 else Pattern(n, m, Kind.NM_IN_24)


DENSE = Pattern(1, 1)
DROPPED = Dropped()

#: Eight steps of one eighth. With one M, the levels of every layer differ by multiples of one count of
#: weights, so that budgets are met exactly; 2:8 and 1:8 run on 2:4 kernels. The choice is ours: the paper's
#: levels are not published.
DEFAULT_LEVELS = ("dense", "7:8", "6:8", "5:8", "4:8", "3:8", "2:8", "1:8")

#: Menus that have a name. 2:4 kernels run every level of ``servable`` except dense.
MENUS = {
    "default": DEFAULT_LEVELS,
    "servable": ("dense", "2:4", "3:8 in 2:4", "2:8", "1:8", "1:16"),
}


def parse_menu(levels: Iterable[object]) -> tuple[Level, ...]:
    """Return the distinct levels of a menu, densest first; at equal sparsity the freer pattern first.

    Args:
        levels: levels, or names of MENUS, or one text of them with commas.

    Raises:
        RecipeError: the menu is empty, names a level twice, or holds a text that is not a level.
    """
    if isinstance(levels, str):
        levels = [part for part in levels.split(",") if part.strip()]
    menu, whole = [], []
    for text in levels:
        name = text.strip().lower() if isinstance(text, str) else None
        if name in MENUS:
            whole += [Level.parse(level) for level in MENUS[name]]
        else:
            menu.append(Level.parse(text))
    if not menu and not whole:
        raise RecipeError("the list of levels is empty", hint='give at least one, e.g. ["2:4"]')
    twice = sorted({level.name for level in menu if menu.count(level) > 1})
    if twice:
        raise RecipeError(f"levels named twice: {', '.join(twice)}", hint="name each level once")
    return tuple(sorted(dict.fromkeys([*menu, *whole]), key=_menu_order))


def _menu_order(level: Level) -> tuple[Fraction, int, int]:
    kind, period = (level.kind.value, level.m) if isinstance(level, Pattern) else (len(Kind), 0)
    return level.sparsity, kind, -period


def menu_names(menu: Sequence[Level]) -> list[str]:
    """Return the names of a menu in its order."""
    return [level.name for level in menu]


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
