"""Find the decoder blocks of a model and the linears in them that may be pruned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from msp_plugin.errors import ModelError, NumericsError, RecipeError
from msp_plugin.models.offload import check_loadable, linear, named_parameters, onloaded, own_parameters
from msp_plugin.models.patterns import check_patterns, matches
from msp_plugin.plan.bounds import Bounds
from msp_plugin.plan.levels import Level
from msp_plugin.plan.units import Layer, UnitTable, group_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def text_config(model: torch.nn.Module) -> PreTrainedConfig:
    """Return the config of a model's language part; the whole config if there is no other part."""
    config: Any = model.config
    text: PreTrainedConfig
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return text


def decoder_blocks(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """Return (name, modules) of the decoder blocks of a model's language part.

    Raises:
        ModelError: the model is an encoder-decoder, or its decoder has no ModuleList of ``num_hidden_layers``
            modules.
    """
    config = text_config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder and a decoder",
            hint="only decoder-only models can be pruned",
        )
    depth = getattr(config, "num_hidden_layers", None)
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else None
    within = decoder if isinstance(decoder, torch.nn.Module) else model
    place = next((name for name, module in model.named_modules() if module is within), None)
    for name, module in within.named_modules() if place is not None else ():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return f"{place}.{name}".strip("."), module
    raise ModelError(
        f"{type(model).__name__} has no list of {depth} decoder blocks",
        hint="only decoder-only language models with one list of blocks can be pruned",
    )


def fused_experts(model: torch.nn.Module) -> list[str]:
    """Return the names of parameters that hold the matrices of all experts in one tensor."""
    _, blocks = decoder_blocks(model)
    sizes = vars(text_config(model))
    counts = {n for key, n in sizes.items() if "expert" in key and type(n) is int and n > 1}
    inside = {id(module) for module in blocks.modules()}
    names = []
    for name, module, parameter in named_parameters(model):
        if id(module) not in inside or isinstance(module, torch.nn.Linear | torch.nn.modules.conv._ConvNd):
            continue
        stacked = parameter.dim() == 3 and parameter.shape[0] in counts
        if stacked or (parameter.dim() > 1 and "experts" in name.split(".")):
            names.append(name)
    return names


