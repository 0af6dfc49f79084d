"""A smaller model in transformers: its own class, with the widths of each block and without its dropped halves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from msp_plugin.errors import ModelError
from msp_plugin.formats.tensor_files import read_json
from msp_plugin.models.layers import decoder_blocks
from msp_plugin.models.source import auto_class
from msp_plugin.structure.halves import ATTENTION, Dropped, Half, drop, find_halves
from msp_plugin.structure.widths import GLOBAL_ACCESS, KEY, Widths, per_layer_record, read_widths

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def empty_model(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model of a directory or hub id without weights (on ``meta``), smaller where its config.json says so.

    Raises:
        ModelError: transformers knows no such model.
        FormatError: the config's record of widths is damaged.
    """
    from transformers import AutoConfig

    file = Path(source) / "config.json"
    raw = read_json(file) if file.parent.is_dir() else {}
    widths = read_widths(raw, str(file))
    try:
        if widths is None:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        else:
            config = plain_config(raw)
        with torch.device("meta"):
            kind = auto_class(config)
            model: PreTrainedModel = kind.from_config(config, trust_remote_code=trust_remote_code)
            if widths is not None:
                shrink(model, widths)
    except Exception as error:  # a config's values reach all of transformers
        raise ModelError(f"cannot make the model of {source}: {error}") from error
    return model


def plain_config(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """Return transformers' config of a smaller model's config.json, as if all blocks were as wide as the widest could be."""
    from transformers import AutoConfig

    config: PreTrainedConfig = AutoConfig.for_model(
        **{key: value for key, value in raw.items() if key not in (KEY, GLOBAL_ACCESS)}
    )
    return config


def small_class(config: PreTrainedConfig, widths: Sequence[Widths]) -> type[PreTrainedModel]:
    """Return a class that transformers can load a smaller model's tensors into; ``as_usual`` undoes it afterwards."""
    with torch.device("meta"):
        usual: type[PreTrainedModel] = type(auto_class(config).from_config(config))

    class Smaller(usual):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            shrink(self, widths)

    Smaller.__name__ = usual.__name__
    return Smaller


def as_usual(model: PreTrainedModel) -> None:
    """Give a loaded smaller model transformers' own class."""
    model.__class__ = type(model).__mro__[1]


def shrink(model: PreTrainedModel, widths: Sequence[Widths]) -> None:
    """Give each block of a model without weights its widths, and record them in the model's config.

    The attentions that stay are numbered anew for the KV cache, of which transformers reads the length off the first
    one; dropped ones have no place in it.
    """
    _, blocks = decoder_blocks(model)
    halves = find_halves(model)
    heads = [half for half in halves if half.kind == ATTENTION]
    usual = Widths(
        max(half.query_heads for half in heads),
        max(half.groups for half in heads),
        max(half.groups for half in halves if half.kind != ATTENTION),
    )
    for half in halves:
        own = widths[half.block]
        _resize(model, half, own.kv_heads if half.kind == ATTENTION else own.channels)
    cached: list[Any] = [block.self_attn for block in blocks if not isinstance(block.self_attn, Dropped)]
    for place, attention in enumerate(cached):
        attention.layer_idx = place
    record = {int(block): entry for block, entry in per_layer_record(widths, usual).items()}
    setattr(model.config, GLOBAL_ACCESS, True)
    setattr(model.config, KEY, record)


def _resize(model: torch.nn.Module, half: Half, groups: int) -> None:
    """Make the linears of a half as wide as so many groups, or take the half out if there are none."""
    if groups == half.groups:
        return
    if not groups:
        drop(model, half)
        return
    for layer, rows in half.inputs.items():
        _replace(model, layer, out_features=groups * rows)
    _replace(model, half.output, in_features=groups * half.columns)


def _replace(
    model: torch.nn.Module, layer: str, in_features: int | None = None, out_features: int | None = None
) -> None:
    """Put a linear with another number of features in the place of one."""
    old = model.get_submodule(layer)
    assert isinstance(old, torch.nn.Linear)
    sizes = in_features or old.in_features, out_features or old.out_features
    with torch.device("meta"):
        new = torch.nn.Linear(*sizes, bias=old.bias is not None, dtype=old.weight.dtype)
    model.set_submodule(layer, new)
