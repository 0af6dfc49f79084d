"""Mean update: what a dropped half would add on average goes into the bias of the half before it.

Shape legend: T tokens of all samples, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import ModelError, NumericsError
from msp_plugin.models.layers import text_config
from msp_plugin.recovery.base import Recovery, RecoveryInputs, RecoveryResult, check_in_memory
from msp_plugin.recovery.masks import Masks
from msp_plugin.recovery.shared import mean_kl
from msp_plugin.runtime.ranks import Ranks
from msp_plugin.structure.halves import Half, find_halves

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: By type, the entries of a config that give the output projections of attentions and MLPs biases (and the other
#: projections too).
_BIASES = {"llama": ("attention_bias", "mlp_bias")}


@dataclass(frozen=True)
class MeanUpdate(Recovery):
    """Replaces each dropped half by the mean of what it would add (the emulated update of arXiv 2407.16286).

    For a dropped half, b = mean_t(f(x_t)), where f is the dense half and x_t the hidden state that it would get in the
    model as recovered so far. Adding b there is adding it to the output bias of the last half before it that is left, which is
    exact: only dropped halves lie between. It costs nothing in the served model but biases, which become zeros where a Llama
    has none. Halves are done in order. A half with none before it gets no update, which a note says. If the loss on the
    hold-out does not fall, all biases stay as they were. Sums are float64.

    Deviation: x_t is of the recovered model, not of the dense one. The authors' low-rank updates are not here: train the
    model that is left.
    """

    name = "mean_update"

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
            ModelError: see find_halves; or the original has other halves, or none is dropped.
            NumericsError: the mean output of a half is not finite.
        """
        model, original = inputs.model, inputs.original
        assert original is not None, "the caller gives the original, because needs_original is True"
        left, gone = _left_and_gone(model, original)
        before = self._loss(inputs)
        added = _add_biases(model)
        kept = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(".bias")}
        notes, tokens = [], 0
        for done, half in enumerate(gone, 1):
            target = max((h for h in left if _place(h) < _place(half)), key=_place, default=None)
            if target is None:
                notes.append(f"{half.name} has no half before it, so nothing stands for it")
                continue
            update = _mean_output(model, original, half, inputs.data, inputs.ranks)
            tokens += inputs.data.tokens
            if not torch.isfinite(update).all():
                raise NumericsError(f"the mean output of {half.name} is not finite", hint="try dtype float32")
            with torch.no_grad():
                output_bias = model.get_parameter(f"{target.output}.bias")
                output_bias.add_(update.to(output_bias))
            inputs.progress("mean update", done, len(gone))
        after = self._loss(inputs)
        if not after < before:
            notes.append(
                f"the hold-out loss would be {after:.4f} instead of {before:.4f}: no bias was changed"
            )
            with torch.no_grad():
                for name, bias in kept.items():
                    model.get_parameter(name).copy_(bias)
            _remove_biases(model, added)
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


def _left_and_gone(model: torch.nn.Module, original: torch.nn.Module) -> tuple[list[Half], list[Half]]:
    """Return the halves of a model that are left, and those of its original that are dropped, in order.

    Dropped is one that is cut out, or whose output projection is zero.

    Raises:
        ModelError: the model has halves that the original has not, or none is dropped.
    """
    there = {half.name: half for half in find_halves(model)}
    silent = {name for name, half in there.items() if not model.get_parameter(f"{half.output}.weight").any()}
    whole = find_halves(original)
    if odd := sorted(set(there) - {half.name for half in whole}):
        raise ModelError(f"the original has no {odd[0]}", hint="give the dense model that was pruned")
    gone = [half for half in whole if half.name not in there or half.name in silent]
    if not gone:
        raise ModelError(
            "no attention and no MLP of the model is dropped",
            hint="mean_update stands for dropped halves alone",
        )
    return [half for name, half in there.items() if name not in silent], gone


def _place(half: Half) -> tuple[int, bool]:
    """Return the place of a half in the order of the forward pass."""
    return half.block, half.kind == "mlp"


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
def _mean_output(
    model: PreTrainedModel, original: PreTrainedModel, half: Half, data: CalibrationSet, ranks: Ranks
) -> torch.Tensor:
    """Return float64[D], the mean over tokens of what the dense half adds beyond the present one, on the model's own inputs."""
    norm, dense = original.get_submodule(half.norms[0]), original.get_submodule(half.name)
    states: list[torch.Tensor] = []
    total = torch.zeros(text_config(model).hidden_size, dtype=torch.float64)

    def state(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        states.append(args[0])

    def add(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = norm(states.pop())
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
        for sample in data.of_rank(ranks).samples:
            model(sample[None].to(model.device), use_cache=False)
    return (total if ranks.size == 1 else ranks.all_reduce_sum(total)) / data.tokens