def check_no_adapter(model: torch.nn.Module) -> None:
    """Raise if transformers has put an adapter into a model: only the adapter would be saved.

    Raises:
        ModelError: it has.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{type(model).__name__} was loaded with an adapter, whose adapter_config.json lies beside its weights",
            hint="merge it and save the whole model (peft: merge_and_unload), or move the files adapter_* away",
        )


def prunable_layers(
    model: torch.nn.Module,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = (),
    granularity: str = "unit",
) -> UnitTable:
    """Return the units of the linears in the decoder blocks that match ``targets`` and do not match ``ignore``.

    The output head and the embeddings are outside the blocks and never pruned.

    Args:
        targets, ignore: patterns (see patterns.matches).
        granularity: see group_layers.

    Raises:
        RecipeError: a pattern matches nothing in the model.
        ModelError: no layer is left to prune, or the experts are fused into one tensor.
    """
    check_no_adapter(model)
    prefix, blocks = decoder_blocks(model)
    if fused := fused_experts(model):
        raise ModelError(
            f"{type(model).__name__} holds fused experts, e.g. {fused[0]}",
            hint="only linears can be pruned; llm-compressor's oneshot splits most models' experts into "
            "linears first: run MixedSparsityModifier there; if that failed, it does not split these",
        )
    check_patterns(model, "target", targets)
    check_patterns(model, "ignore", ignore)
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or not name.startswith(prefix + "."):
            continue
        if "Router" in type(module).__name__:  # Phi-3.5-MoE's router is a linear, and chooses the experts
            continue
        if not any(matches(p, name, module) for p in targets):
            continue
        if any(matches(p, name, module) for p in ignore):
            continue
        block = int(name[len(prefix) + 1 :].split(".", 1)[0])
        layers.append((block, Layer(name, module.out_features, module.in_features)))
    if layers:
        return group_layers(layers, granularity)
    if not any(isinstance(module, torch.nn.Linear) for module in blocks.modules()):
        kinds = sorted({type(m).__name__ for m in blocks.modules() if own_parameters(m)})
        raise ModelError(
            f"the blocks of {type(model).__name__} under {prefix!r} hold no linear; their weights are in "
            f"{', '.join(kinds)}",
            hint="only torch.nn.Linear can be pruned, which GPT-2's Conv1D is not: take another model",
        )
    raise ModelError(
        f"{type(model).__name__} has no prunable linear under {prefix!r} for targets {list(targets)} "
        f"and ignore {list(ignore)}",
        hint="widen targets or narrow ignore",
    )


def allowed_levels(
    model: torch.nn.Module, table: UnitTable, menu: Sequence[Level], bounds: Bounds
) -> np.ndarray | None:
    """Return bool[units, levels], True where a unit may take a level; None without bounds.

    Raises:
        RecipeError: a pattern of the bounds matches no layer of the table, or see Bounds.allowed.
    """
    if not bounds:
        return None
    matched: dict[str, set[str]] = {}
    for kind, patterns in (("bounds", tuple(bounds.shares)), ("protect", bounds.protect)):
        check_patterns(model, kind, patterns)
        for pattern in patterns:
            matched[pattern] = {
                a.name for a in table.layers if matches(pattern, a.name, model.get_submodule(a.name))
            }
            if not matched[pattern]:
                raise RecipeError(
                    f"{kind} {pattern!r} matches no layer that is pruned",
                    hint="targets or ignore leave out the layers that it names",
                )
    return bounds.allowed(table, menu, matched)


def check_fit(table: UnitTable, menu: Iterable[Level]) -> None:
    """Raise unless every level fits every unit. Those by groups may fit some units only, but one has to fit one.

    Raises:
        RecipeError: levels do not fit; the message names all of them, and the first units.
    """
    odd = {level: [why for unit in table if (why := level.misfit(unit))] for level in menu}
    fits = any(level.by_groups and len(reasons) < len(table) for level, reasons in odd.items())
    odd = {level: reasons for level, reasons in odd.items() if reasons and not (fits and level.by_groups)}
    if not odd:
        return
    level, reasons = next(iter(odd.items()))
    names = ", ".join(each.name for each in odd)
    others = f"; nor do {', '.join(each.name for each in list(odd)[1:])}" if len(odd) > 1 else ""
    raise RecipeError(
        f"level {level.name} does not fit {len(reasons)} of {len(table)} units: it {', '.join(reasons[:3])}{others}",
        hint=f"leave {names} out of levels, or add the layers to ignore; a share of zeros, e.g. 0.5, fits any width",
    )


def check_whole(model: torch.nn.Module, table: UnitTable, granularity: str, menu: Iterable[Level]) -> None:
    """Raise unless each unit holds all prunable linears of its half-block or block.

    Args:
        menu: one with levels that narrow units, which the message names.

    Raises:
        RecipeError: targets or ignore leave some out; the message names the first units.
    """
    narrowing = [level.name for level in menu if level.narrows]
    whole = {layer: unit for unit in prunable_layers(model, granularity=granularity) for layer in unit.layers}
    odd = [unit.name for unit in table if len(unit.layers) < len(whole[unit.layers[0]].layers)]
    if odd:
        raise RecipeError(
            f"targets or ignore leave out layers of {len(odd)} units that may be {' or '.join(narrowing)}: "
            f"{', '.join(odd[:3])}",
            hint="ignore all layers of a unit or none, protect layers instead, or leave "
            f"{', '.join(narrowing)} out of levels",
        )


def check_finite_weights(model: torch.nn.Module, table: UnitTable) -> None:
    """Raise if a prunable weight is not finite.

    Raises:
        ModelError: a weight cannot be read (see check_loadable).
        NumericsError: weights of some layers are infinite or NaN; the message names the first layers.
    """
    check_loadable(model)
    bad = []
    for layer in table.layers:
        with onloaded(linear(model, layer.name)) as module:
            if not torch.isfinite(module.weight).all():
                bad.append(layer.name)
    if bad:
        raise NumericsError(
            f"{len(bad)} layers hold weights that are not finite, e.g. {', '.join(bad[:3])}",
            hint="repair the checkpoint, or download it again",
        )
