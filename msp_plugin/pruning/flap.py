"""FLAP: remove the heads and channels whose outputs vary least over the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from msp_plugin.pruning import masks, structured
from msp_plugin.pruning.structured import HalfInputs, StructuredPruner


@dataclass(frozen=True)
class FLAP(StructuredPruner):
    """FLAP (arXiv 2312.11983, equations 5 and 6): keep the channels with the largest weighted fluctuation.

    A channel j of the last layer's inputs scores var(x_j) |W_:j|^2; a head the mean over its channels, of the squares of
    that, as in the authors' code.

    Deviations: the bias that makes up for the mean of what goes is a recovery of its own, ``mean_update``, as the level
    database holds weights alone (``obs`` makes up for it in the weights that stay); KV heads are scored with their
    query heads, which the authors' code does not support; one threshold over all layers is the allocation's choice.
    """

    name = "flap"
    arithmetic = (masks, structured)

    def group_scores(self, half: HalfInputs) -> torch.Tensor:
        last = half.output
        fluctuation = last.inputs.variance * last.weight.double().square().sum(dim=0)
        channels = fluctuation.view(half.groups, -1)
        return (channels.square() if channels.shape[1] > 1 else channels).mean(dim=1)
