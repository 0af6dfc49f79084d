"""Weight update: the best surviving weights of each layer for its own output, by conjugate gradients.

Shape legend: O out_features, I in_features, B samples, T tokens, D hidden size, N tokens of a batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.models.layers import decoder_blocks
from msp_plugin.models.offload import linear
from msp_plugin.models.weights import Weights
from msp_plugin.passes.observe import units_of
from msp_plugin.plan.units import Unit
from msp_plugin.recovery.base import (
    Recovery,
    RecoveryInputs,
    RecoveryResult,
    check_in_memory,
    check_runs_by_block,
)
from msp_plugin.recovery.masks import Masks
from msp_plugin.recovery.shared import mean_kl
from msp_plugin.recovery.windows import Window
from msp_plugin.runtime.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moments:
    """Sums over tokens of products of a layer's inputs, float32: x of the sparse model, x' of the dense one.

    Args:
        own: [I, I], of x x^T.
        cross: [I, I], of x' x^T.
    """

    own: torch.Tensor
    cross: torch.Tensor


def conjugate_gradients(
    start: torch.Tensor,
    kept: torch.Tensor,
    hessian: torch.Tensor,
    target: torch.Tensor,
    iterations: int,
) -> torch.Tensor:
    """Return the weights W [O, I], zero where they are not kept, that minimise tr(W H W^T) - 2 tr(W G^T) row by row.

    ALPS (arXiv 2406.07831), algorithm 2: the gradients are set to zero outside of the support, and the diagonal of H is
    the preconditioner. Deviation: each row has its own step lengths, as the rows are problems of their own.

    Args:
        start: [O, I], where the iteration begins.
        kept: bool[O, I].
        hessian: H, [I, I], positive definite.
        target: G, [O, I].
        iterations: at most; I of them are exact but for rounding.
    """
    scale = hessian.diagonal().rsqrt()
    hessian = hessian * scale[:, None] * scale
    weight = start * kept / scale
    residual = (target * scale - weight @ hessian) * kept
    direction, norm = residual, residual.square().sum(1)
    least = norm * torch.finfo(norm.dtype).eps ** 2
    for _ in range(iterations):
        image = (direction @ hessian) * kept
        curvature = (direction * image).sum(1)
        live = (norm > least) & (curvature > 0)
        if not bool(live.any()):
            break
        step = torch.where(live, norm / curvature, 0)[:, None]
        weight = weight + step * direction
        residual = residual - step * image
        new = residual.square().sum(1)
        direction = residual + torch.where(live, new / norm, 0)[:, None] * direction
        norm = new
    return weight * scale


@dataclass(frozen=True)
class WeightUpdate(Recovery):
    """Solves each layer's least squares with its zeros fixed, by conjugate gradients (ALPS, arXiv 2406.07831).

    With x the inputs of the model as recovered so far, x' those of the dense model and W' the dense weight, each layer
    minimises sum |W x - W' x'|^2 + damping * mean(x_i^2) * tokens * |W - W_now|^2 over its surviving weights. Layers are
    done in the order in which they run, those with one input together. Nothing but prunable layers' weights changes.

    Deviations from ALPS: the target is the dense layer's output on the dense model's inputs, not on the pruned one's;
    damping pulls to the weight before, not to zero; hold-out samples may refuse an update.

    Args:
        iterations: of the conjugate gradients.
        damping: share of the inputs' mean square that holds the weights where they are.
    """

    name = "weight_update"
    same_depth = True
    same_shapes = True
    by_block = True

    iterations: int = 60
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.iterations < 1 or not 0 < self.damping < math.inf:
            raise RecipeError("weight_update: iterations must be at least 1 and damping above 0")

    def check(self, model: PreTrainedModel, masks: Masks) -> None:
        check_in_memory(self.name, model)

    @torch.no_grad()
    def recover(self, inputs: RecoveryInputs) -> RecoveryResult:
        """Change the surviving weights of the model in place (see Recovery.recover).

        Raises:
            ModelError: the model hands more than the hidden state from block to block.
            NumericsError: an input of a layer is not finite.
        """
        model, original = inputs.model, inputs.original
        assert original is not None, "the caller gives the original, because needs_original is True"
        check_runs_by_block(self, model, inputs.data.samples[0])
        curve, notes, tokens = [(0, self._kl(inputs, original))], [], 0
        walks = [
            _Walk(model, original, list(part.batches(inputs.batch_tokens)), inputs.ranks)
            for part in (inputs.data, inputs.holdout)
        ]
        units = units_of(model, list(inputs.masks))
        blocks = len(decoder_blocks(model)[1])
        for done, unit in enumerate(units):
            for walk in walks:
                tokens += walk.move_to(unit.block)
            pair = [walk.moments(unit) for walk in walks]
            tokens += sum(2 * walk.tokens for walk in walks)
            if pair[0] is None or pair[1] is None:
                notes.append(f"{unit.name}: not updated, its tokens are routed otherwise in the dense model")
            else:
                self._update(inputs, original, unit, pair[0], pair[1])
            inputs.progress("recovery", done + 1, len(units), unit.name)
        tokens = round(tokens / blocks)
        curve.append((tokens, self._kl(inputs, original)))
        return RecoveryResult(tokens, tuple(curve), tuple(notes))

    def _update(
        self,
        inputs: RecoveryInputs,
        original: torch.nn.Module,
        unit: Unit,
        fitted: Moments,
        judged: Moments,
    ) -> None:
        """Set the weights of the layers of a unit, each if its error on the hold-out samples falls."""
        if not fitted.own.any():  # behind a layer without weights, as in a dropped half
            return
        damping = self.damping * fitted.own.diagonal().mean()
        hessian = fitted.own.clone()
        hessian.diagonal().add_(damping)
        for layer in unit.layers:
            module, dense = linear(inputs.model, layer.name), Weights(original)[layer.name]
            now, dense = module.weight.float(), dense.to(module.weight.device).float()
            kept = inputs.masks.kept(layer.name, now.device)
            target = dense @ fitted.cross + damping * now
            new = conjugate_gradients(now, kept, hessian, target, self.iterations).to(module.weight.dtype)
            if not bool(torch.isfinite(new).all()):
                raise NumericsError(f"the update of {layer.name} is not finite", hint="give more damping")
            errors = [_error(w.float(), dense, judged) for w in (module.weight, new)]
            if errors[1] < errors[0]:
                module.weight.copy_(new)

    def _kl(self, inputs: RecoveryInputs, original: torch.nn.Module) -> float:
        return mean_kl(original, inputs.model, inputs.holdout, inputs.ranks, batch_tokens=inputs.batch_tokens)


def _error(weight: torch.Tensor, dense: torch.Tensor, moments: Moments) -> float:
    """Return sum |W x - W' x'|^2 without its part that does not depend on W."""
    own = ((weight @ moments.own) * weight).sum(dtype=torch.float64)
    return float(own - 2 * ((dense @ moments.cross) * weight).sum(dtype=torch.float64))


class _Walk:
    """The hidden states [B, T, D] of a sparse and a dense model at one block, by batch; each rank has its batches."""

    def __init__(
        self, model: torch.nn.Module, original: torch.nn.Module, batches: Sequence[torch.Tensor], ranks: Ranks
    ):
        self.models, self.ids, self.block, self.ranks = (model, original), ranks.share(batches), 0, ranks
        self.tokens = sum(batch.numel() for batch in batches)
        ids = self.ids
        self._hidden: list[list[torch.Tensor | None]] = [[None] * len(ids) for _ in self.models]

    def move_to(self, block: int) -> int:
        """Run the blocks before ``block``; return the tokens that passed through a block."""
        passed = 0
        for number in range(self.block, block):
            for model, hidden in zip(self.models, self._hidden, strict=True):
                window = Window(number, number)
                hidden[:] = [window.run(model, ids, h) for ids, h in zip(self.ids, hidden, strict=True)]
            passed += 2 * self.tokens
        self.block = block
        return passed

    def moments(self, unit: Unit) -> Moments | None:
        """Return the moments of a unit's inputs; None if the models route other tokens to it.

        Raises:
            NumericsError: an input is not finite.
        """
        window, layer = Window(self.block, self.block), unit.layers[0].name
        module = linear(self.models[0], layer)
        own, cross = torch.zeros(2, module.in_features, module.in_features, device=module.weight.device)
        apart = False
        for number, ids in enumerate(self.ids):
            x, dense = (
                window.input_of(layer, model, ids, hidden[number]).flatten(0, -2).float()
                for model, hidden in zip(self.models, self._hidden, strict=True)
            )
            apart = x.shape != dense.shape
            if apart:
                break
            dense = dense.to(x.device)
            own = own.to(x.device).addmm_(x.T, x)
            cross = cross.to(x.device).addmm_(dense.T, x)
        if any(self.ranks.gather(lambda: apart)):
            return None
        if self.ranks.size > 1:
            own, cross = self.ranks.all_reduce_sum(own), self.ranks.all_reduce_sum(cross)
        if not bool(torch.isfinite(own).all() and torch.isfinite(cross).all()):
            raise NumericsError(f"the input of {layer} is not finite", hint="try dtype float32 or bfloat16")
        return Moments(own, cross)
