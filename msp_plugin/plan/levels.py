"""Levels: what a unit may be.

``N:M`` keeps N of every M consecutive weights along in_features, as in the papers and NVIDIA's documentation.
(llm-compressor's ``mask_structure`` counts the pruned weights instead; hosts/llm_compressor/ converts.) ``N:M
in 2:4`` also keeps at most two of every aligned four, so that 2:4 kernels run it. A plain fraction is a share
of zeros, placed anywhere in each output row. ``3/4 wide`` keeps three quarters of an attention's heads or an
MLP's channels, ``3/4 wide 2:4`` two of every four weights of those. ``dropped`` keeps nothing of an attention,
an MLP or a block.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import ClassVar

from msp_plugin.errors import RecipeError, shown
from msp_plugin.plan.fractions import parse_fraction
from msp_plugin.plan.units import GRANULARITIES, Layer, Unit

_PATTERN = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*(?:(?:in|@)\s*(\d+)\s*:\s*(\d+)\s*)?", re.IGNORECASE)
_SHARE = re.compile(r"\s*(\d+\s*/\s*0*[1-9]\d*|\d*\.?\d+(e-?\d{1,2})?)\s*", re.IGNORECASE)
_WIDE = re.compile(r"\s*(\S+)\s+wide\b(.*)", re.IGNORECASE | re.DOTALL)
_FORMS = (
    'write "dense", "N:M" (N kept of M, e.g. "2:4"), "N:M in 2:4", a share of zeros, e.g. "0.7", a width, e.g. '
    '"3/4 wide", or "dropped"'
)


class Level(ABC):
    """What a unit may be. Recipes and files hold its name, and ``parse`` gives the level of a name.

    Levels are values: equal levels have equal names. A layer stands for a unit that holds it alone.
    """

    #: True if heads, channels or all of a unit go: what that changes in the model is in the weights of its last layer
    #: alone, whatever the others hold for what has gone.
    narrows: ClassVar[bool] = False
    #: True if some heads or channels of a unit stay (see ``width``): its layers have to know their groups. It may fit some
    #: units only.
    by_groups: ClassVar[bool] = False
    #: The granularities of the units that it is for.
    granularities: ClassVar[tuple[str, ...]] = GRANULARITIES

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

    def sparsity_of(self, unit: Unit | Layer) -> Fraction:
        """Return the share of zeros of a unit: at a width that fits it its own, which counts whole heads or channels.

        At other levels the nominal one, before it is rounded to whole weights of a row.
        """
        return self.sparsity if self.width(unit) is None else 1 - Fraction(self.kept(unit), unit.weights)

    def width(self, unit: Unit | Layer) -> tuple[int, Pattern] | None:
        """Return (heads or channels of a unit that stay, the pattern inside what stays).

        None at a level that is not ``by_groups``, and where it does not fit the unit.
        """
        return None

    def limits(self, layer: Layer) -> tuple[tuple[int, int, str], ...]:
        """Return (n, m, place) of each pattern that a layer's weight keeps to, the widest first.

        At most n of every m consecutive weights of a row are kept; ``place`` names the m weights. m divides in_features.
        """
        return ()

    @property
    def pattern(self) -> Pattern | None:
        """The pattern, if a mask of it in each layer is all that the level asks for."""
        return None

    @property
    def masks(self) -> bool:
        """True if zeros lie within the rows and columns that stay."""
        return self.pattern is not None and not self.is_dense

    @property
    def is_dense(self) -> bool:
        """True if nothing is pruned."""
        return not self.sparsity

    @property
    def is_dropped(self) -> bool:
        """True if nothing is kept."""
        return self.sparsity == 1

    @staticmethod
    def parse(text: object) -> Level:
        """Return the level of a recipe's text, e.g. ``"dense"``, ``"2:4"``, ``"3:8 in 2:4"``, ``"0.7"``, ``"3/4 wide"``.

        Raises:
            RecipeError: the text is not a level. The message explains an unquoted ``2:4``, which YAML 1.1
                reads as the number 124.
        """
        if isinstance(text, Level):
            return text
        if isinstance(text, str) and text.strip().lower() == DROPPED.name:
            return DROPPED
        if isinstance(text, str) and (match := _WIDE.fullmatch(text)):
            return _parse_width(text, *match.groups())
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

    @property
    def pattern(self) -> Pattern:
        return self

    def limits(self, layer: Layer) -> tuple[tuple[int, int, str], ...]:
        widest = (*self.group(layer.in_features), "row" if self.kind is Kind.SHARE else "group")
        return (widest, (2, 4, "aligned four")) if self.kind is Kind.NM_IN_24 else (widest,)

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
    narrows = True
    granularities = ("half", "block")

    def kept(self, unit: Unit | Layer) -> int:
        return 0

    def misfit(self, unit: Unit | Layer) -> str | None:
        return None


@dataclass(frozen=True)
class Width(Level):
    """A share of an attention's KV heads, each with its query heads, or of an MLP's channels; the others are gone.

    A unit keeps the multiple of its quantum that is nearest to the share, the smaller one of two. Where that is none or
    all of it, the level does not fit the unit, which then takes other levels. The weights that go stay in the model, as
    zeros, until an export leaves them out.

    Args:
        share: of the groups that stay, between 0 and 1.
        inside: the pattern of the weights that stay, along what stays of in_features.
    """

    share: Fraction
    inside: Pattern
    narrows = True
    by_groups = True
    granularities = ("half",)

    @property
    def name(self) -> str:
        """``"3/4 wide"``, or ``"3/4 wide 2:4"``."""
        return f"{self.share} wide" + ("" if self.inside.is_dense else f" {self.inside.name}")

    @property
    def sparsity(self) -> Fraction:
        """The nominal share of zeros; a unit's own is ``sparsity_of`` it."""
        return 1 - self.share * (1 - self.inside.sparsity)

    @property
    def servable(self) -> bool:
        """False: at full size, the columns that stay are no aligned groups of four."""
        return False

    @property
    def masks(self) -> bool:
        return not self.inside.is_dense

    def groups(self, unit: Unit | Layer) -> int:
        """Return how many of a unit's groups stay; 0 if they are not known, or are too few."""
        of = unit.groups
        if of is None:
            return 0
        steps = self.share * of.count / of.quantum
        return max(0, math.ceil(steps - Fraction(1, 2))) * of.quantum

    def kept(self, unit: Unit | Layer) -> int:
        if why := self.misfit(unit):
            raise RecipeError(f"level {self.name} {why}", hint="use another width, or a smaller quantum")
        kept = 0
        for layer in unit.layers:
            rows, columns = self.shape(layer)
            n, m = self.inside.group(columns)
            kept += rows * columns // m * n
        return kept

    def shape(self, layer: Layer) -> tuple[int, int]:
        """Return (out_features, in_features) of what stays of a layer whose groups are known."""
        assert layer.groups is not None
        count = self.groups(layer)
        rows, columns = layer.out_features, layer.in_features
        if layer.inner:
            return rows // layer.groups.count * count, columns
        return rows, columns // layer.groups.count * count

    def misfit(self, unit: Unit | Layer) -> str | None:
        name = unit.name
        if unit.groups is None:
            return f"is for the attention or the MLP of a block, which {name} is not known to be"
        of, count = unit.groups, self.groups(unit)
        if not 0 < count < of.count:
            found = f"{of.count} heads or channels of {name}, which come in steps of {of.quantum}"
            return f"keeps {'all' if count else 'none'} of the {found}"
        for layer in unit.layers:
            _, columns = self.shape(layer)
            if why := self.inside.misfit(Layer(layer.name, 1, columns)):
                return why
        return None

    def width(self, unit: Unit | Layer) -> tuple[int, Pattern] | None:
        return None if self.misfit(unit) else (self.groups(unit), self.inside)


def _parse_width(text: str, share: str, inside: str) -> Width:
    """Return the width of a text such as ``3/4 wide`` or ``0.5 wide 2:4``.

    Raises:
        RecipeError: the share is not between 0 and 1, or what follows is not a pattern.
    """
    try:
        kept = parse_fraction(share)
    except ValueError:
        kept = Fraction(0)
    if not 0 < kept < 1:
        raise RecipeError(
            f"level {shown(text)} keeps {shown(share)} of the heads or channels",
            hint='give the share that stays, between 0 and 1, e.g. "3/4 wide"; all is "dense", none "dropped"',
        )
    try:
        return Width(kept, _parse_pattern(inside) if inside.strip() else DENSE)
    except RecipeError as error:
        raise RecipeError(f"level {shown(text)}: {error.message}", hint=error.hint) from None


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
