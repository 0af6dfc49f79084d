"""MRP: prune the most redundant block one step, measure anew, repeat.

Shape legend: U units, K levels, L blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator, Choice
from msp_plugin.allocators.profile import block_means, blocks_of, check_within, finite_scores
from msp_plugin.plan.budget import AllocationProblem

#: Price of moving a unit of the block that was pruned last (see AllocationProblem.repair), where all others
#: have 1: that block corrects the overshoot of the last step.
LAST_PRICE = 1e-6


@dataclass(frozen=True)
class MRP(Allocator):
    """Maximum redundancy pruning (arXiv 2503.18377, a reconstruction from its abstract).

    All blocks start at a low sparsity. Each step measures the redundancy of every block in the model as
    pruned so far, which is 1 minus the estimator ``outliers``, and prunes the most redundant block by one
    more level. At the end the blocks are about equally redundant.

    Ours, because the paper's text was not available: the start; a step moves all units of a block to their
    next sparser allowed level; of equally redundant blocks the densest is pruned first, then the first; the
    last step is corrected to the exact budget, mostly in its own block; weights come from the level database,
    pruned from the inputs behind uniformly pruned blocks.

    Args:
        start: share of the target sparsity, in [0, 1], at which the units start, each at the nearest level
            below.
    """

    name = "mrp"
    seeded = False
    sensitivities = ("outliers",)
    needs_database = True
    remeasures = True

    start: float = 0.5

    def __post_init__(self) -> None:
        check_within("mrp", "start", self.start, 0, 1)

    def allocate(self, inputs: AllocationInputs) -> AllocationResult:
        problem, table = inputs.problem, inputs.problem.table
        positions, weights = blocks_of(table)
        choice = start_choice(problem, self.start * float(problem.target))
        first = problem.total_kept(choice)
        goal, last, measured = problem.budget.kept, -1, 0
        while problem.total_kept(choice) > goal:
            scores = finite_scores(table, "outliers", inputs.remeasured("outliers", choice))
            measured += 1
            sparser = next_levels(problem, choice)
            redundancy = 1 - block_means(table, scores)
            kept = np.bincount(positions, problem.kept[np.arange(len(choice)), list(choice)]) / weights
            moves = [u for u in range(len(choice)) if sparser[u] != choice[u]]
            last = max({int(positions[u]) for u in moves}, key=lambda b: (redundancy[b], kept[b], -b))
            choice = tuple(
                after if block == last else before
                for before, after, block in zip(choice, sparser, positions, strict=True)
            )
            inputs.progress(min(first - problem.total_kept(choice), first - goal), first - goal)
        return AllocationResult(on_budget(problem, choice, positions == last), evaluations=measured)


def start_choice(problem: AllocationProblem, sparsity: float) -> Choice:
    """Return int[U], each unit's sparsest allowed level up to a sparsity; its densest if all are sparser."""
    choice = []
    for u, unit in enumerate(problem.table):
        levels, kept = _allowed(problem, u), problem.kept[u]
        below = [k for k in levels if kept[k] >= (1 - sparsity) * unit.weights * (1 - 1e-12)]
        choice.append(min(below, key=kept.__getitem__) if below else max(levels, key=kept.__getitem__))
    return tuple(choice)


def next_levels(problem: AllocationProblem, choice: Choice) -> Choice:
    """Return int[U], each unit's next sparser allowed level after ``choice``; its own if there is none."""
    levels = []
    for u, current in enumerate(choice):
        below = [k for k in _allowed(problem, u) if problem.kept[u, k] < problem.kept[u, current]]
        levels.append(max(below, key=lambda k: (problem.kept[u, k], -k), default=current))
    return tuple(levels)


def on_budget(problem: AllocationProblem, choice: Choice, moves_first: np.ndarray) -> Choice:
    """Return the choice on the budget, int[U], that is nearest to another choice.

    Args:
        moves_first: bool[U], True for the units that move first.
    """
    if problem.total_kept(choice) == problem.budget.kept:
        return choice
    sizes = np.array([unit.weights for unit in problem.table], dtype=np.float64)
    share = problem.kept[np.arange(len(choice)), list(choice)] / sizes
    return problem.repair(share, np.where(moves_first, LAST_PRICE, 1.0))


def _allowed(problem: AllocationProblem, u: int) -> list[int]:
    """Return the indices of the levels that a unit may take."""
    return [k for k, may in enumerate(problem.may[u]) if may]
