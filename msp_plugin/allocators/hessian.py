"""One-shot sensitivity-aware mixed sparsity: units of large curvature stay denser."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator
from msp_plugin.allocators.profile import check_within, finite_scores, flat_choice, nearest_choice


@dataclass(frozen=True)
class OneShot(Allocator):
    """Density from the rank of the Hessian's trace per weight (arXiv 2310.09499).

    The units are ranked by the trace of the Hessian of the cross entropy, divided by their count of weights
    (see the estimator ``hessian_trace``), and the ranks are mapped linearly onto densities in [1 - S - a, 1 -
    S + a]. Any pruning method can follow; the paper's own criterion is not a part of this.

    Deviations: a unit may hold several matrices that inference fuses (``granularity: layer`` gives the
    paper's units). Units with equal sensitivity get the mean of their ranks. The authors' budget is
    approximate, ours is exact, see allocators/profile.py.

    Args:
        amplitude: a, in [0, 1].
    """

    name = "one_shot"
    seeded = False
    sensitivities = ("hessian_trace",)

    amplitude: float = 0.1

    def __post_init__(self) -> None:
        check_within("one_shot", "amplitude", self.amplitude, 0, 1)

    def allocate(self, inputs: AllocationInputs) -> AllocationResult:
        problem = inputs.problem
        trace = finite_scores(problem.table, "hessian_trace", inputs.sensitivities["hessian_trace"])
        per_weight = trace / np.array([unit.weights for unit in problem.table], dtype=np.float64)
        if per_weight.max() == per_weight.min():
            return flat_choice(problem, "hessian_trace", "weight of every unit")
        rank = mean_ranks(per_weight)
        density = 1 - float(problem.target) + self.amplitude * (2 * rank / (len(rank) - 1) - 1)
        return nearest_choice(problem, density)


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks, from 0, of values float64[n]; equal values share the mean of their ranks."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[group.reshape(-1)]
