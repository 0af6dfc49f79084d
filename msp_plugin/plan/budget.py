"""Budgets in whole weights: choose one level per unit so that the count of kept weights is exact.

Every choice here is one multiple-choice knapsack with an equality constraint, solved exactly (knapsack.py).
Sums of kept weights are counted in quanta, the greatest common divisor of all steps, from the least that the
units can keep. Layer sizes share large factors, so that an 8B model has only about 12,000 sums with the
default levels, and some millions with shares of zeros.

Shape legend: U units, K levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import numpy as np

from msp_plugin.errors import BudgetError
from msp_plugin.plan.knapsack import Steps, cheapest
from msp_plugin.plan.levels import Level
from msp_plugin.plan.menus import has_widths, menu_names
from msp_plugin.plan.units import UnitTable

#: Bytes of the largest choice table that is tried; a larger one is an error instead of a full memory.
_TABLE_LIMIT = 2 * 1024**3


@dataclass(frozen=True)
class Budget:
    """The plan to keep ``kept`` of ``weights`` prunable weights; ``target`` is the asked share of zeros."""

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

    Args:
        allowed: bool[U, K], True for the levels that each unit may take; None allows all. A read-only copy is
            kept, without the levels that do not fit a unit, or make the same of it as one before in the menu; without
            widths in the menu, None stays None.

    Raises:
        BudgetError: ``allowed`` has another shape, or leaves a unit without a level.
    """

    table: UnitTable
    menu: tuple[Level, ...]
    target: Fraction
    allowed: np.ndarray | None = field(default=None, compare=False, repr=False)
    _allowed_bytes: bytes | None = field(init=False, default=None, repr=False)  # arrays cannot be compared

    def __post_init__(self) -> None:
        if self.allowed is None and not has_widths(self.menu):
            return
        shape = (len(self.table), len(self.menu))
        allowed = np.ones(shape, dtype=bool) if self.allowed is None else np.array(self.allowed, dtype=bool)
        if allowed.shape != shape:
            raise BudgetError(f"the allowed levels have shape {allowed.shape}, units and levels {shape}")
        allowed &= self._distinct()
        if not allowed.any(axis=1).all():
            unit = self.table[int(np.argmin(allowed.any(axis=1)))]
            misfits = [f"{level.name} {why}" for level in self.menu if (why := level.misfit(unit))]
            raise BudgetError(
                f"no level of {', '.join(menu_names(self.menu))} is allowed for {unit.name}"
                + "".join(f"; {misfit}" for misfit in misfits),
                hint="add levels that fit it, such as dense"
                if misfits
                else "widen its bounds, or add levels",
            )
        allowed.setflags(write=False)
        object.__setattr__(self, "allowed", allowed)
        object.__setattr__(self, "_allowed_bytes", allowed.tobytes())

    def _distinct(self) -> np.ndarray:
        """Return bool[U, K], True for levels that fit a unit and make of it what no level before in the menu makes."""
        rows = []
        for unit in self.table:
            made = [None if level.misfit(unit) else level.width(unit) or level for level in self.menu]
            rows.append([form is not None and form not in made[:k] for k, form in enumerate(made)])
        return np.array(rows, dtype=bool)

    @cached_property
    def kept(self) -> np.ndarray:
        """int64[U, K]: how many weights each unit keeps at each level, allowed or not; 0 at a width that does not fit."""
        kept = [
            [0 if level.by_groups and level.misfit(unit) else level.kept(unit) for level in self.menu]
            for unit in self.table
        ]
        return np.array(kept, dtype=np.int64)

    @cached_property
    def by_cost(self) -> np.ndarray:
        """int64[U, K]: the levels of each unit from the one that keeps most; equal ones in the menu's order."""
        return np.argsort(-self.kept, axis=1, kind="stable")

    def neighbours(self, unit: int, level: int, steps: int) -> tuple[int, ...]:
        """Return the other levels that are at most so many steps from a level of a unit, in the menu's order.

        A step leads to the allowed level that keeps the next more or the next fewer weights of the unit.
        """
        order = self.by_cost[unit]
        order = order[self.may[unit, order] | (order == level)]
        at = int(np.flatnonzero(order == level)[0])
        return tuple(sorted(int(k) for k in order[max(0, at - steps) : at + steps + 1] if k != level))

    @cached_property
    def reach(self) -> tuple[int, int]:
        """The fewest and the most weights that can be kept under ``allowed``."""
        return int(self._least.sum()), int(self.kept.max(axis=1, where=self.may, initial=0).sum())

    @property
    def _nominal(self) -> Fraction:
        """The most weights that could be kept if shares of zeros did not round rows down."""
        total = Fraction(0)
        for unit, may in zip(self.table, self.may, strict=True):
            shares = (
                level.sparsity_of(unit) for level, allowed in zip(self.menu, may, strict=True) if allowed
            )
            total += unit.weights * (1 - min(shares))
        return total

    @cached_property
    def may(self) -> np.ndarray:
        """bool[U, K]: ``allowed``, or True everywhere."""
        return np.ones(self.kept.shape, dtype=bool) if self.allowed is None else self.allowed

    @cached_property
    def _least(self) -> np.ndarray:
        """int64[U]: the fewest weights that each unit can keep."""
        least: np.ndarray = self.kept.min(axis=1, where=self.may, initial=np.iinfo(np.int64).max)
        return least

    @cached_property
    def _quantum(self) -> int:
        """The count of weights of which all steps between levels are multiples."""
        spread = (self.kept - self._least[:, None])[self.may]
        return int(np.gcd.reduce(spread)) or 1

    @cached_property
    def _steps(self) -> Steps:
        """The allowed levels of each unit with their quanta, sparsest first, as those win ties."""
        spread = (self.kept - self._least[:, None]) // self._quantum
        return [
            [(int(k), int(row[k])) for k in np.lexsort((np.arange(len(row)), row)) if may[k]]
            for row, may in zip(spread, self.may, strict=True)
        ]

    @cached_property
    def budget(self) -> Budget:
        """The reachable count of kept weights that is nearest to the target's; the smaller one of two.

        A share of zeros keeps whole weights of each row, rounded down, so that its own sparsity may be met
        only to the nearest count. ``dropped`` counts only if the other levels are too dense for the target: a count that only
        a dropped unit can meet would force one on every allocation, for the sake of a few weights.

        Raises:
            BudgetError: the allowed levels cannot reach the target; the message gives the range that they
                reach.
        """
        weights = self.table.weights
        low, high = self.reach
        wanted = (1 - self.target) * weights
        if not low <= wanted <= max(Fraction(high), self._nominal):
            raise self._out_of_reach(low, high)
        at = max(0, math.floor((wanted - low) / self._quantum))
        sums = self._undropped
        if not sums & ((1 << (at + 1)) - 1):
            sums = self._sums(self._steps)
        near = [(sums & ((1 << (at + 1)) - 1)).bit_length() - 1]  # of all, the sum 0 can always be reached
        above = sums >> (at + 1)
        if above:
            near.append(at + (above & -above).bit_length())
        kept = [low + quanta * self._quantum for quanta in near]
        return Budget(self.target, weights, min(kept, key=lambda count: (abs(count - wanted), count)))

    @property
    def _goal(self) -> int:
        """The budget in quanta."""
        return (self.budget.kept - self.reach[0]) // self._quantum

    def _out_of_reach(self, low: int, high: int) -> BudgetError:
        """Return the error for a target that the levels cannot reach, keeping ``low`` to ``high`` weights."""
        least, most = (_exactly(1 - Fraction(kept, self.table.weights)) for kept in (high, low))
        within, widen = "", ""
        if self.allowed is not None:
            within = ", within bounds and protect,"
            widen = "widen the bounds, protect fewer layers (one makes its unit dense), "
        return BudgetError(
            f"sparsity {float(self.target):g} is out of reach: the levels "
            f"{', '.join(menu_names(self.menu))}{within} reach {least} to {most}",
            hint=f"add sparser or denser levels, {widen}or change the sparsity",
        )

    @cached_property
    def _stays(self) -> np.ndarray:
        """bool[U, K]: the allowed levels without ``dropped``; a unit that may only be dropped keeps that one."""
        dropped = np.array([level.is_dropped for level in self.menu])
        stays = self.may & ~dropped
        return np.where(stays.any(axis=1, keepdims=True), stays, self.may)

    @cached_property
    def _undropped(self) -> int:
        """The sums (see _sums) that can be reached without ``dropped``, as far as ``_stays`` leaves it out."""
        return self._sums(
            [
                [step for step in row if stays[step[0]]]
                for row, stays in zip(self._steps, self._stays, strict=True)
            ]
        )

    def _sums(self, steps: Steps) -> int:
        """Return an integer whose set bits are the sums, in quanta, that can be reached by some steps of each unit.

        Raises:
            BudgetError: there are too many sums for the choice table.
        """
        size = (self.reach[1] - self.reach[0]) // self._quantum + 1
        if size * len(self.table) > _TABLE_LIMIT:
            raise BudgetError(
                f"the layer sizes share no large factor: {size:,} sums for {len(self.table)} units",
                hint="use levels with the same M, or ignore the layers with odd sizes",
            )
        sums = 1
        for row in steps:
            reached = 0
            for step in {step for _, step in row}:
                reached |= sums << step
            sums = reached
        return sums

    def total_kept(self, choice: tuple[int, ...]) -> int:
        """Return how many weights a choice keeps."""
        return int(self.kept[np.arange(len(choice)), list(choice)].sum())

    def solve(self, cost: np.ndarray) -> tuple[int, ...]:
        """Return the choice, int[U], of least total cost that keeps exactly ``budget.kept`` weights.

        Of two choices of equal cost, the last unit that differs takes the sparser level.

        Args:
            cost: float64[U, K]; ``inf`` forbids a level for a unit.

        Raises:
            BudgetError: no allowed choice meets the budget.
        """
        cost = np.asarray(cost, dtype=np.float64)
        goal = self._goal
        steps = [[(k, step) for k, step in row if cost[u, k] < np.inf] for u, row in enumerate(self._steps)]
        choice = cheapest(steps, cost, goal)
        if choice is None:
            raise BudgetError(
                f"no allowed choice of levels keeps exactly {self.budget.kept:,} weights",
                hint="allow more levels for the units, or change the sparsity",
            )
        return choice

    def repair(self, density: np.ndarray, price: np.ndarray) -> tuple[int, ...]:
        """Return the choice, int[U], on the exact budget that is nearest to a target density of each unit.

        It minimises sum_u price[u] * weights_u * (kept share_u - density[u])^2, so that units with a low
        price move first.

        Args:
            density: float64[U], the target share of kept weights of each unit.
            price: float64[U], positive: cost of moving a unit away from its target density.

        Raises:
            BudgetError: no allowed choice meets the budget.
        """
        return self.solve(self._distance(density, price))

    def _distance(self, density: np.ndarray, price: np.ndarray) -> np.ndarray:
        """Return float64[U, K], what ``repair`` minimises."""
        sizes = np.array([unit.weights for unit in self.table], dtype=np.float64)
        share = self.kept / sizes[:, None]
        distance: np.ndarray = (price * sizes)[:, None] * (share - np.asarray(density)[:, None]) ** 2
        return distance

    def uniform(self) -> tuple[int, ...]:
        """Return the choice nearest to one sparsity for all units: the target's own level if it exists.

        No unit is dropped where the other levels meet the budget. Where they do not, units are nearest to one sparsity
        together: the dropped ones are spread evenly over the model, so that of equal blocks each n-th one is dropped.
        """
        return self._uniform

    @cached_property
    def _uniform(self) -> tuple[int, ...]:
        ones = np.ones(len(self.table))
        cost = self._distance(ones * float(1 - self.target), ones)
        if any(level.is_dropped for level in self.menu):
            if not self._undropped >> self._goal & 1:
                return self._spread()
            cost[~self._stays] = np.inf
        return self.solve(cost)

    def _spread(self) -> tuple[int, ...]:
        """Return the choice on the budget, int[U], nearest to one that meets the target at every depth.

        Each unit takes the level with which the weights kept so far, of units of its size (attentions, MLPs), are nearest
        to their share (error diffusion); then as few weights as possible change their place to meet the budget.
        """
        cost = np.empty(self.kept.shape)
        # By the size of a unit, the weights that the units so far should keep and do not.
        behind: dict[int, Fraction] = {}
        for u, unit in enumerate(self.table):
            wanted = behind.get(unit.weights, 0) + (1 - self.target) * unit.weights
            off = {int(k): abs(int(self.kept[u, k]) - wanted) for k in np.flatnonzero(self.may[u])}
            best = min(off, key=off.__getitem__)
            behind[unit.weights] = wanted - int(self.kept[u, best])
            cost[u] = np.abs(self.kept[u] - self.kept[u, best])
        return self.solve(cost)


def _exactly(share: Fraction) -> str:
    """Return the text of a share: a short decimal if that is exact, else the fraction and its decimal."""
    short = f"{float(share):.6g}"
    return short if Fraction(short) == share else f"{share} ({float(share):.4g})"
