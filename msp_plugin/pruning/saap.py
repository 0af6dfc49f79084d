"""SAAP: fuse two of LLM-Pruner's scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from msp_plugin.errors import RecipeError
from msp_plugin.plan.units import Layer
from msp_plugin.pruning import llm_pruner, masks, structured
from msp_plugin.pruning.llm_pruner import layer_taylor_scores
from msp_plugin.pruning.structured import HalfInputs, StructuredPruner
from msp_plugin.structure import scores


@dataclass(frozen=True)
class SAAP(StructuredPruner):
    """SAAP (arXiv 2412.15127): the vector-wise and the element-wise score of a group, weighed against each other.

    The paper divides each score by twice the variance of its noise; how it learns the two variances is not published, nor
    any code. A common factor changes no ranking, so that only their ratio matters, which is an option here; both scores
    are first given mean 0 and deviation 1 over the groups of a half. Its indicator of how a score fluctuates, which gives
    each layer a ratio, and its training with quantized weights are not published in enough detail: the ratio is the
    allocation's choice, training that of the recoveries.

    Args:
        elements: weight of the element-wise score beside the vector-wise one's 1.
    """

    name = "saap"
    arithmetic = (masks, structured, scores, llm_pruner)
    gradient_order = 1

    elements: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.elements < math.inf:
            raise RecipeError(f"{self.name}: elements = {self.elements}", hint="give a number of at least 0")

    def gradient_score(
        self, layer: Layer, weight: torch.Tensor, gradient: torch.Tensor, squares: torch.Tensor
    ) -> torch.Tensor:
        """Return float64[2, G], the vector-wise and the element-wise score of one layer's groups."""
        both = (layer_taylor_scores(layer, weight, gradient, squares, name) for name in ("vector", "first"))
        return torch.stack(list(both))

    def group_scores(self, half: HalfInputs) -> torch.Tensor:
        found = torch.stack([part.score for part in half.layers if part.score is not None]).sum(dim=0)
        scaled = (found - found.mean(dim=1, keepdim=True)) / found.std(dim=1, keepdim=True).clamp_min(1e-30)
        return scaled[0] + self.elements * scaled[1]
