"""The squared change of a layer's weight at each level, weighted with the diagonal of the Fisher information.

Shape legend: T tokens of a sample, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.models.offload import linear, onloaded, weight_device
from msp_plugin.passes.gradients import backward_passes
from msp_plugin.passes.observe import in_groups
from msp_plugin.progress import Progress, silent
from msp_plugin.runtime.journal import Journal
from msp_plugin.runtime.ranks import ALONE, Ranks

#: Bytes of the Fisher diagonals of one pass over the samples; if there are more, further passes are made.
DIAGONAL_BYTES = 4 * 1024**3


def fisher_errors(
    model: torch.nn.Module,
    data: CalibrationSet,
    layers: Sequence[str],
    levels: Sequence[str],
    weight: Callable[[str, str], torch.Tensor],
    *,
    diagonal_bytes: int = DIAGONAL_BYTES,
    progress: Progress = silent,
    journal: Journal | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, dict[str, float]]:
    """Return T/2 sum_i F_ii (w_i - w_i(level))^2 by layer and level, nats per token.

    F_ii, the diagonal of the empirical Fisher information, is the mean over samples of the squared gradient
    of a sample's mean cross entropy. The factor T, the tokens of a sample, makes it the information of one
    token, as if the gradients of tokens were uncorrelated. The sum then approximates the growth of the loss
    per token to second order (Kirkpatrick et al., arXiv 1612.00796, eq. 3; LLM-Pruner, arXiv 2305.11627, eq.
    5).

    Args:
        weight: ``weight(layer, level)`` returns the weight [O, I] of a layer at a level.
        journal: keeps measured groups of layers for a later run; None keeps nothing.
        ranks: share the samples, and the layers of a group.
    """
    journal = Journal(None, {}) if journal is None else journal
    result: dict[str, dict[str, float]] = {}
    groups = diagonal_groups(model, layers, diagonal_bytes)
    for done, group in enumerate(groups):

        def measure(group: list[str] = group, done: int = done) -> dict[str, dict[str, float]]:
            report = _part(progress, done, len(groups))
            diagonals = fisher_diagonals(model, data, group, report, ranks)
            errors = ranks.map(lambda layer: _errors(model, layer, diagonals[layer], levels, weight), group)
            return dict(zip(group, errors, strict=True))

        result |= journal.get(" ".join(group), measure)
    return result


def diagonal_groups(
    model: torch.nn.Module, layers: Sequence[str], diagonal_bytes: int = DIAGONAL_BYTES
) -> list[list[str]]:
    """Return groups of layers whose diagonals fit into ``diagonal_bytes``; each costs one pass."""
    return list(in_groups(layers, lambda layer: 4 * linear(model, layer).weight.numel(), diagonal_bytes))


def _errors(
    model: torch.nn.Module,
    layer: str,
    diagonal: torch.Tensor,
    levels: Sequence[str],
    weight: Callable[[str, str], torch.Tensor],
) -> dict[str, float]:
    """Return one layer's error at each level (see fisher_errors).

    Args:
        diagonal: float32[O, I], T times the diagonal of the Fisher information.
    """
    with onloaded(linear(model, layer)) as module:
        dense = module.weight.detach().float()
        return {
            level: 0.5 * float((diagonal * (dense - weight(layer, level).to(dense)).square()).sum())
            for level in levels
        }


def fisher_diagonals(
    model: torch.nn.Module,
    data: CalibrationSet,
    layers: Sequence[str],
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> dict[str, torch.Tensor]:
    """Return T times the mean over samples of the squared gradient, float32[O, I] by layer name.

    Ranks share the samples.
    """
    own = data.of_rank(ranks)
    modules = {layer: linear(model, layer) for layer in layers}
    totals = {
        layer: torch.zeros(module.weight.shape, device=weight_device(module))
        for layer, module in modules.items()
    }

    def add(number: int, name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
        gradient = dy.float().T @ x.float()
        tokens = len(own.samples[number])  # not len(x): an expert sees some of them
        totals[name].addcmul_(gradient, gradient, value=tokens / len(data))

    ranks.gather(lambda: backward_passes(model, own, layers, add, progress))
    return {layer: ranks.all_reduce_sum(total) for layer, total in totals.items()}


def _part(progress: Progress, index: int, count: int) -> Progress:
    return lambda done, total: progress(index * total + done, count * total)
