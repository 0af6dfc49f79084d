"""What a pruning method keeps of the gradients of the loss by the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.models.offload import linear, onloaded, weight_device
from msp_plugin.passes.gradients import backward_passes
from msp_plugin.passes.observe import in_groups
from msp_plugin.plan.units import Layer, Unit
from msp_plugin.pruning.base import Pruner

#: Bytes of the gradients of one pass over the samples; if there are more, further passes are made.
GRADIENT_BYTES = 4 * 1024**3


def gradient_scores(
    model: torch.nn.Module,
    units: Sequence[Unit],
    pruner: Pruner,
    data: CalibrationSet,
    gradient_bytes: int = GRADIENT_BYTES,
) -> dict[str, torch.Tensor]:
    """Return by layer name what the method keeps of a layer's gradients (see Pruner.gradient_score).

    One backward pass for each sample where all gradients fit into ``gradient_bytes``. Every rank passes all samples, for
    its own units, so that the sums are the same bytes on any number of ranks.

    Raises:
        NumericsError: a sample's loss is not finite.
    """
    layers = [layer for unit in units for layer in unit.layers if pruner.wants_gradient(layer)]

    def need(layer: Layer) -> int:
        return 4 * layer.weights * pruner.gradient_order

    scores: dict[str, torch.Tensor] = {}
    for group in in_groups(layers, need, gradient_bytes):
        sums = _sums(model, [layer.name for layer in group], pruner.gradient_order, data)
        for layer in group:
            gradient, squares = sums.pop(layer.name)
            with onloaded(linear(model, layer.name)) as module:
                scores[layer.name] = pruner.gradient_score(layer, module.weight.detach(), gradient, squares)
    return scores


def _sums(
    model: torch.nn.Module, layers: Sequence[str], order: int, data: CalibrationSet
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return by layer the means over samples of the gradient and of its square, each float32[O, I]."""
    sums = {}
    for name in layers:
        module = linear(model, name)
        zeros = torch.zeros(module.weight.shape, device=weight_device(module))
        sums[name] = (zeros, zeros.clone() if order > 1 else zeros.new_zeros(()).expand_as(zeros))

    def add(number: int, name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
        gradient, squares = sums[name]
        of_sample = dy.float().T @ x.float()
        gradient.add_(of_sample, alpha=1 / len(data))
        if order > 1:
            squares.addcmul_(of_sample, of_sample, value=1 / len(data))

    backward_passes(model, data, layers, add)
    return sums
