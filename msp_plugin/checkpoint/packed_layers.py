"""Find the packed layers of a checkpoint and their format in its config, and check them against its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from msp_plugin.errors import FormatError, shown
from msp_plugin.formats.base import PackedFormat, TensorInfo
from msp_plugin.formats.bitmask import SparseBitmask
from msp_plugin.formats.bitmask_int8 import Int8Bitmask
from msp_plugin.formats.sparse24 import Sparse24Bitmask


@dataclass(frozen=True)
class PackedLayers:
    """The packed layers of a checkpoint, in the order of its config, and their format."""

    format: PackedFormat
    layers: tuple[str, ...]


def known_formats() -> Iterator[PackedFormat]:
    """Yield the built-in formats, then those of plugins, which are loaded only if the caller gets that far."""
    from msp_plugin.plugins.manager import Plugins

    yield from (Sparse24Bitmask(), SparseBitmask(), Int8Bitmask())
    yield from Plugins().formats


def packed_layers(
    config: Mapping[str, Any], source: str, formats: Iterable[PackedFormat] | None = None
) -> PackedLayers | None:
    """Return the packed layers according to a model's config; None if there are none.

    Args:
        config: the contents of config.json.
        source: names the file or model in errors.
        formats: the formats to try; None for the built-in ones and those of plugins.

    Raises:
        FormatError: the sparsity_config is damaged or of an unknown format.
    """
    quantization = config.get("quantization_config")
    if not quantization or not isinstance(quantization, dict):
        return None
    sparsity = quantization.get("sparsity_config") or {}
    if not isinstance(sparsity, dict):
        raise FormatError(f"{source}: sparsity_config is not a mapping")
    if not sparsity.get("targets") and sparsity.get("format") == "dense":
        return None
    if sparsity and quantization.get("config_groups"):
        raise FormatError(
            f"{source}: the checkpoint is quantized and packed at once",
            hint="only unquantized weights are packed",
        )
    known = []
    for candidate in known_formats() if formats is None else formats:
        if candidate.recognises(quantization):
            return PackedLayers(candidate, candidate.layers(quantization, source))
        known.append(candidate.name)
    if not sparsity:  # quantized: no format of packed weights
        return None
    expected = " or ".join(repr(name) for name in dict.fromkeys(known))
    raise FormatError(
        f"{source}: sparsity format {shown(sparsity.get('format'))} is not read here",
        hint=f"expected {expected}; a plugin can add a format",
    )


def check_packed(packed: PackedLayers | None, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise unless the headers of a checkpoint's tensors agree with the packed layers of its config.

    Raises:
        FormatError: a tensor of a packed layer is missing or has an impossible header, or a packed tensor belongs to
            a layer that the config does not name.
    """
    layers, format = (packed.layers, packed.format) if packed else ((), Sparse24Bitmask())
    for layer in layers:
        lost = [suffix for suffix in format.suffixes if f"{layer}.{suffix}" not in tensors]
        if lost or f"{layer}.weight" in tensors:
            contradiction = f"there is no {layer}.{lost[0]}" if lost else f"{layer}.weight is there too"
            raise FormatError(
                f"config.json says that {layer} is packed, but {contradiction}",
                hint="the config is from another checkpoint, or a shard is missing",
            )
        format.header({suffix: tensors[f"{layer}.{suffix}"] for suffix in format.suffixes}, layer)
    named = set(layers)
    for name in tensors:
        layer, _, suffix = name.rpartition(".")
        if suffix in format.own_suffixes and layer not in named:
            raise FormatError(
                f"{layer} is stored packed, but config.json does not name it",
                hint="the config is from another checkpoint: export the model again",
            )
