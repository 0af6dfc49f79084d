"""Choose the layers of a dense checkpoint that a format packs, and pack one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from msp_plugin.errors import FormatError
from msp_plugin.formats.base import PackedFormat, TensorInfo
from msp_plugin.formats.bits import positive_zeros
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.levels import Level
from msp_plugin.plan.units import FUSED


@dataclass(frozen=True)
class Packing:
    """The layers that a format packs, and those that stay dense.

    Args:
        packed: by layer, its level's name; without an allocation, the format's structure, e.g. ``2:4``.
        dense: by layer, the reason why it stays dense.
    """

    packed: Mapping[str, str]
    dense: Mapping[str, str]


def sort_layers(
    tensors: Mapping[str, TensorInfo],
    allocation: Allocation | None,
    format: PackedFormat,
    read: Callable[[str], torch.Tensor] | None = None,
) -> Packing:
    """Return which layers of a dense checkpoint a format packs, and why the others stay dense.

    An allocation decides by levels; without one, the weights decide, for every matrix in the decoder blocks. A lossy format
    asks the weights too, where they can be read. Layers that inference fuses are packed all or none, if the format asks for it.

    Args:
        tensors: the headers of the checkpoint.
        read: returns the weight [out, in] of a layer; needed without an allocation.
    """
    packed: dict[str, str] = {}
    dense: dict[str, str] = {}
    for layer, level in _candidates(tensors, allocation).items():
        info = tensors[f"{layer}.weight"]
        reason = format.refuses(layer, info.shape, info.dtype, level)
        if reason is None and (level is None or (format.lossy and read is not None)):
            assert read is not None, "without an allocation, the weights decide"
            reason = format.refuses_weight(read(layer))
        if reason is None:
            packed[layer] = level.name if level else format.structure
        else:
            dense[layer] = reason
    for layer in list(packed) if format.fused_together else ():
        for sibling in _siblings(layer):
            if sibling not in packed and f"{sibling}.weight" in tensors:
                why = dense.get(sibling, "it was not pruned")
                dense[layer] = f"inference fuses it with {sibling}, which stays dense: {why}"
    return Packing({layer: level for layer, level in packed.items() if layer not in dense}, dense)


def short_reason(reason: str) -> str:
    """Return a reason why a layer stays dense without names and bytes, so that equal reasons can be counted."""
    return (
        "inference fuses them with a dense one"
        if reason.startswith("inference fuses")
        else reason.partition(" (")[0]
    )


def _candidates(tensors: Mapping[str, TensorInfo], allocation: Allocation | None) -> dict[str, Level | None]:
    """Return the layers that may be packed, with their level where an allocation gives it."""
    if allocation is not None:
        return dict(allocation.by_layer)
    return {
        name.removesuffix(".weight"): None
        for name, info in tensors.items()
        if name.endswith(".weight")
        and len(info.shape) == 2
        and any(part.isdigit() for part in name.split("."))
    }


def _siblings(layer: str) -> list[str]:
    parent, _, leaf = layer.rpartition(".")
    group = next((parts for parts in FUSED if leaf in parts), ())
    return [f"{parent}.{part}" for part in group if part != leaf]


def pack_layer(format: PackedFormat, weight: torch.Tensor, layer: str) -> tuple[dict[str, torch.Tensor], int]:
    """Return the packed tensors by suffix, and the number of negative zeros that had to become positive.

    Raises:
        FormatError: the weight does not fit into the format.
    """
    try:
        return format.pack(weight, layer), 0
    except FormatError:
        positive, count = positive_zeros(weight)
        if not count:
            raise
        return format.pack(positive, layer), count


def other_matrices(tensors: Mapping[str, TensorInfo], packing: Packing) -> list[str]:
    """Return the layers with a weight of two dimensions that are not packed."""
    matrices = [
        name.removesuffix(".weight")
        for name, info in tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2
    ]
    return [layer for layer in matrices if layer not in packing.packed]
