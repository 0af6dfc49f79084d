"""The allocation with the exact minimum of an additive surrogate of the loss."""

from __future__ import annotations

from dataclasses import dataclass

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator
from msp_plugin.errors import RecipeError

SURROGATES = ("fisher", "kfac", "output", "weight", "kl")


@dataclass(frozen=True)
class Knapsack(Allocator):
    """The exact minimum of a surrogate loss that is a sum over the units, by dynamic programming.

    The problem of HIGGS (arXiv 2411.17525, eq. 9) and Puzzle (arXiv 2411.19146, section 3.3). The true loss
    of a pruned model is not such a sum (EvoPress, arXiv 2410.14649, section 3.1), so that the result may be
    worse than uniform.

    Args:
        surrogate: ``fisher``: squared weight change, weighted with the Fisher diagonal; ``kfac``: squared change
            of the layers' outputs, weighted with the Fisher information of each output; ``output``: mean
            squared change of the layers' outputs; ``weight``: squared weight change; ``kl``: KL divergence
            from the dense model of the model with one pruned unit, which takes units x levels measurements.
        tokens: held-out calibration tokens of each measurement of ``kl``.
    """

    name = "knapsack"
    seeded = False
    needs_database = True

    surrogate: str = "fisher"
    tokens: int = 4096

    def __post_init__(self) -> None:
        if self.surrogate not in SURROGATES:
            raise RecipeError(
                f"knapsack: surrogate {self.surrogate!r} is unknown", hint=f"use {', '.join(SURROGATES)}"
            )
        if self.tokens < 1:
            raise RecipeError(f"knapsack: tokens = {self.tokens} must be at least 1")

    @property
    def errors(self) -> tuple[str, ...]:  # type: ignore[override] # a class attribute that may be a property
        return (self.surrogate,)

    @property
    def measures(self) -> bool:  # type: ignore[override]
        return self.surrogate == "kl"

    def allocate(self, inputs: AllocationInputs) -> AllocationResult:
        return AllocationResult(inputs.problem.solve(inputs.errors[self.surrogate]))
