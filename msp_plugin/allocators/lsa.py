"""LSA: blocks that a virtual removal harms much become sparser, as published."""

from __future__ import annotations

from dataclasses import dataclass

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator
from msp_plugin.allocators.profile import centred, check_within, choose_by_block, relative_importance


@dataclass(frozen=True)
class LSA(Allocator):
    """Sparsity from the error of a virtual removal (LSA, ICLR 2026; BeiYazi0/LSA).

    With E the error of a virtual greedy removal from a block (see the estimator ``virtual_removal``) its
    importance is I = 1 - E / sum(E), and its sparsity S + mean(d) - d with d = (I - min I) / (max I - min I)
    scaled to [0, 2b]: a large E means sparser. Deviations: the exact budget, clipped densities and equal
    errors, see allocators/profile.py.

    Args:
        amplitude: b, half of the spread; .08 is the default of the authors' code.
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
