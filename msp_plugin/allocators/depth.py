"""Depth pruning by a ranking: the attentions and MLPs of least influence are dropped."""

from __future__ import annotations

from dataclasses import dataclass

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator
from msp_plugin.allocators.profile import finite_scores


@dataclass(frozen=True)
class Depth(Allocator):
    """The halves whose influence adds up to least are dropped (arXiv 2407.16286), on the exact budget.

    The authors drop so many of the lowest ranked, of one kind or of both. Here the budget is in weights, and an
    attention and an MLP have different numbers of them: the exact minimum of the sum is taken. A level that
    keeps a part of a unit costs its share of the unit's influence. Influences do not add up in a pruned model: ``evopress``
    and ``search`` measure sets.

    Args:
        metric: the estimator of influence: ``block_influence``, ``leave_one_out`` or ``shapley``, with options of their
            own under ``estimators``; or any other one.
    """

    name = "depth"
    seeded = False

    metric: str = "block_influence"

    @property
    def sensitivities(self) -> tuple[str, ...]:  # type: ignore[override] # a class attribute that may be a property
        return (self.metric,)

    def allocate(self, inputs: AllocationInputs) -> AllocationResult:
        problem = inputs.problem
        influence = finite_scores(problem.table, self.metric, inputs.sensitivities[self.metric])
        gone = [1 - kept / unit.weights for unit, kept in zip(problem.table, problem.kept, strict=True)]
        return AllocationResult(problem.solve(influence[:, None] * gone))
