"""Uniform allocation: the same sparsity everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator


@dataclass(frozen=True)
class Uniform(Allocator):
    """One sparsity for all units; where no level has it, the nearest mixture that meets the budget."""

    name = "uniform"
    seeded = False

    def allocate(self, inputs: AllocationInputs) -> AllocationResult:
        return AllocationResult(inputs.problem.uniform())
