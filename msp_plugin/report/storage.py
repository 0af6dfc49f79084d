"""Compute the bytes of an allocation: dense, and packed in each format.

Each format decides which layers it packs, from levels, shapes and dtypes alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.packing import short_reason, sort_layers
from msp_plugin.formats.base import PackedFormat, TensorInfo
from msp_plugin.formats.bitmask import SparseBitmask
from msp_plugin.formats.sparse24 import Sparse24Bitmask
from msp_plugin.plan.allocation import Allocation

#: Assumed for the weights if neither a record nor a checkpoint gives their dtype.
DEFAULT_DTYPE = torch.bfloat16
SPARSE24, BITMASK = Sparse24Bitmask(), SparseBitmask()


@dataclass(frozen=True)
class Part:
    """Some layers: their number, weights, dense bytes, and bytes as the export stores them."""

    name: str
    layers: int
    weights: int
    dense: int
    stored: int

    @property
    def ratio(self) -> float:
        """Stored bytes as a share of the dense ones."""
        return self.stored / self.dense if self.dense else 1.0


@dataclass(frozen=True)
class Storage:
    """The bytes of an allocation, dense and in one packed format.

    Args:
        format: the packed format.
        dtype: of the weights.
        assumed: True if no record gives the dtype.
        packed: the layers that are packed.
        dense: the layers that stay dense, by reason.
        total: all layers of the allocation.
        whole: ``total`` with all other tensors of the checkpoint; None without a checkpoint.
        quantized: True if the checkpoint is quantized and therefore ignored.
    """

    format: PackedFormat
    dtype: str
    assumed: bool
    packed: Part
    dense: tuple[Part, ...]
    total: Part
    whole: Part | None = None
    quantized: bool = False


def storages(allocation: Allocation, dtype: str | None, checkpoint: Checkpoint | None) -> list[Storage]:
    """Return the bytes of an allocation in each built-in format, first in a packed checkpoint's own format."""
    own = checkpoint.format if checkpoint else None
    formats = dict.fromkeys([own or SPARSE24, SPARSE24, BITMASK])
    return [storage(allocation, dtype, checkpoint, format) for format in formats]


def storage(
    allocation: Allocation,
    dtype: str | None = None,
    checkpoint: Checkpoint | None = None,
    format: PackedFormat = SPARSE24,
) -> Storage:
    """Return the bytes of an allocation in a format.

    Args:
        dtype: of the weights, from a record; ``auto`` and None mean that it is not known.
        checkpoint: the model. It gives the dtypes, and the layers that are not in the allocation; without one, all
            layers are assumed to be in it.
    """
    allocation = allocation.as_stored()
    quantized = checkpoint is not None and checkpoint.quantization is not None
    if quantized:
        checkpoint = None  # the dtypes and names of its weights differ
    named = getattr(torch, dtype or "", None)
    known = isinstance(named, torch.dtype)
    kind: torch.dtype = named if isinstance(named, torch.dtype) else DEFAULT_DTYPE
    tensors = {
        f"{layer.name}.weight": TensorInfo(Path(), kind, (layer.out_features, layer.in_features))
        for layer in allocation.table.layers
    }
    stored = {name: checkpoint.dense_info(name) for name in checkpoint.dense_names} if checkpoint else {}
    measured = [stored[name].dtype for name in tensors if name in stored]
    if measured:
        kind = Counter(measured).most_common(1)[0][0]
    total, packed, dense = _parts(allocation, {**tensors, **stored}, format)
    others = {name: info for name, info in stored.items() if name not in tensors}
    whole = None
    if stored:
        size = sum(info.bytes for info in others.values())
        rest = sum(info.bytes // info.dtype.itemsize for info in others.values())
        whole = Part(
            "whole checkpoint", total.layers, total.weights + rest, total.dense + size, total.stored + size
        )
    name = str(kind).removeprefix("torch.")
    return Storage(format, name, not (measured or known), packed, tuple(dense), total, whole, quantized)


def _parts(
    allocation: Allocation, tensors: dict[str, TensorInfo], format: PackedFormat
) -> tuple[Part, Part, list[Part]]:
    """Return the bytes of all layers, of the packed layers, and of the dense layers by reason."""
    packing = sort_layers(tensors, allocation, format)
    packed, total = [0, 0, 0, 0], [0, 0, 0, 0]
    dense: dict[str, list[int]] = {}
    for layer in allocation.table.layers:
        info = tensors[f"{layer.name}.weight"]
        reason = packing.dense.get(layer.name)
        stored = info.bytes
        if reason is None:
            shape = (layer.out_features, layer.in_features)
            kept = allocation.by_layer[layer.name].kept(layer)
            stored = sum(format.sizes(shape, info.dtype, kept).values())
        short = short_reason(reason or "")
        for sums in (total, packed if reason is None else dense.setdefault(short, [0, 0, 0, 0])):
            for i, value in enumerate((1, layer.weights, info.bytes, stored)):
                sums[i] += value
    rest = [Part(reason, *sums) for reason, sums in sorted(dense.items(), key=lambda d: (-d[1][1], d[0]))]
    name = "packed for 2:4 kernels" if format == SPARSE24 else f"packed as {format.name}"
    return Part("all prunable layers", *total), Part(name, *packed), rest
