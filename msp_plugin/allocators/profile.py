"""Turn scores of blocks into densities, and densities into a choice on the exact budget.

Published allocation rules give each decoder block a density. Three questions that they leave open are
answered here, in the same way for all. A density outside [0, 1] is clipped. A block's density is the target
density of each of its units, and ``AllocationProblem.repair`` finds the nearest choice on the exact budget;
the published densities mostly have the target as their mean over blocks, not over weights, and so miss the
budget if blocks differ in size. Scores that are equal for all blocks, up to rounding, would divide by zero or
amplify rounding errors: they give the uniform allocation and a note.

Shape legend: U units, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from msp_plugin.allocators.base import AllocationInputs, AllocationResult
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.units import UnitTable

#: Scores that differ by less than this, relative to the largest, count as equal.
ROUNDING = 1e-12

#: From the importance of each block, float64[L] in [0, 1], and its count of weights, float64[L], to its
#: density.
Density = Callable[[np.ndarray, np.ndarray], np.ndarray]


def check_within(owner: str, option: str, value: float, low: float, high: float) -> None:
    """Raise unless the value of an allocator's option is in [low, high].

    Raises:
        RecipeError: it is outside.
    """
    if not low <= value <= high:
        raise RecipeError(f"{owner}: {option} = {value} is outside [{low:g}, {high:g}]")


def finite_scores(table: UnitTable, name: str, scores: np.ndarray) -> np.ndarray:
    """Return the scores as float64[U].

    Raises:
        NumericsError: a score is not finite; the message names its unit.
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
    """Return (int[U], the index of each unit's block; float64[L], the count of weights of each block)."""
    positions: np.ndarray = np.unique([unit.block for unit in table], return_inverse=True)[1].reshape(-1)
    return positions, np.bincount(positions, [unit.weights for unit in table])


def block_means(table: UnitTable, values: np.ndarray) -> np.ndarray:
    """Return float64[L], each block's mean of the values of its units, weighted by their weights."""
    positions, weights = blocks_of(table)
    sizes = np.array([unit.weights for unit in table], dtype=np.float64)
    means: np.ndarray = np.bincount(positions, sizes * values) / weights
    return means


def centred(amplitude: float, target: float) -> Density:
    """Return the Density 1 - S + d - mean(d), where d = 2a * importance and the mean is over blocks."""

    def density(importance: np.ndarray, weights: np.ndarray) -> np.ndarray:
        d = 2 * amplitude * importance
        kept: np.ndarray = 1 - target + d - d.mean()
        return kept

    return density


def relative_importance(unimportance: np.ndarray) -> np.ndarray:
    """Return 1 - v / sum(v) for v float64[L] (DLP, arXiv 2505.23807)."""
    importance: np.ndarray = 1 - unimportance / unimportance.sum()
    return importance


def nearest_choice(
    problem: AllocationProblem, density: np.ndarray, notes: tuple[str, ...] = ()
) -> AllocationResult:
    """Return the result with the choice on the budget nearest to target densities float64[U]."""
    ones = np.ones(len(problem.table))
    return AllocationResult(problem.repair(np.clip(density, 0.0, 1.0), ones), notes=notes)


def flat_choice(problem: AllocationProblem, name: str, what: str = "block") -> AllocationResult:
    """Return the result with the uniform choice, and a note that all scores are equal."""
    note = f"sensitivity {name!r} is the same for every {what}, so the allocation is uniform"
    return AllocationResult(problem.uniform(), notes=(note,))


def choose_by_block(
    inputs: AllocationInputs,
    name: str,
    density: Density,
    importance: Callable[[np.ndarray], np.ndarray] = lambda scores: scores,
) -> AllocationResult:
    """Return the result of a rule that gives each block a density by its score.

    Args:
        name: of the sensitivity whose mean over a block is its score.
        density: the rule.
        importance: from the blocks' scores, float64[L], to their importance, float64[L]; by default they are
            equal.

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
