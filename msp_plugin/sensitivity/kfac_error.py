"""The squared change of a layer's output at each level, weighted by output feature with the Fisher information.

Shape legend: T tokens of a sample, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.models.offload import linear, weight_device
from msp_plugin.passes.gradients import backward_passes
from msp_plugin.progress import Progress, silent
from msp_plugin.runtime.journal import Journal
from msp_plugin.runtime.ranks import ALONE, Ranks


def kfac_errors(
    model: torch.nn.Module,
    data: CalibrationSet,
    layers: Sequence[str],
    levels: Sequence[str],
    row_errors: Callable[[str, str], torch.Tensor],
    *,
    progress: Progress = silent,
    journal: Journal | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, dict[str, float]]:
    """Return 1/2 sum_o g_o d_o H d_o^T by layer and level, nats per token.

    d_o is the change of row o of the weight, H the mean over tokens of x x^T for the inputs x of the layer, and g_o
    the mean over tokens of the squared gradient, with respect to output o, of T times a sample's mean cross entropy.
    H and g are the Kronecker factors of the layer's Fisher information (Martens and Grosse, K-FAC, arXiv 1503.05671,
    section 3): inputs and gradients are taken as independent, and the gradients of different tokens as uncorrelated.
    Unlike ``fisher_errors``, the sum sees that the changes of a row's weights make up for each other, as SparseGPT's
    do.

    Deviations: the factor of the outputs is its diagonal, because the whole one gives nearly the same sums and takes
    O^2 numbers; the labels are those of the text, as in ``fisher_errors``, where the paper draws them from the
    model, because the allocations are as good; nothing is damped, because nothing is inverted; H is the pruning
    method's, whose inputs may come from pruned blocks and whose features may be taken as uncorrelated.

    Args:
        row_errors: ``row_errors(layer, level)`` returns d_o H d_o^T, float[O].
        journal: keeps the result for a later run; None keeps nothing.
        ranks: share the samples.
    """
    journal = Journal(None, {}) if journal is None else journal

    def measure() -> dict[str, dict[str, float]]:
        squares = output_gradient_squares(model, data, layers, progress, ranks)
        return {
            layer: {
                level: 0.5 * float(row_errors(layer, level).double() @ squares[layer]) for level in levels
            }
            for layer in layers
        }

    errors: dict[str, dict[str, float]] = journal.get("all layers", measure)
    return errors


def output_gradient_squares(
    model: torch.nn.Module,
    data: CalibrationSet,
    layers: Sequence[str],
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> dict[str, torch.Tensor]:
    """Return the mean over tokens of the squared gradient of each output, float64[O] on the CPU by layer name.

    The loss is T times a sample's mean cross entropy. Ranks share the samples.
    """
    own = data.of_rank(ranks)
    modules = {layer: linear(model, layer) for layer in layers}
    totals = {
        layer: torch.zeros(len(module.weight), dtype=torch.float64, device=weight_device(module))
        for layer, module in modules.items()
    }

    def add(number: int, name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
        tokens = len(own.samples[number])  # not len(dy): an expert sees some of them
        squares = dy.float().square().sum(dim=0, dtype=torch.float64)
        totals[name].add_(squares, alpha=tokens**2 / data.tokens)

    ranks.gather(lambda: backward_passes(model, own, layers, add, progress))
    return {layer: ranks.all_reduce_sum(total).cpu() for layer, total in totals.items()}
