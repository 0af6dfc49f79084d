"""DLP: blocks with a large median of |W| * ||X|| become sparser."""

from __future__ import annotations

from dataclasses import dataclass

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator
from msp_plugin.allocators.profile import centred, check_within, choose_by_block, relative_importance


@dataclass(frozen=True)
class DLP(Allocator):
    """Dynamic layerwise pruning (arXiv 2505.23807).

    A block's importance is I = 1 - m / sum(m), where m is the median of |W| * ||X|| over the block (see the
    estimator ``median``). Its sparsity is S + mean(d) - d with d = 2a (I - min I) / (max I - min I).
    Deviations: the exact budget, clipped densities and equal medians, see allocators/profile.py.

    Args:
        amplitude: a, in [0, 1]; .15 is the authors' value at 70 % sparsity.
    """

    name = "dlp"
    seeded = False
    sensitivities = ("median",)

    amplitude: float = 0.15

    def __post_init__(self) -> None:
        check_within("dlp", "amplitude", self.amplitude, 0, 1)

    def allocate(self, inputs: AllocationInputs) -> AllocationResult:
        density = centred(self.amplitude, float(inputs.problem.target))
        return choose_by_block(inputs, "median", density, relative_importance)
