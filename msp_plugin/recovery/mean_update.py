"""Mean update: the mean of what a half lost goes into an output bias.

Shape legend: T tokens of all samples, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from msp_plugin.errors import ModelError, NumericsError
from msp_plugin.models.layers import text_config
from msp_plugin.models.weights import Weights
from msp_plugin.passes.by_block import BlockPass
from msp_plugin.recovery.base import Recovery, RecoveryInputs, RecoveryResult, check_in_memory
from msp_plugin.recovery.masks import Masks
from msp_plugin.recovery.shared import mean_kl
from msp_plugin.structure.halves import Half, find_halves

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: By type, the entries of a config that give the output projections of attentions and MLPs biases (and the other
#: projections too).
_BIASES = {"llama": ("attention_bias", "mlp_bias")}


@dataclass(frozen=True)
class MeanUpdate(Recovery):
    """Adds the mean of what each half lost to an output bias (arXiv 2407.16286; for widths FLAP, arXiv 2312.11983).

    b = mean_t(f(x_t) - g(x_t)), where f is the dense half, g the half that is left of it, zero if it was dropped, and x_t the
    hidden state that it gets in the model as recovered so far. Where heads or channels are gone and the others as they were,
    b = W_gone mean(z_gone) for their inputs z of the output projection W, which is FLAP's bias. A half that is left gets b
    itself. The b of a dropped half goes to the last half before it that is left, which is the same, because only dropped
    halves lie between. A dropped half with none before it gets no update, and a note says so. A Llama without biases gets
    biases of zeros for all projections. Halves are done in order. If the loss on the hold-out does not fall, all biases
    stay as they were. Sums are float64.

    Deviation: x_t is of the recovered model, not of the dense one. The low-rank updates of 2407.16286 are not here: train
    the model that is left.
    """

    name = "mean_update"
    same_depth = True

    def check(self, model: PreTrainedModel, masks: Masks) -> None:
        check_in_memory(self.name, model)
        kind = text_config(model).model_type
        if kind not in _BIASES:
            raise ModelError(
                f"the projections of {kind} that write to the hidden state have no biases",
                hint=f"mean_update is for {', '.join(_BIASES)}; another recovery trains what is left",
            )

    def recover(self, inputs: RecoveryInputs) -> RecoveryResult:
        """Set biases of the model in place (see Recovery.recover).

        Raises:
            ModelError: see find_halves; or the original has other halves.
            NumericsError: the mean of what a half lost is not finite.
        """
        model, original, data = inputs.model, inputs.original, inputs.data
        assert original is not None, "the caller gives the original, because needs_original is True"
        changed = _changed(model, original)
        before = self._loss(inputs)
        added = _add_biases(model)
        kept = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(".bias")}
        walk = BlockPass(model, data.of_rank(inputs.ranks), inputs.batch_tokens)
        notes: list[str] = []
        runs = 0
        for done, (half, target) in enumerate(changed, 1):
            inputs.progress("mean update", done, len(changed))
            if target is None:
                notes.append(f"{half.name} has no half before it, so nothing stands for it")
                continue
            while walk.block < half.block:
                walk.run()
                runs += 1
            runs += 1
            total = _lost(model, original, half, walk)
            update = (total if inputs.ranks.size == 1 else inputs.ranks.all_reduce_sum(total)) / data.tokens
            if not torch.isfinite(update).all():
                raise NumericsError(f"what {half.name} lost is not finite", hint="try dtype float32")
            with torch.no_grad():
                output_bias = model.get_parameter(f"{target.output}.bias")
                output_bias.add_(update.to(output_bias))
                if target.block < half.block:  # the states that wait at this block are from before
                    for states in walk.hidden:
                        assert states is not None, "only the first block has none, and none is before it"
                        states.add_(update.to(states))
        after = self._loss(inputs)
        if not after < before:
            notes.append(
                f"the hold-out loss would be {after:.4f} instead of {before:.4f}: no bias was changed"
            )
            with torch.no_grad():
                for name, bias in kept.items():
                    model.get_parameter(name).copy_(bias)
            _remove_biases(model, added)
        tokens = data.tokens * runs // len(walk.blocks)
        return RecoveryResult(tokens, ((0, before), (tokens, min(after, before))), tuple(notes))

    def _loss(self, inputs: RecoveryInputs) -> float:
        """Return the KL divergence from the dense model on the hold-out, inf if it is not finite."""
        assert inputs.original is not None
        try:
            return mean_kl(
                inputs.original, inputs.model, inputs.holdout, inputs.ranks, batch_tokens=inputs.batch_tokens
            )
        except NumericsError:
            return math.inf


def _changed(model: torch.nn.Module, original: torch.nn.Module) -> list[tuple[Half, Half | None]]:
    """Return the halves of the original that lost weights, each with the half whose bias gets its update, in order.

    Raises:
        ModelError: the model has halves that the original has not.
    """
    there = {half.name: half for half in find_halves(model)}
    whole = find_halves(original)
    if odd := sorted(set(there) - {half.name for half in whole}):
        raise ModelError(f"the original has no {odd[0]}", hint="give the dense model that was pruned")
    changed: list[tuple[Half, Half | None]] = []
    last: Half | None = None
    for half in sorted(whole, key=lambda h: (h.block, h.kind == "mlp")):
        own = there.get(half.name)
        if own is not None:
            if model.get_parameter(f"{own.output}.weight").any():
                last = own
            if not _lost_weights(model, original, half):
                continue
        changed.append((half, last))
    return changed


def _lost_weights(model: torch.nn.Module, original: torch.nn.Module, half: Half) -> bool:
    """Return True if a layer of a half is smaller than the original's or has zeros where that has none."""
    for layer in (*half.inputs, half.output):
        weight, dense = Weights(model)[layer], Weights(original)[layer]
        if weight.shape != dense.shape or bool(((weight == 0) & (dense != 0)).any()):
            return True
    return False


