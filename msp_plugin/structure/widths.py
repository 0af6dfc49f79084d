"""The widths of each block, as config.json records them in transformers' ``per_layer_config``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msp_plugin.errors import FormatError, ModelError, shown
from msp_plugin.structure.halves import ATTENTION, FAMILIES, MLP

KEY = "per_layer_config"
#: A config with this key lets its global sizes be read although blocks have others; Llama's own checks need that.
GLOBAL_ACCESS = "allow_global_per_layer_attribute_access"
_HEADS, _KV_HEADS, _CHANNELS, _SKIP, _DEPTH = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "skip",
    "num_hidden_layers",
)


@dataclass(frozen=True)
class Widths:
    """Query heads, KV heads and channels of one block; 0 where its attention or MLP is dropped."""

    heads: int
    kv_heads: int
    channels: int


def global_widths(config: Mapping[str, Any]) -> Widths:
    """Return the sizes that config.json gives for all blocks.

    Raises:
        FormatError: it lacks some, and transformers cannot read it.
    """
    config = _with_defaults(config)
    heads = config[_HEADS]
    return Widths(heads, config.get(_KV_HEADS) or heads, config[_CHANNELS])


def _with_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config.json with transformers' own sizes where it lacks some.

    Raises:
        FormatError: it lacks some, and transformers cannot read it.
    """
    if {_HEADS, _KV_HEADS, _CHANNELS, _DEPTH} <= config.keys():
        return config
    from transformers import AutoConfig

    plain = {key: value for key, value in config.items() if key not in (KEY, GLOBAL_ACCESS)}
    try:
        return {**AutoConfig.for_model(**plain).to_dict(), **config}
    except Exception as error:  # its validators raise what they like
        raise FormatError(
            f"config.json lacks sizes of its blocks, and transformers cannot fill them in: {error}",
            hint="copy or download it again",
        ) from error


def read_widths(config: Mapping[str, Any], source: str) -> tuple[Widths, ...] | None:
    """Return the widths of each block that a config.json records, None if its model is no smaller one.

    Args:
        config: the contents of config.json.
        source: its file or model, for errors.

    Raises:
        FormatError: the record is damaged, or says more than widths and dropped halves.
    """
    record = config.get(KEY)
    if not record or config.get("model_type") not in FAMILIES:
        return None
    try:
        usual, depth = global_widths(config), _with_defaults(config)[_DEPTH]
        widths = [usual] * depth
        for key, entry in record.items():
            block = int(key)
            if not 0 <= block < depth:
                raise ValueError(f"there is no block {block}")
            widths[block] = _read_block(entry, usual)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{source}: {KEY} is not read here: {type(error).__name__}: {error}",
            hint=f"expected by block {_HEADS}, {_KV_HEADS}, {_CHANNELS} and {_SKIP}",
        ) from None
    return tuple(widths)


def _read_block(entry: Mapping[str, Any], usual: Widths) -> Widths:
    """Return the widths of one block's entry.

    Raises:
        ValueError: it has a key or a value that no smaller model has.
    """
    skip = list(entry.get(_SKIP, ()))
    if unknown := (set(entry) - {_HEADS, _KV_HEADS, _CHANNELS, _SKIP}) | (set(skip) - {ATTENTION, MLP}):
        raise ValueError(f"unknown {shown(min(unknown))}")
    most = {_HEADS: usual.heads, _KV_HEADS: usual.kv_heads, _CHANNELS: usual.channels}
    sizes = {key: entry.get(key, size) for key, size in most.items()}
    for key in (_HEADS, _KV_HEADS) if ATTENTION in skip else ():
        sizes[key] = 0
    if MLP in skip:
        sizes[_CHANNELS] = 0
    for key, size in sizes.items():
        least = 0 if (MLP if key == _CHANNELS else ATTENTION) in skip else 1
        if type(size) is not int or not least <= size <= most[key]:
            raise ValueError(f"{key} is {shown(size)}, expected {least} to {most[key]}")
    if sizes[_HEADS] * usual.kv_heads != sizes[_KV_HEADS] * usual.heads:
        raise ValueError(
            f"{sizes[_HEADS]} heads do not share {sizes[_KV_HEADS]} KV heads as in the other blocks"
        )
    return Widths(sizes[_HEADS], sizes[_KV_HEADS], sizes[_CHANNELS])


def per_layer_record(widths: Sequence[Widths], usual: Widths) -> dict[str, dict[str, Any]]:
    """Return ``per_layer_config`` as JSON: by block what differs from the sizes of all blocks.

    A dropped half has also a size of 0, so that transformers alone, which reads no ``skip``, refuses the model
    instead of filling the half with random weights.
    """
    record: dict[str, dict[str, Any]] = {}
    for block, own in enumerate(widths):
        entry: dict[str, Any] = {}
        if own.kv_heads != usual.kv_heads:
            entry |= {_HEADS: own.heads, _KV_HEADS: own.kv_heads} if own.heads else {_KV_HEADS: 0}
        if own.channels != usual.channels:
            entry[_CHANNELS] = own.channels
        if skip := [name for name, size in ((ATTENTION, own.heads), (MLP, own.channels)) if not size]:
            entry[_SKIP] = skip
        if entry:
            record[str(block)] = entry
    return record


def small_config(config: Mapping[str, Any], widths: Sequence[Widths]) -> dict[str, Any]:
    """Return config.json of a model whose blocks have these widths: its own architecture, with a record of them.

    Raises:
        ModelError: transformers refuses such a config.
    """
    record = per_layer_record(widths, global_widths(config))
    plain = {key: value for key, value in config.items() if key not in (KEY, GLOBAL_ACCESS)}
    written = {**plain, KEY: record}
    if refusal(written) is None:
        return written
    written[GLOBAL_ACCESS] = True
    if (why := refusal(written)) is not None:
        raise ModelError(f"transformers refuses the config of the smaller model: {why}")
    return written


def refusal(config: Mapping[str, Any]) -> str | None:
    """Return why transformers refuses a config, None if it does not."""
    from transformers import AutoConfig

    try:
        AutoConfig.for_model(**config)
    except Exception as error:  # its validators raise what they like
        return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
    return None
