"""From scores to a profile of densities, and from the profile to a choice on the exact budget.

Published allocation rules give each decoder block a density. Three things they leave open are settled here,
for all of them: a density outside [0, 1] is clipped; a block's density is the wish of each of its units,
and ``AllocationProblem.repair`` finds the choice of levels on the exact budget that is nearest to the wishes
(the published means are mostly over blocks, not weights, so that blocks of unequal size miss the budget);
and scores that are alike for all blocks, to rounding, divide by zero or blow rounding up: they give the
uniform allocation, with a note that says so.

Shape legend: U units, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from msp_plugin.allocators.base import AllocationInputs, AllocationResult
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.units import UnitTable

#: Scores that differ by less than this, relative to the largest, are alike.
ROUNDING = 1e-12

#: From the importance of each block, scaled to [0, 1], and its count of weights to its density.
Density = Callable[[np.ndarray, np.ndarray], np.ndarray]


def check_within(owner: str, option: str, value: float, low: float, high: float) -> None:
    """Raise unless an option's value is in [low, high].

    Raises:
        RecipeError: it is not.
    """
    if not low <= value <= high:
        raise RecipeError(f"{owner}: {option} = {value} is outside [{low:g}, {high:g}]")


def finite_scores(table: UnitTable, name: str, scores: np.ndarray) -> np.ndarray:
    """Return the scores as float64[U].

    Raises:
        NumericsError: one is not finite; its unit is named.
    """
    scores = np.asarray(scores, dtype=np.float64)
    for unit, score in zip(table, scores, strict=True):
        if not np.isfinite(score):
            raise NumericsError(
                f"sensitivity {name!r} of {unit.name} is {score}",
                hint="weights or activations overflow: try dtype float32, or add its layers to ignore",
            )
    return scores


def blocks_of(table: UnitTable) -> tuple[np.ndarray, np.ndarray]:
    """Return (position int[U] of each unit's block among the blocks, weights float64[L] of each block)."""
    positions = np.unique([unit.block for unit in table], return_inverse=True)[1].reshape(-1)
    return positions, np.bincount(positions, [unit.weights for unit in table])


def block_means(table: UnitTable, values: np.ndarray) -> np.ndarray:
    """Return float64[L]: the mean of the values of a block's units, weighted by their weights."""
    positions, weights = blocks_of(table)
    sizes = np.array([unit.weights for unit in table], dtype=np.float64)
    return np.bincount(positions, sizes * values) / weights


def centred(amplitude: float, target: float) -> Density:
    """Return the map to 1 - S + d - mean(d) with d = 2a * importance, the mean over blocks."""

    def density(importance: np.ndarray, weights: np.ndarray) -> np.ndarray:
        d = 2 * amplitude * importance
        return 1 - target + d - d.mean()

    return density


def relative_importance(unimportance: np.ndarray) -> np.ndarray:
    """Return 1 - v / sum(v) (DLP, arXiv 2505.23807)."""
    return 1 - unimportance / unimportance.sum()


def nearest_choice(
    problem: AllocationProblem, density: np.ndarray, notes: tuple[str, ...] = ()
) -> AllocationResult:
    """Return the choice on the exact budget nearest to a wished density of each unit, float64[U]."""
    ones = np.ones(len(problem.table))
    return AllocationResult(problem.repair(np.clip(density, 0.0, 1.0), ones), notes=notes)


def flat_choice(problem: AllocationProblem, name: str, what: str = "block") -> AllocationResult:
    """Return the uniform choice, with a note that the scores are all alike."""
    note = f"sensitivity {name!r} is the same for every {what}, so the allocation is uniform"
    return AllocationResult(problem.uniform(), notes=(note,))


def choose_by_block(
    inputs: AllocationInputs,
    name: str,
    density: Density,
    importance: Callable[[np.ndarray], np.ndarray] = lambda scores: scores,
) -> AllocationResult:
    """Return the choice that follows from one score per block.

    Args:
        name: the sensitivity that is read.
        density: see Density.
        importance: from the blocks' scores, float64[L], to how dense they should be.

    Raises:
        NumericsError: a score is not finite.
    """
    problem = inputs.problem
    scores = finite_scores(problem.table, name, inputs.sensitivities[name])
    positions, weights = blocks_of(problem.table)
    means = block_means(problem.table, scores)
    if np.ptp(means) <= ROUNDING * np.abs(means).max():
        return flat_choice(problem, name)
    values = importance(means)
    scaled = (values - values.min()) / np.ptp(values)
    return nearest_choice(problem, density(scaled, weights)[positions])
