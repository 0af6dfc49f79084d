"""OWL: blocks with more outliers stay denser."""

from __future__ import annotations

from dataclasses import dataclass

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator
from msp_plugin.allocators.profile import centred, check_within, choose_by_block


@dataclass(frozen=True)
class OWL(Allocator):
    """Outlier-weighed layerwise sparsity (arXiv 2310.05175; luuyin/OWL).

    A block's density is 1 - S + r - mean(r), where r = 2 lambda (D - min D) / (max D - min D) and D is the
    share of its outliers (see the estimator ``outliers``). Deviations: the exact budget, clipped densities
    and equal D, see allocators/profile.py. For N:M the authors' code requires 50 % and rounds N by a rule of
    its own; here the levels nearest to the densities are taken.

    Args:
        amplitude: lambda, in [0, 1]: half of the range of the densities.
    """

    name = "owl"
    seeded = False
    sensitivities = ("outliers",)

    amplitude: float = 0.08

    def __post_init__(self) -> None:
        check_within("owl", "amplitude", self.amplitude, 0, 1)

    def allocate(self, inputs: AllocationInputs) -> AllocationResult:
        return choose_by_block(inputs, "outliers", centred(self.amplitude, float(inputs.problem.target)))
