"""Choices that a search measures: its seeds, and exact minima of its local model at falling prices of a move.

Shape legend: U units, K levels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain

import numpy as np

from msp_plugin.allocators.base import AllocationInputs, Choice
from msp_plugin.allocators.local_model import LocalModel
from msp_plugin.allocators.msp import fisher_seeds
from msp_plugin.plan.budget import AllocationProblem

#: Prices of a move that are tried, each 1.5 times less than the one before; the first forbids nearly every move.
PRICES, PRICE_STEP = 24, 1.5


def make_seeds(inputs: AllocationInputs, count: int) -> Iterator[Choice]:
    """Yield up to ``count`` distinct choices: uniform, the minimum of the K-FAC error, and those of fisher_seeds."""
    problem = inputs.problem
    seen: set[Choice] = set()
    candidates = [problem.uniform(), problem.solve(inputs.errors["kfac"])]
    candidates += fisher_seeds(inputs, count, 0.25, np.random.default_rng(inputs.seed))
    for choice in candidates:
        if choice not in seen and len(seen) < count:
            seen.add(choice)
            yield choice


def make_proposals(
    problem: AllocationProblem,
    local: LocalModel,
    known: Collection[Choice],
    count: int,
    rng: np.random.Generator,
) -> Iterator[tuple[Choice, float]]:
    """Yield up to ``count`` distinct choices on the budget with the change of the loss that is predicted for each.

    From few moves to many, as the price of a move falls; then with costs that are drawn from their standard
    errors (Thompson sampling).

    Args:
        known: choices that are not proposed again.
    """
    incumbent = np.array(local.incumbent)
    rows, cost, seen = np.arange(len(incumbent)), local.cost(), set(known)
    moved = np.arange(len(problem.menu))[None, :] != incumbent[:, None]
    top = -float(cost[np.isfinite(cost)].min())
    falling = (cost + top / PRICE_STEP**n * moved for n in range(PRICES))
    found = 0
    for prices in chain(falling, _drawn_costs(local, cost, top * moved, 8 * count, rng)):
        choice = problem.solve(prices)
        if choice not in seen:
            seen.add(choice)
            found += 1
            yield choice, float(cost[rows, list(choice)].sum())
        if found == count:
            return


def _drawn_costs(
    local: LocalModel, cost: np.ndarray, price: np.ndarray, draws: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield costs float64[U, K] with noise of their standard errors, each at a random price."""
    rows = np.arange(len(cost))
    for _ in range(draws):
        drawn = cost + rng.standard_normal(cost.shape) * local.deviation()
        drawn[rows, list(local.incumbent)] = 0.0
        yield drawn + 10 ** -rng.uniform(0, 1.5) * price