def _add_biases(model: PreTrainedModel) -> list[str]:
    """Give each projection of the halves a bias of zeros, where it has none, and say so in the config.

    Returns:
        The entries of the config that were changed.
    """
    config = text_config(model)
    changed = [key for key in _BIASES[config.model_type] if not getattr(config, key)]
    for key in changed:
        setattr(config, key, True)
    for half in find_halves(model):
        for layer in (*half.inputs, half.output):
            module = model.get_submodule(layer)
            if module.bias is None:
                weight = module.weight
                assert isinstance(weight, torch.Tensor)
                module.bias = torch.nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=False)
    return changed


def _remove_biases(model: PreTrainedModel, changed: Sequence[str]) -> None:
    """Undo ``_add_biases``, given what it returned."""
    config = text_config(model)
    attention, mlp = _BIASES[config.model_type]
    for key in changed:
        setattr(config, key, False)
    for half in find_halves(model):
        if (mlp if half.kind == "mlp" else attention) in changed:
            for layer in (*half.inputs, half.output):
                model.get_submodule(layer).bias = None  # type: ignore[assignment,unused-ignore]


@torch.no_grad()
def _lost(model: PreTrainedModel, original: PreTrainedModel, half: Half, walk: BlockPass) -> torch.Tensor:
    """Return float64[D], the sum over tokens of what the dense half adds beyond the present one, on the model's states.

    Args:
        walk: stands at the half's block.
    """
    norm, dense = original.get_submodule(half.norms[0]), original.get_submodule(half.name)
    states: list[torch.Tensor] = []
    total = torch.zeros(text_config(model).hidden_size, dtype=torch.float64)

    def state(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        states.append(args[0])

    dtype = next(dense.parameters()).dtype

    def add(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        args, kwargs = _as_dtype((args, kwargs), dtype)
        inputs = norm(_as_dtype(states.pop(), dtype))
        own = {**kwargs, "hidden_states": inputs} if "hidden_states" in kwargs else kwargs
        would, does = (
            each[0] if isinstance(each, tuple) else each
            for each in (dense(*((inputs, *args[1:]) if args else ()), **own), output)
        )
        total.add_((would.double() - does.double()).sum(dim=(0, 1)).cpu())

    with ExitStack() as undo:
        first = model.get_submodule(half.norms[0])
        undo.callback(first.register_forward_pre_hook(state).remove)
        undo.callback(model.get_submodule(half.name).register_forward_hook(add, with_kwargs=True).remove)
        walk.run(advance=False)
    return total


def _as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Return what a module is called with, its floating-point tensors in a dtype: the two models may be stored in two."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _as_dtype(part, dtype) for key, part in value.items()}
    return type(value)(_as_dtype(part, dtype) for part in value) if type(value) in (tuple, list) else value
