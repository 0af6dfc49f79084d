"""Bounds: how sparse the layers that a pattern names may and must be.

Shape legend: U units, K levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from msp_plugin.errors import RecipeError, shown
from msp_plugin.plan.levels import DENSE, Level, menu_names, parse_fraction
from msp_plugin.plan.units import Unit, UnitTable

#: Least and most share of zeros.
Shares = tuple[Fraction, Fraction]


@dataclass(frozen=True)
class Bounds:
    """What a recipe says about single layers. Empty bounds are false.

    Args:
        shares: by pattern, the least and the most share of zeros.
        protect: patterns of layers that stay dense, and count in the budget.
        dense_for_protected: True if ``dense`` is in the menu for the protected layers alone.
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
        """Return the menu, with ``dense`` for the protected layers."""
        return tuple(menu) if not self.protect or DENSE in menu else (DENSE, *menu)

    def allowed(
        self, table: UnitTable, menu: Sequence[Level], matched: Mapping[str, AbstractSet[str]]
    ) -> np.ndarray:
        """Return bool[U, K], the levels that each unit may take.

        A unit takes the intersection over its layers; one with a protected layer is dense.

        Args:
            matched: by pattern, the names of the layers that it matches.

        Raises:
            RecipeError: bounds contradict each other, or no level is inside them.
        """
        return np.array([self._row(unit, menu, matched) for unit in table], dtype=bool)

    def _row(self, unit: Unit, menu: Sequence[Level], matched: Mapping[str, AbstractSet[str]]) -> list[bool]:
        names = {layer.name for layer in unit.layers}
        mine = {pattern: its for pattern, its in self.shares.items() if names & matched[pattern]}
        guards = [pattern for pattern in self.protect if names & matched[pattern]]
        low = max((its[0] for its in mine.values()), default=Fraction(0))
        high = min((its[1] for its in mine.values()), default=Fraction(1))
        said = [f"{pattern!r}: [{its[0]}, {its[1]}]" for pattern, its in mine.items()]
        if guards:
            high = Fraction(0)
            said.append(f"protect {', '.join(map(repr, guards))}")
        if low > high:
            raise RecipeError(
                f"the bounds of {unit.name} contradict each other: {'; '.join(said)}",
                hint="several patterns match it, and all of them count: leave one out, or name the layers more narrowly"
                if len(names) == 1
                else "the layers of a unit share a level and take the bounds of each; granularity: layer "
                "gives each its own",
            )
        spare = self.dense_for_protected and not guards
        row = [low <= level.sparsity <= high and not (spare and level.is_dense) for level in menu]
        if not any(row):
            raise RecipeError(
                f"no level of {', '.join(menu_names(menu))} is within the bounds of {unit.name}: "
                f"{'; '.join(said)}",
                hint=f"add a level with a sparsity from {low} to {high}, or widen the bounds",
            )
        return row

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form: ``bounds`` {pattern: [least, most], as fractions} and ``protect``."""
        return {
            "bounds": {pattern: [str(share) for share in its] for pattern, its in self.shares.items()},
            "protect": list(self.protect),
        }


def parse_bounds(bounds: Mapping[str, object], protect: Iterable[str], menu: Sequence[Level]) -> Bounds:
    """Return the bounds that a recipe wrote as ``{pattern: [least, most]}``; ``menu`` is the recipe's.

    Raises:
        RecipeError: shares that are no numbers in [0, 1], or in the wrong order.
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
