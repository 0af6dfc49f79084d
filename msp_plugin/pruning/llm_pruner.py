"""LLM-Pruner: remove the heads and channels that a Taylor series of the loss says matter least."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from msp_plugin.plan.units import Layer
from msp_plugin.pruning import masks, structured
from msp_plugin.pruning.masks import groups_of
from msp_plugin.pruning.structured import HalfInputs, StructuredPruner
from msp_plugin.structure import scores
from msp_plugin.structure.scores import gradient_order, taylor_scores


@dataclass(frozen=True)
class LLMPruner(StructuredPruner):
    """LLM-Pruner (arXiv 2305.11627): keep the groups whose removal would change the loss most, by its gradients.

    The scores of the channels of a group are added up over all layers of the half (its ``sum``). Gradients are those of the
    dense model on all calibration samples, one backward pass for each.

    Deviations: see taylor_scores; how many groups go is the allocation's choice, where the paper takes one share for
    blocks 4 to 29 (``protect`` the others, and ``allocator: uniform``, for that); widths come in whole KV heads and in
    multiples of ``quantum`` channels.

    Args:
        taylor: ``first`` (its default), ``second``, ``mixed`` or ``vector``.
    """

    name = "llm_pruner"
    arithmetic = (masks, structured, scores)

    taylor: str = "first"

    def __post_init__(self) -> None:
        gradient_order(self.taylor)

    @property
    def gradient_order(self) -> int:
        return gradient_order(self.taylor)

    def gradient_score(
        self, layer: Layer, weight: torch.Tensor, gradient: torch.Tensor, squares: torch.Tensor
    ) -> torch.Tensor:
        """Return float64[G] (see taylor_scores)."""
        return layer_taylor_scores(layer, weight, gradient, squares, self.taylor)

    def group_scores(self, half: HalfInputs) -> torch.Tensor:
        return torch.stack([part.score for part in half.layers if part.score is not None]).sum(dim=0)


def layer_taylor_scores(
    layer: Layer, weight: torch.Tensor, gradient: torch.Tensor, squares: torch.Tensor, score: str
) -> torch.Tensor:
    """Return float64[G], the scores of the groups of one layer, whose matrices are [O, I]."""
    first, second, third = (groups_of(matrix, layer) for matrix in (weight, gradient, squares))
    return taylor_scores(first, second, third, score)
