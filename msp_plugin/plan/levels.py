"""Levels: the sparsity patterns that an allocation chooses from.

``N:M`` keeps N of every M consecutive weights along in_features, as in the papers and NVIDIA's
documentation. (llm-compressor's ``mask_structure`` counts the pruned ones; the conversion is in
hosts/llm_compressor/.)
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from msp_plugin.errors import RecipeError

_PATTERN = re.compile(r"^\s*(\d+)\s*:\s*(\d+)\s*$")


@dataclass(frozen=True)
class Level:
    """One sparsity pattern: ``n`` kept of every ``m`` weights along in_features.

    ``dense`` is 1:1. The name is what recipes and files carry.
    """

    n: int
    m: int

    @classmethod
    def parse(cls, text: object) -> Level:
        """Return the level that a recipe wrote as ``"dense"`` or ``"N:M"``.

        Raises:
            RecipeError: not a level; an unquoted ``2:4``, which YAML 1.1 reads as the number 124,
                is explained.
        """
        if isinstance(text, Level):
            return text
        if isinstance(text, int) and not isinstance(text, bool) and text >= 60:
            n, m = divmod(text, 60)
            raise RecipeError(
                f"level {text!r} is a number; YAML 1.1 reads an unquoted {n}:{m} in base 60",
                hint=f'write it with quotes: "{n}:{m}"',
            )
        if isinstance(text, str):
            if text.strip().lower() == "dense":
                return DENSE
            if match := _PATTERN.match(text):
                n, m = int(match[1]), int(match[2])
                if 1 <= n <= m:
                    return DENSE if n == m else cls(n, m)
                raise RecipeError(
                    f"level {text!r} keeps {n} of {m}", hint="N:M needs 1 <= N <= M: N are kept of M"
                )
        raise RecipeError(
            f"level {text!r} is not a level", hint='write "dense" or "N:M" (N kept of M), e.g. "2:4"'
        )

    @property
    def name(self) -> str:
        """``"dense"`` or ``"N:M"``."""
        return "dense" if self.n == self.m else f"{self.n}:{self.m}"

    @property
    def is_dense(self) -> bool:
        """True if nothing is pruned."""
        return self.n == self.m

    @property
    def sparsity(self) -> Fraction:
        """The exact share of zeros."""
        return Fraction(self.m - self.n, self.m)

    @property
    def servable(self) -> bool:
        """True if every mask of this level keeps at most two in each aligned group of four.

        Then 2:4 kernels can run it. A group of four can meet several groups of M; each contributes
        at most N, and at most its overlap.
        """
        period = math.lcm(4, self.m)
        for start in range(0, period, 4):
            owners = Counter(position // self.m for position in range(start, start + 4))
            if sum(min(self.n, overlap) for overlap in owners.values()) > 2:
                return False
        return True

    def kept(self, out_features: int, in_features: int) -> int:
        """Return how many weights of an [out, in] layer stay.

        Raises:
            RecipeError: M does not divide in_features.
        """
        if in_features % self.m:
            raise RecipeError(
                f"level {self.name} does not divide in_features = {in_features}",
                hint=f"use an M that divides it, or ignore the layer (remainder {in_features % self.m})",
            )
        return out_features * (in_features // self.m) * self.n

    def __str__(self) -> str:
        return self.name


DENSE = Level(1, 1)

#: Eight steps of one eighth. One M for all keeps every layer's step a multiple of the same count,
#: so budgets are met to the weight; 2:8 and 1:8 run on 2:4 kernels. The choice is ours: the paper's
#: level set is not published.
DEFAULT_LEVELS = ("dense", "7:8", "6:8", "5:8", "4:8", "3:8", "2:8", "1:8")


def parse_menu(levels: Iterable[object]) -> tuple[Level, ...]:
    """Return the distinct levels of a menu, densest first; of equal ones the freer pattern first.

    Raises:
        RecipeError: the menu is empty, names a level twice, or holds something that is no level.
    """
    if isinstance(levels, str):
        levels = [part for part in levels.split(",") if part.strip()]
    menu = [Level.parse(text) for text in levels]
    if not menu:
        raise RecipeError("the list of levels is empty", hint='give at least one, e.g. ["2:4"]')
    twice = sorted({level.name for level in menu if menu.count(level) > 1})
    if twice:
        raise RecipeError(f"levels named twice: {', '.join(twice)}", hint="name each level once")
    return tuple(sorted(menu, key=lambda level: (level.sparsity, -level.m)))


def menu_names(menu: Sequence[Level]) -> list[str]:
    """Return the names of a menu in its order."""
    return [level.name for level in menu]


def parse_sparsity(value: object) -> Fraction:
    """Return the asked share of zeros exactly, from a number or a text such as ``0.75`` or ``"5/8"``.

    Raises:
        RecipeError: not a number in [0, 1); percentages are recognised and explained.
    """
    try:
        if isinstance(value, bool):
            raise ValueError
        exact = Fraction(str(value)) if not isinstance(value, Fraction) else value
    except (ValueError, ZeroDivisionError):
        raise RecipeError(
            f"sparsity {value!r} is not a number", hint="give the share of zeros in [0, 1), e.g. 0.75"
        ) from None
    if not 0 <= exact < 1:
        percent = f"; for {value} % write {float(exact) / 100:g}" if 1 < exact <= 100 else ""
        raise RecipeError(
            f"sparsity {value!r} is outside [0, 1)",
            hint=f"give the share of zeros among the prunable weights{percent}",
        )
    return exact
