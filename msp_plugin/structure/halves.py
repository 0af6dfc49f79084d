"""Find the attention and the MLP of every block, and the heads and channels in them that can be removed one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from msp_plugin.errors import ModelError
from msp_plugin.models.layers import decoder_blocks, fused_experts, text_config

#: transformers' types whose forward passes are those of the exactness proofs in README.md; all are tested.
FAMILIES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "seed_oss")
ATTENTION, MLP = "attention", "mlp"
#: By kind of half its module's name, the projections that read the hidden state, and the one that writes to it.
_MODULES = {
    ATTENTION: ("self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj"),
    MLP: ("mlp", ("gate_proj", "up_proj"), "down_proj"),
}


@dataclass(frozen=True)
class Half:
    """The attention or the MLP of one block, with the norms that serve it alone.

    Its groups are what can be removed without a change to the rest: KV heads with their query heads, or channels.

    Args:
        name: of its module, e.g. ``model.layers.3.mlp``.
        kind: ``attention`` or ``mlp``.
        block: index of its block.
        groups: how many groups it has.
        inputs: by projection that reads the hidden state, the rows of one group.
        output: the projection that writes to the hidden state.
        columns: columns of ``output`` that belong to one group.
        silencing: those of ``inputs`` whose zero rows make a group contribute zero: the values of a head; of a channel
            gate and up, as far as its activation maps zero to zero.
        norms: norms that only this half uses.
    """

    name: str
    kind: str
    block: int
    groups: int
    inputs: dict[str, int]
    output: str
    columns: int
    silencing: tuple[str, ...]
    norms: tuple[str, ...]

    @property
    def query_heads(self) -> int:
        """Query heads of an attention; 0 of an MLP."""
        return (
            self.groups * self.columns // self.inputs[f"{self.name}.k_proj"] if self.kind == ATTENTION else 0
        )


def find_halves(model: torch.nn.Module) -> tuple[Half, ...]:
    """Return the halves of a decoder-only model, block by block; a dropped half is left out.

    Sizes are read off the model's own linears, so that a smaller model gives its own.

    Raises:
        ModelError: heads or channels of this model cannot be removed one by one; the message says what is in the way.
    """
    prefix, blocks = decoder_blocks(model)
    _check_kind(model, prefix, blocks)
    halves = []
    for index, block in enumerate(blocks):
        name = f"{prefix}.{index}"
        found = [_half(block, name, index, kind) for kind in _MODULES]
        halves += [half for half in found if half is not None]
        _check_all_known(block, name, halves)
    return tuple(halves)


def is_mixed(model: torch.nn.Module) -> bool:
    """Return True if some blocks attend to a sliding window and others do not."""
    return len(set(getattr(text_config(model), "layer_types", None) or ())) > 1


def _check_kind(model: torch.nn.Module, prefix: str, blocks: torch.nn.ModuleList) -> None:
    """Raise ModelError for what is known to couple heads or channels in another way."""
    config, kind = text_config(model), type(model).__name__
    names = [name for block in blocks for name, _ in block.named_modules()]
    if fused_experts(model) or any("experts" in name.split(".") for name in names):
        raise ModelError(f"{kind} is a mixture of experts", hint=_HINT)
    if getattr(config, "num_kv_shared_layers", None):
        raise ModelError(f"blocks of {kind} share the keys and values of other blocks", hint=_HINT)
    leaves = Counter(name.rpartition(".")[2] for name, module in blocks.named_modules() if _is_linear(module))
    expected = {name for _, inputs, output in _MODULES.values() for name in (*inputs, output)}
    fused = sorted(
        name for name in leaves if ("qkv" in name or "query_key_value" in name or "gate_up" in name)
    )
    if fused:
        raise ModelError(f"{kind} fuses projections in {', '.join(fused)}", hint=_HINT)
    if odd := sorted(set(leaves) - expected):
        raise ModelError(
            f"the blocks of {kind} hold {', '.join(odd[:3])}, which no half is known to have", hint=_HINT
        )
    if config.model_type not in FAMILIES:
        raise ModelError(f"{kind} is of type {config.model_type!r}", hint=_HINT)
    seen: dict[int, str] = {}
    for name, parameter in blocks.named_parameters(remove_duplicate=False):
        if (first := seen.setdefault(id(parameter), name)) != name:
            raise ModelError(
                f"{prefix}.{name} of {kind} is {prefix}.{first} once more", hint="untie them first"
            )


_HINT = f"heads, channels and halves are removed from models of the types {', '.join(FAMILIES)}"


def _half(block: torch.nn.Module, prefix: str, index: int, kind: str) -> Half | None:
    """Return one half of a block, None if it is dropped."""
    module_name, inputs, output = _MODULES[kind]
    module, name = getattr(block, module_name), f"{prefix}.{module_name}"
    if isinstance(module, Dropped):
        return None
    out = {leaf: getattr(module, leaf).out_features for leaf in inputs}
    width = getattr(module, output).in_features
    groups = out["k_proj"] // module.head_dim if kind == ATTENTION else width
    uneven = [leaf for leaf, size in (*out.items(), (output, width)) if size % groups]
    if uneven or (kind == ATTENTION and (out["q_proj"] != width or out["v_proj"] != out["k_proj"])):
        raise ModelError(
            f"the sizes of {name} are not those of {groups} groups: {out}, {output} {width}", hint=_HINT
        )
    silencing = ("v_proj",) if kind == ATTENTION else _silencing(module)
    return Half(
        name,
        kind,
        index,
        groups,
        {f"{name}.{leaf}": size // groups for leaf, size in out.items()},
        f"{name}.{output}",
        width // groups,
        tuple(f"{name}.{leaf}" for leaf in silencing),
        tuple(f"{prefix}.{norm}" for norm in _norms(block)[kind]),
    )


def _silencing(mlp: Any) -> tuple[str, ...]:
    """Return the projections of an MLP whose zero rows silence a channel: act(0) * up, act(gate) * 0."""
    zero = mlp.act_fn(torch.zeros((), device="cpu"))
    return ("gate_proj", "up_proj") if float(zero) == 0 else ("up_proj",)


def _norms(block: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the norms of each half. Gemma 2 and 3 have one before and one after each; both map zero to zero."""
    if hasattr(block, "pre_feedforward_layernorm"):
        return {
            ATTENTION: ("input_layernorm", "post_attention_layernorm"),
            MLP: ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        }
    return {ATTENTION: ("input_layernorm",), MLP: ("post_attention_layernorm",)}


