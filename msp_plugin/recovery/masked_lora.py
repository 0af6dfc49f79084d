"""Masked LoRA: a low-rank change of the surviving weights, from PERP."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from msp_plugin.recovery.base import RecoveryInputs
from msp_plugin.recovery.masks import Masks
from msp_plugin.recovery.trained import AdapterRecovery, check_positive, check_rank
from msp_plugin.recovery.weight_change import Tensors, WeightChange


class MaskedLowRank(WeightChange):
    """W + (alpha / rank) (B A) * [W != 0], with B [O, rank], A [rank, I]."""

    name = "masked_lora"

    def __init__(self, rank: int, alpha: float):
        self.rank, self.alpha = rank, alpha

    def start(self, layer: str, weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        out, width = weight.shape
        bound = 1 / math.sqrt(width)  # LoRA's and PERP's kaiming_uniform with a = sqrt(5)
        return {
            "a": torch.empty(self.rank, width).uniform_(-bound, bound, generator=generator),
            "b": torch.zeros(out, self.rank),
        }

    def effective(self, weight: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        return torch.addmm(weight, tensors["b"], tensors["a"], alpha=self.alpha / self.rank)

    def gradients(
        self, weight: torch.Tensor, tensors: Tensors, gradient: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        scale = self.alpha / self.rank
        return {"a": scale * (tensors["b"].T @ gradient), "b": scale * (gradient @ tensors["a"].T)}


@dataclass(frozen=True)
class MaskedLoRA(AdapterRecovery):
    """Low-rank changes of all layers that leave the zeros out: W + (alpha / rank) (B A) * [W != 0].

    MaskLoRA of PERP (arXiv 2312.15230), with its rank and alpha; like there, norms and biases are trained too.
    Deviations: KL to the dense model instead of the cross entropy where there is one; the learning rate goes by the
    model's width (5e-4 there, for models of all sizes, which trains small ones too slowly); the
    gradients of A and B come from the masked gradient of the weight, one layer at a time, so that no [O, I] tensor is
    kept (as in LoRS, arXiv 2501.08582); no dropout.

    Args:
        rank, alpha: of the change.
        learning_rate: the highest one, None for 1 / hidden size; see TrainingOptions for the others.
        norms: also train the norms and the biases of the layers.
    """

    name = "masked_lora"

    rank: int = 16
    alpha: float = 32.0
    learning_rate: float | None = None
    norms: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, rank=self.rank, alpha=self.alpha)

    def check_layers(self, masks: Masks) -> None:
        check_rank(self.name, "rank", self.rank, masks)

    def change(self, inputs: RecoveryInputs) -> MaskedLowRank:
        return MaskedLowRank(self.rank, self.alpha)
