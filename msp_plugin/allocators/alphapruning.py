"""AlphaPruning: blocks with lighter-tailed spectra become sparser."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator
from msp_plugin.allocators.profile import check_within, choose_by_block


@dataclass(frozen=True)
class AlphaPruning(Allocator):
    """Sparsity from the shape of the weights' spectra (arXiv 2410.10912; haiquanlu/AlphaPruning).

    The exponents of the blocks (see the estimator ``heavy_tail``) are mapped linearly onto [1 - epsilon, 1 +
    epsilon], and multiplied by the factor that makes the sparsity of the model S, with blocks weighted by
    their weights, as in the authors' code. It needs no text.

    Deviations: the exact budget, clipped densities and equal exponents, see allocators/profile.py. Above
    about S = 1 / (1 + epsilon) a sparsity can exceed 1, and is clipped.

    Args:
        epsilon: half of the range of the factors, in [0, 1].
    """

    name = "alphapruning"
    seeded = False
    sensitivities = ("heavy_tail",)

    epsilon: float = 0.3

    def __post_init__(self) -> None:
        check_within("alphapruning", "epsilon", self.epsilon, 0, 1)

    def allocate(self, inputs: AllocationInputs) -> AllocationResult:
        target = float(inputs.problem.target)

        def density(exponent: np.ndarray, weights: np.ndarray) -> np.ndarray:
            ratio = 1 - self.epsilon + 2 * self.epsilon * exponent
            kept: np.ndarray = 1 - target * ratio * weights.sum() / (weights * ratio).sum()
            return kept

        return choose_by_block(inputs, "heavy_tail", density)
