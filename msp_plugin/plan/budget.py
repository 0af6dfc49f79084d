"""Budgets in whole weights: choose one level per unit so that the count of kept weights is exact.

Shape legend: U units, K levels, Q+1 reachable sums in quanta.

Every choice here is one multiple-choice knapsack with an equality constraint, solved exactly by
dynamic programming over the sums (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, 11.5).
Layer sizes share large factors, so that the sums are few: an 8B model has about 7,000 of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from msp_plugin.errors import BudgetError
from msp_plugin.plan.levels import Level, menu_names
from msp_plugin.plan.units import UnitTable

#: Bytes of the choice table beyond which we say so instead of filling the memory.
_TABLE_LIMIT = 2 * 1024**3


@dataclass(frozen=True)
class Budget:
    """What may stay: ``kept`` of ``weights`` prunable weights; ``target`` is the share asked for."""

    target: Fraction
    weights: int
    kept: int

    @property
    def zeros(self) -> int:
        """Planned count of zeros."""
        return self.weights - self.kept

    @property
    def sparsity(self) -> Fraction:
        """The planned share of zeros, exactly."""
        return Fraction(self.zeros, self.weights)

    @property
    def exact(self) -> bool:
        """True if the plan is the target to the weight."""
        return self.sparsity == self.target


@dataclass(frozen=True)
class AllocationProblem:
    """One level of ``menu`` for every unit of ``table``, at the asked share of zeros.

    A choice is a tuple of level indices int[U], one per unit in the table's order.
    """

    table: UnitTable
    menu: tuple[Level, ...]
    target: Fraction

    @cached_property
    def kept(self) -> np.ndarray:
        """int64[U, K]: how many weights each unit keeps at each level."""
        rows = [
            [sum(level.kept(a.out_features, a.in_features) for a in unit.layers) for level in self.menu]
            for unit in self.table
        ]
        return np.array(rows, dtype=np.int64)

    @cached_property
    def _quantum(self) -> int:
        spread = self.kept - self.kept.min(axis=1, keepdims=True)
        return int(np.gcd.reduce(spread, axis=None)) or 1

    @cached_property
    def _quanta(self) -> np.ndarray:
        return (self.kept - self.kept.min(axis=1, keepdims=True)) // self._quantum

    @cached_property
    def budget(self) -> Budget:
        """The count of kept weights: the target's if the levels can express it, else the nearest.

        A tie goes to the sparser side.

        Raises:
            BudgetError: the target is out of the levels' reach; the reachable range is named.
        """
        weights = self.table.weights
        low, high = int(self.kept.min(axis=1).sum()), int(self.kept.max(axis=1).sum())
        wanted = (1 - self.target) * weights
        if not low <= wanted <= high:
            names = ", ".join(menu_names(self.menu))
            raise BudgetError(
                f"sparsity {float(self.target):g} is out of reach: the levels {names} reach "
                f"{1 - high / weights:.4g} to {1 - low / weights:.4g}",
                hint="add sparser or denser levels, or change the sparsity",
            )
        reachable = np.flatnonzero(np.isfinite(self._forward(np.zeros(self.kept.shape))[0]))
        at = int(np.searchsorted(reachable, math.floor((wanted - low) / self._quantum)))
        near = [low + int(r) * self._quantum for r in reachable[max(0, at - 1) : at + 2]]
        return Budget(self.target, weights, min(near, key=lambda kept: (abs(kept - wanted), kept)))

    def total_kept(self, choice: tuple[int, ...]) -> int:
        """Return how many weights a choice keeps."""
        return int(self.kept[np.arange(len(choice)), list(choice)].sum())

    def _forward(self, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the least cost float64[Q+1] of every sum, and the level taken uint8[U, Q+1]."""
        quanta = self._quanta
        size = int(quanta.max(axis=1).sum()) + 1
        if size * len(quanta) > _TABLE_LIMIT:
            raise BudgetError(
                f"the layer sizes share no large factor: {size:,} sums for {len(quanta)} units",
                hint="use levels with the same M, or ignore the layers with odd sizes",
            )
        best = np.full(size, np.inf)
        best[0] = 0.0
        taken = np.zeros((len(quanta), size), dtype=np.uint8)
        for u, steps in enumerate(quanta):
            new = np.full(size, np.inf)
            for k in np.lexsort((np.arange(len(steps)), steps)):
                step = int(steps[k])
                candidate = best[: size - step] + cost[u, k]
                better = candidate < new[step:]
                new[step:][better] = candidate[better]
                taken[u, step:][better] = k
            best = new
        return best, taken

    def solve(self, cost: np.ndarray) -> tuple[int, ...]:
        """Return the choice of least total cost that keeps exactly ``budget.kept`` weights.

        Args:
            cost: float64[U, K]; ``inf`` forbids a level for a unit.

        Raises:
            BudgetError: no allowed choice meets the budget.
        """
        best, taken = self._forward(np.asarray(cost, dtype=np.float64))
        at = (self.budget.kept - int(self.kept.min(axis=1).sum())) // self._quantum
        if not np.isfinite(best[at]):
            raise BudgetError(
                f"no allowed choice of levels keeps exactly {self.budget.kept:,} weights",
                hint="allow more levels for the units, or change the sparsity",
            )
        choice = []
        for u in reversed(range(len(taken))):
            k = int(taken[u, at])
            choice.append(k)
            at -= int(self._quanta[u, k])
        return tuple(reversed(choice))

    def repair(self, wish: np.ndarray, give_way: np.ndarray) -> tuple[int, ...]:
        """Return the choice on the budget that is nearest to a wished share of kept weights.

        Minimises sum_u give_way[u] * weights_u * (kept share - wish[u])^2, so a unit with a small
        ``give_way`` moves first.

        Args:
            wish: float64[U], the share of weights each unit would keep.
            give_way: float64[U], positive; how dear it is to move a unit off its wish.
        """
        sizes = np.array([unit.weights for unit in self.table], dtype=np.float64)
        share = self.kept / sizes[:, None]
        cost = (give_way * sizes)[:, None] * (share - np.asarray(wish)[:, None]) ** 2
        return self.solve(cost)

    def uniform(self) -> tuple[int, ...]:
        """Return the choice nearest to one sparsity for all units; that level itself if it exists."""
        ones = np.ones(len(self.table))
        return self.repair(ones * float(1 - self.target), ones)
