"""MRP: prune the most redundant block one step, measure anew, repeat.

Shape legend: U units, K levels, L blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator, Choice
from msp_plugin.allocators.profile import block_means, blocks_of, check_within, finite_scores
from msp_plugin.plan.budget import AllocationProblem

#: How dear it is to move a unit of the block that was pruned last, where the others cost 1: that block
#: takes up what the last step overshot.
LAST_GIVES_WAY = 1e-6


@dataclass(frozen=True)
class MRP(Allocator):
    """Maximum redundancy pruning (arXiv 2503.18377, a reconstruction from its abstract).

    All blocks start at a low sparsity. Each step measures every block's share of non-outliers in the model
    as it is pruned so far (1 minus the estimator ``outliers``), and prunes the block with the largest one
    level further; so that at the end the blocks are about equally redundant. Deviations, or ours where the
    paper could not be read: the start; a step is one level of the menu in all units of a block, or the
    units' own next level where bounds say so; of equally redundant blocks the densest goes first, then the
    first; the last step is cut to the exact budget, its own block giving way first; weights come from the
    level database, pruned from the dense model's inputs.

    Args:
        start: share of the target sparsity at which all units start, each at its level below it.
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
            scores = finite_scores(table, "outliers", inputs.estimate("outliers", choice))
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
    """Return of each unit the sparsest allowed level up to a sparsity; its densest if none is below."""
    choice = []
    for u, unit in enumerate(problem.table):
        levels, kept = _allowed(problem, u), problem.kept[u]
        below = [k for k in levels if kept[k] >= (1 - sparsity) * unit.weights * (1 - 1e-12)]
        choice.append(min(below, key=kept.__getitem__) if below else max(levels, key=kept.__getitem__))
    return tuple(choice)


def next_levels(problem: AllocationProblem, choice: Choice) -> Choice:
    """Return of each unit the densest allowed level below its own; its own if there is none."""
    found = []
    for u, current in enumerate(choice):
        below = [k for k in _allowed(problem, u) if problem.kept[u, k] < problem.kept[u, current]]
        found.append(max(below, key=lambda k: (problem.kept[u, k], -k), default=current))
    return tuple(found)


def on_budget(problem: AllocationProblem, choice: Choice, gives_way: np.ndarray) -> Choice:
    """Return the choice on the budget that is nearest to another one.

    Args:
        gives_way: bool[U], the units that move first.
    """
    if problem.total_kept(choice) == problem.budget.kept:
        return choice
    sizes = np.array([unit.weights for unit in problem.table], dtype=np.float64)
    share = problem.kept[np.arange(len(choice)), list(choice)] / sizes
    return problem.repair(share, np.where(gives_way, LAST_GIVES_WAY, 1.0))


def _allowed(problem: AllocationProblem, u: int) -> list[int]:
    levels = range(len(problem.menu))
    return list(levels) if problem.allowed is None else [k for k in levels if problem.allowed[u, k]]