def _check_all_known(block: torch.nn.Module, prefix: str, halves: list[Half]) -> None:
    """Raise ModelError if a block has weights outside of its halves and their norms."""
    known = tuple(f"{part}." for half in halves for part in (half.name, *half.norms))
    odd = [name for name, _ in block.named_parameters() if not f"{prefix}.{name}".startswith(known)]
    if odd:
        raise ModelError(f"{prefix} has weights that belong to no half, e.g. {odd[0]}", hint=_HINT)


def _is_linear(module: torch.nn.Module) -> bool:
    """Return True for a projection: a module with a matrix of its own."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() > 1


class Dropped(torch.nn.Module):
    """Stands where a half was, and adds nothing to the hidden state.

    Args:
        attention: it stands for an attention, which also returns its weights.
    """

    def __init__(self, attention: bool):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor | tuple[torch.Tensor, None]:
        """Return a zero without dimensions, which costs nothing to add."""
        nothing = hidden_states.new_zeros(())
        return (nothing, None) if self.attention else nothing


def drop(model: torch.nn.Module, half: Half) -> None:
    """Put what adds nothing in the place of a half; its norms go too."""
    model.set_submodule(half.name, Dropped(half.kind == ATTENTION))
    for norm in half.norms:
        model.set_submodule(norm, torch.nn.Identity())


@contextmanager
def without(model: torch.nn.Module, halves: Collection[Half]) -> Iterator[None]:
    """Run the model without some halves while this is open. Call it with ``use_cache=False``."""
    kept = {name: model.get_submodule(name) for half in halves for name in (half.name, *half.norms)}
    try:
        for half in halves:
            drop(model, half)
        yield
    finally:
        for name, module in kept.items():
            model.set_submodule(name, module)
