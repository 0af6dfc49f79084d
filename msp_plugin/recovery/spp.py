"""SPP: a change of each surviving weight in proportion to itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from msp_plugin.recovery.base import RecoveryInputs
from msp_plugin.recovery.masks import Masks
from msp_plugin.recovery.trained import AdapterRecovery, check_positive, check_rank
from msp_plugin.recovery.weight_change import Tensors, WeightChange


class Proportional(WeightChange):
    """W * (1 + scale b_i A[g(i), j]), with a row of A [G, I] for each of G groups of neighbouring rows, and b [O]."""

    name = "spp"

    def __init__(self, groups: int, scale: float):
        self.groups, self.scale = groups, scale

    def start(self, layer: str, weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        out, width = weight.shape
        bound = 1 / math.sqrt(width)  # the authors' kaiming_uniform with a = sqrt(5)
        return {
            "a": torch.empty(self.groups, width).uniform_(-bound, bound, generator=generator),
            "b": torch.zeros(out),
        }

    def _group(self, out: int, device: torch.device) -> torch.Tensor:
        """Return the group of each row, int64[O]."""
        return torch.arange(out, device=device) * self.groups // out

    def effective(self, weight: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        rows = tensors["a"][self._group(len(weight), weight.device)]
        return torch.addcmul(weight, rows * tensors["b"][:, None], weight, value=self.scale)

    def gradients(
        self, weight: torch.Tensor, tensors: Tensors, gradient: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        group = self._group(len(weight), weight.device)
        gradient = self.scale * gradient * weight
        a, b = tensors["a"], tensors["b"]
        return {
            "a": torch.zeros_like(a).index_add_(0, group, gradient * b[:, None]),
            "b": (gradient * a[group]).sum(1),
        }


@dataclass(frozen=True)
class SPP(AdapterRecovery):
    """Changes of the surviving weights in proportion to themselves: W + scale (diag(b) repeat(A)) * W.

    SPP (arXiv 2405.16057), as in the authors' code. The learning rate, the weight decay and the scale (alpha 16 over
    rank 8) are its defaults, for three epochs of 52,000 instructions. Deviations: the count of groups
    is an option (16 in the code, which then refuses layers whose rows it does not divide: here row i is in group
    floor(i groups / out)); KL to the dense model instead of the cross entropy where there is one; no dropout (0.05
    there); merged once, in float32.

    Args:
        groups: rows of A; each is shared by out / groups neighbouring rows of the weight.
        scale: of the change.
        learning_rate: the highest one; see TrainingOptions for the others.
        norms: also train the norms and the biases of the layers, as the authors do not.
    """

    name = "spp"

    groups: int = 16
    scale: float = 2.0
    learning_rate: float = 4e-3
    weight_decay: float = 1e-3
    norms: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, groups=self.groups, scale=self.scale)

    def check_layers(self, masks: Masks) -> None:
        check_rank(self.name, "groups", self.groups, masks)

    def change(self, inputs: RecoveryInputs) -> Proportional:
        return Proportional(self.groups, self.scale)
