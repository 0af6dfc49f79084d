"""The trace of the Fisher information matrix, per layer, from per-sample gradients.

Shape legend: B samples of a batch, T tokens, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import RecipeError
from msp_plugin.passes.gradients import BACKWARD, backward_passes
from msp_plugin.progress import Progress, silent
from msp_plugin.sensitivity.base import Estimator


@dataclass(frozen=True)
class FisherTrace(Estimator):
    """Trace of the empirical Fisher information: mean over samples of ||dCE/dW||_F^2 (arXiv 2503.11164).

    CE is the sample's mean next-token cross entropy in nats, so that the unit is nats^2 per squared weight.
    The paper gives neither loss nor sample count; both are ours. The gradients of the weights are not stored:
    for one sample the gradient is dY^T X, and its squared norm comes from that product, layer by layer, or
    from sum((dY dY^T) * (X X^T)) over pairs of tokens (the ghost norm of Li et al., arXiv 2110.05679, eq. 3),
    whichever is cheaper. Samples are passed one at a time, because some models pass the tokens of a batch to
    a linear as one list. Accumulates in float64. Memory: the activations of one sample.

    Args:
        samples: calibration samples that are used, the first ones.
    """

    name = "fisher"
    samples: int = 16

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RecipeError(f"fisher: samples = {self.samples} must be at least 1")

    def forward_tokens(self, data: CalibrationSet) -> int:
        return BACKWARD * sum(map(len, data.samples[: self.samples]))

    def parts(self, data: CalibrationSet) -> tuple[CalibrationSet, ...]:
        return tuple(CalibrationSet((sample,), data.source) for sample in data.samples[: self.samples])

    def layer_sensitivities(
        self,
        model: torch.nn.Module,
        data: CalibrationSet,
        layers: tuple[str, ...],
        progress: Progress = silent,
    ) -> Mapping[str, float]:
        chosen = CalibrationSet(data.samples[: self.samples], data.source)
        totals = {name: torch.zeros((), dtype=torch.float64) for name in layers}

        def add(number: int, name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
            totals[name] += squared_gradient_norms(x[None], dy[None]).sum().cpu()

        backward_passes(model, chosen, layers, add, progress)
        return {name: float(total) / len(chosen) for name, total in totals.items()}


def squared_gradient_norms(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Return the squared Frobenius norms of dY_b^T X_b, float64[B].

    Args:
        x, dy: [B, T, I] and [B, T, O], a layer's inputs and the gradients of its outputs.
    """
    _, t, i = x.shape
    o = dy.shape[-1]
    x, dy = x.float(), dy.float()
    if t * (i + o) < i * o:
        pairs = torch.bmm(x, x.transpose(1, 2)) * torch.bmm(dy, dy.transpose(1, 2))
        return pairs.sum(dim=(1, 2), dtype=torch.float64)
    return torch.bmm(dy.transpose(1, 2), x).square().sum(dim=(1, 2), dtype=torch.float64)
