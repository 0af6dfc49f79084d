"""How many bytes an allocation takes: dense, and packed as each export packs it.

The format itself says which layers it packs; only levels, shapes and dtypes are needed for it.
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

#: Of the weights, where neither a record nor a checkpoint says it.
DEFAULT_DTYPE = torch.bfloat16
SPARSE24, BITMASK = Sparse24Bitmask(), SparseBitmask()


@dataclass(frozen=True)
class Part:
    """Some of the tensors: how many, their weights, and their bytes dense and as the export stores them."""

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
        format: the one that it is packed in.
        dtype: of the weights.
        assumed: True if no record says the dtype.
        packed: the layers that are packed.
        dense: those that stay dense, by reason.
        total: all of the allocation.
        whole: with all other tensors of the checkpoint; None where only the records are there.
        quantized: True if the checkpoint is, which is then left aside.
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
    """Return the bytes of an allocation in each built-in format; in that of the checkpoint first, if it is packed."""
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
        allocation: with the shapes of its layers.
        dtype: of the weights as a record says it; ``auto`` and None mean that it is not known.
        checkpoint: the model itself. It then says the dtypes, and which layers were left out of the
            allocation; without one, no layer is taken to be left out.
    """
    allocation = allocation.as_stored()
    quantized = checkpoint is not None and checkpoint.quantization is not None
    if quantized:
        checkpoint = None  # its weights have other dtypes and names
    named = getattr(torch, dtype or "", None)
    known = isinstance(named, torch.dtype)
    kind: torch.dtype = named if isinstance(named, torch.dtype) else DEFAULT_DTYPE
    tensors = {
        f"{layer.name}.weight": TensorInfo(Path(), kind, (layer.out_features, layer.in_features))
        for layer in allocation.table.layers
    }
    found = {name: checkpoint.dense_info(name) for name in checkpoint.dense_names} if checkpoint else {}
    measured = [found[name].dtype for name in tensors if name in found]
    if measured:
        kind = Counter(measured).most_common(1)[0][0]
    total, packed, dense = _parts(allocation, {**tensors, **found}, format)
    others = {name: info for name, info in found.items() if name not in tensors}
    whole = None
    if found:
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
    """Return the bytes of all layers, of the packed ones, and of the others by reason."""
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
