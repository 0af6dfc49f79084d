"""LSA: blocks with a large error of a virtual removal become sparser, as published."""

from __future__ import annotations

from dataclasses import dataclass

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator
from msp_plugin.allocators.profile import centred, check_within, choose_by_block, relative_importance


@dataclass(frozen=True)
class LSA(Allocator):
    """Sparsity from the error of a virtual removal (LSA, ICLR 2026; BeiYazi0/LSA).

    A block's importance is I = 1 - E / sum(E), where E is the error of a virtual greedy removal from it (see
    the estimator ``virtual_removal``). Its sparsity is S + mean(d) - d with d = 2b (I - min I) / (max I - min
    I), so that a larger E makes it sparser. Deviations: the exact budget, clipped densities and equal errors,
    see allocators/profile.py.

    Args:
        amplitude: b, in [0, 1]; .08 is the default of the authors' code.
    """

    name = "lsa"
    seeded = False
    sensitivities = ("virtual_removal",)

    amplitude: float = 0.08

    def __post_init__(self) -> None:
        check_within("lsa", "amplitude", self.amplitude, 0, 1)

    def allocate(self, inputs: AllocationInputs) -> AllocationResult:
        density = centred(self.amplitude, float(inputs.problem.target))
        return choose_by_block(inputs, "virtual_removal", density, relative_importance)
