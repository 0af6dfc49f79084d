"""Bounds: the least and the most sparsity of the layers that a pattern matches.

Shape legend: U units, K levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from msp_plugin.errors import RecipeError, shown
from msp_plugin.plan.fractions import parse_fraction
from msp_plugin.plan.levels import DENSE, Level
from msp_plugin.plan.menus import menu_names
from msp_plugin.plan.units import Unit, UnitTable

#: Least and most share of zeros.
Shares = tuple[Fraction, Fraction]


@dataclass(frozen=True)
class Bounds:
    """A recipe's limits for single layers. Empty bounds are false.

    Args:
        shares: by pattern, the least and the most share of zeros.
        protect: patterns of layers that stay dense, and count in the budget.
        dense_for_protected: True if only protected layers may take ``dense``, because the recipe's levels
            lack it.
    """

    shares: Mapping[str, Shares] = field(default_factory=dict)
    protect: tuple[str, ...] = ()
    dense_for_protected: bool = False

    def __bool__(self) -> bool:
        return bool(self.shares or self.protect)

    def __hash__(self) -> int:
        return hash((tuple(self.shares.items()), self.protect, self.dense_for_protected))

    @property
    def patterns(self) -> tuple[str, ...]:
        """All patterns, each once."""
        return tuple(dict.fromkeys([*self.shares, *self.protect]))

    def menu(self, menu: Sequence[Level]) -> tuple[Level, ...]:
        """Return the menu, with ``dense`` added if there are protected layers."""
        return tuple(menu) if not self.protect or DENSE in menu else (DENSE, *menu)

    def unprotected(self, menu: Sequence[Level]) -> tuple[Level, ...]:
        """Return a menu without the ``dense`` that ``menu`` has added."""
        return tuple(level for level in menu if not (self.dense_for_protected and level.is_dense))

    def allowed(
        self, table: UnitTable, menu: Sequence[Level], matched: Mapping[str, AbstractSet[str]]
    ) -> np.ndarray:
        """Return bool[U, K], True for the levels that each unit may take.

        A unit may take the levels that all of its layers may take; with a protected layer it is dense.

        Args:
            matched: by pattern, the names of the layers that it matches.

        Raises:
            RecipeError: the bounds of a unit contradict each other, or no level is inside them.
        """
        return np.array([self._row(unit, menu, matched) for unit in table], dtype=bool)

    def _row(self, unit: Unit, menu: Sequence[Level], matched: Mapping[str, AbstractSet[str]]) -> list[bool]:
        """Return bool[K] for one unit."""
        names = {layer.name for layer in unit.layers}
        shares = {pattern: limits for pattern, limits in self.shares.items() if names & matched[pattern]}
        protecting = [pattern for pattern in self.protect if names & matched[pattern]]
        low = max((least for least, _ in shares.values()), default=Fraction(0))
        high = min((most for _, most in shares.values()), default=Fraction(1))
        limits = [f"{pattern!r}: [{least}, {most}]" for pattern, (least, most) in shares.items()]
        if protecting:
            high = Fraction(0)
            limits.append(f"protect {', '.join(map(repr, protecting))}")
        if low > high:
            raise RecipeError(
                f"the bounds of {unit.name} contradict each other: {'; '.join(limits)}",
                hint="several patterns match it, and all of them count: leave one out, or name the layers "
                "more narrowly"
                if len(names) == 1
                else "the layers of a unit share a level and take the bounds of each; granularity: layer "
                "gives each its own",
            )
        no_dense = self.dense_for_protected and not protecting
        row = [low <= level.sparsity_of(unit) <= high and not (no_dense and level.is_dense) for level in menu]
        if not any(row):
            raise RecipeError(
                f"no level of {', '.join(menu_names(menu))} is within the bounds of {unit.name}: "
                f"{'; '.join(limits)}",
                hint=f"add a level with a sparsity from {low} to {high}, or widen the bounds",
            )
        return row

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form: ``bounds`` {pattern: [least, most], as fractions} and ``protect``."""
        return {
            "bounds": {pattern: [str(least), str(most)] for pattern, (least, most) in self.shares.items()},
            "protect": list(self.protect),
        }


def parse_bounds(bounds: Mapping[str, object], protect: Iterable[str], menu: Sequence[Level]) -> Bounds:
    """Return the bounds of a recipe.

    Args:
        bounds: ``{pattern: [least, most]}``, shares of zeros.
        protect: patterns of layers that stay dense.
        menu: the recipe's levels.

    Raises:
        RecipeError: a share is not a number in [0, 1], or the least is above the most.
    """
    shares = {str(pattern): _shares(str(pattern), value) for pattern, value in bounds.items()}
    protect = tuple(dict.fromkeys(protect))
    return Bounds(shares, protect, bool(protect) and DENSE not in menu)


def _shares(pattern: str, value: object) -> Shares:
    try:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ValueError
        low, high = (parse_fraction(share) for share in value)
    except ValueError:
        raise RecipeError(
            f"bounds of {shown(pattern)} are {shown(value)}",
            hint="give the least and the most sparsity, e.g. [0.25, 0.5]",
        ) from None
    if not 0 <= low <= high <= 1:
        raise RecipeError(
            f"bounds of {shown(pattern)} are {shown(value)}",
            hint="give shares of zeros with 0 <= least <= most <= 1, e.g. [0.25, 0.5]",
        )
    return low, high
