"""Training of all surviving weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from msp_plugin.recovery.base import RecoveryInputs
from msp_plugin.recovery.trained import AdapterRecovery
from msp_plugin.recovery.weight_change import Tensors, WeightChange


class FullWeight(WeightChange):
    """The weight itself, in float32 whatever the model's dtype. At the zeros it and its gradient are zero.

    So AdamW's moments stay zero there, and its decay has nothing to decay.
    """

    name = "full"

    def start(self, layer: str, weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"weight": weight.detach().float().clone()}

    def effective(self, weight: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        return tensors["weight"]

    def gradients(
        self, weight: torch.Tensor, tensors: Tensors, gradient: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return {"weight": gradient}


@dataclass(frozen=True)
class Full(AdapterRecovery):
    """Training of all surviving weights, and of norms and biases, with masked gradients.

    The retraining with which PERP (arXiv 2312.15230) compares its adapters. The learning rate is ours, for about one
    million tokens. Memory: four float32 numbers for each weight beside the model's own (value, gradient, two moments).
    A bfloat16 model trains float32 copies, because AdamW's steps are below what bfloat16 can add.

    Args:
        learning_rate: the highest one; see TrainingOptions for the others.
        norms: also train the norms and the biases of the layers.
    """

    name = "full"

    learning_rate: float = 1e-4
    norms: bool = True

    def change(self, inputs: RecoveryInputs) -> FullWeight:
        return FullWeight()
