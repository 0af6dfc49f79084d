"""A trained change of a layer's weight that keeps its zeros, and the linear layer that runs with it.

Shape legend: O out_features, I in_features, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

#: Tensors of a change by name.
Tensors = Mapping[str, torch.Tensor]


class WeightChange(ABC):
    """How the weight of a layer follows from its pruned weight and from trained tensors, which are float32.

    What a subclass computes at the zeros of the pruned weight has no effect: they are put back afterwards.
    """

    name: ClassVar[str]
    #: All subclasses by name, for saved adapters.
    known: ClassVar[dict[str, type[Any]]] = {}

    def __init_subclass__(cls) -> None:
        WeightChange.known[cls.name] = cls

    @abstractmethod
    def start(self, layer: str, weight: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Return new trained tensors of a layer, float32 on the CPU, which do not change its weight [O, I]."""

    @abstractmethod
    def effective(self, weight: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        """Return the changed weight float32[O, I]; ``weight`` is float32[O, I] and must stay as it is."""

    @abstractmethod
    def gradients(
        self, weight: torch.Tensor, tensors: Tensors, gradient: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the gradient of each trained tensor.

        Args:
            weight: float32[O, I], the pruned weight.
            gradient: float32[O, I], of the changed weight; zero where the pruned weight is zero.
        """

    def changes(self, layer: str) -> bool:
        """Return False for a layer that is left as it is."""
        return True

    def fixed(self, layer: str) -> dict[str, torch.Tensor]:
        """Return further tensors of a layer, which ``effective`` gets and training leaves as they are."""
        return {}

    def count(self, layer: str, shape: tuple[int, int]) -> int:
        """Return how many numbers of a layer of (out, in) are trained."""
        weight = torch.empty(shape, device="meta")
        return sum(t.numel() for t in self.start(layer, weight, torch.Generator()).values())

    def options(self) -> dict[str, Any]:
        """Return the arguments that make this change anew from a saved adapter, as JSON can hold them."""
        return dict(vars(self))


def changed_weight(
    change: WeightChange, weight: torch.Tensor, tensors: Tensors, share: float = 1.0
) -> torch.Tensor:
    """Return the changed weight [O, I] in the dtype of ``weight``: computed in float32, then rounded once.

    The zeros of ``weight`` are copied from it, so that they are the same bit for bit whatever was trained.

    Args:
        share: of the change that is applied; 1 is the weight that is trained and merged.
    """
    own = weight.float()
    new = change.effective(own, tensors)
    if share != 1.0:
        new = torch.lerp(own, new, share)
    return torch.where(weight == 0, weight, new.to(weight.dtype))


class ChangedLinear(torch.autograd.Function):
    """A linear layer with a changed weight. Only its input and the trained tensors are kept for the backward pass.

    Autograd alone would keep the changed weight, and for some changes its parts, of every layer, which doubles the
    memory of the weights; here the weight is made once more, as LoRS does (arXiv 2501.08582). The gradient of a
    weight exists for one layer at a time. The rounding to the weight's dtype counts as the identity.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        change: WeightChange,
        names: tuple[str, ...],
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        """Return x W^T + b, [..., O], for x [..., I] and the pruned weight [O, I]."""
        ctx.change, ctx.names = change, names
        ctx.save_for_backward(x, weight, *tensors)
        new = changed_weight(change, weight, dict(zip(names, tensors, strict=True)))
        return torch.nn.functional.linear(x, new, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dy = grad_outputs[0]
        x, weight, *saved = ctx.saved_tensors
        tensors = dict(zip(ctx.names, saved, strict=True))
        needs = dict(zip(ctx.names, ctx.needs_input_grad[5:], strict=True))
        dx = dbias = None
        found: dict[str, torch.Tensor] = {}
        if ctx.needs_input_grad[0]:
            dx = dy @ changed_weight(ctx.change, weight, tensors)
        rows = dy.reshape(-1, dy.shape[-1])
        if any(needs.values()):
            gradient = (rows.T @ x.reshape(-1, x.shape[-1])).float().masked_fill_(weight == 0, 0.0)
            found = ctx.change.gradients(weight.float(), tensors, gradient)
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        return dx, None, dbias, None, None, *(found.get(n) if needs[n] else None for n in ctx.names)
