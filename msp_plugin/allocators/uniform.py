"""Uniform allocation: one sparsity for all units."""

from __future__ import annotations

from dataclasses import dataclass

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator


@dataclass(frozen=True)
class Uniform(Allocator):
    """One sparsity for all units; if no level has it, the nearest mixture of levels on the budget.

    With ``dropped`` in the menu, what is dropped is spread evenly over the model: of equal blocks each n-th one.
    """

    name = "uniform"
    seeded = False

    def allocate(self, inputs: AllocationInputs) -> AllocationResult:
        return AllocationResult(inputs.problem.uniform())
