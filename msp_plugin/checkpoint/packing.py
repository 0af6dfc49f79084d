"""Which layers of a checkpoint are packed, and the config that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from msp_plugin.errors import FormatError
from msp_plugin.formats.sparse24 import FORMAT, Packed, is_packable, pack, positive_zeros
from msp_plugin.formats.tensor_files import TensorFiles, TensorInfo
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.units import FUSED

#: The version of compressed-tensors whose configuration this is.
_VERSION = "0.13.0"
#: What the kernels ask of a weight [out, in]: vLLM 0.18's and cuSPARSELt's tiles of 16 bits.
OUT_MULTIPLE, IN_MULTIPLE = 16, 32


@dataclass(frozen=True)
class Packing:
    """What becomes of every layer.

    Args:
        packed: by layer to pack, its level's name.
        dense: by layer to leave, why.
    """

    packed: Mapping[str, str]
    dense: Mapping[str, str]


def sort_layers(tensors: TensorFiles | Mapping[str, TensorInfo], allocation: Allocation | None) -> Packing:
    """Return which layers of a dense checkpoint are packed, and why the others are not.

    With an allocation, the level decides; without one, the weights themselves do, for every matrix in the decoder
    blocks. Layers that inference fuses are packed all or none.
    """
    packed: dict[str, str] = {}
    dense: dict[str, str] = {}
    for layer, level in _candidates(tensors, allocation).items():
        reason = _reason(tensors, allocation, layer, level)
        if reason is None:
            packed[layer] = level or "2:4"
        else:
            dense[layer] = reason
    for layer in list(packed):
        for sibling in _siblings(layer):
            if sibling not in packed and f"{sibling}.weight" in tensors:
                why = dense.get(sibling, "it was not pruned")
                dense[layer] = f"inference fuses it with {sibling}, which stays dense: {why}"
    return Packing({layer: level for layer, level in packed.items() if layer not in dense}, dense)


def _candidates(
    tensors: TensorFiles | Mapping[str, TensorInfo], allocation: Allocation | None
) -> dict[str, str | None]:
    """Return the layers that may be packed, with their level's name where an allocation gives it."""
    if allocation is not None:
        return {layer: level.name for layer, level in allocation.by_layer.items()}
    return {
        name.removesuffix(".weight"): None
        for name, info in tensors.items()
        if name.endswith(".weight")
        and len(info.shape) == 2
        and any(part.isdigit() for part in name.split("."))
    }


def _reason(
    tensors: TensorFiles | Mapping[str, TensorInfo],
    allocation: Allocation | None,
    layer: str,
    level: str | None,
) -> str | None:
    """Return why a layer is not packed, None if it is."""
    info = tensors[f"{layer}.weight"]
    if level is not None and not allocation.by_layer[layer].servable:
        return f"level {level} does not run on 2:4 kernels"
    if "experts" in layer.split("."):
        return "experts are served dense"
    rows, columns = info.shape
    if rows % OUT_MULTIPLE or columns % IN_MULTIPLE:
        return f"shape [{rows}, {columns}] is no multiple of [{OUT_MULTIPLE}, {IN_MULTIPLE}]"
    if not info.dtype.is_floating_point or info.dtype.itemsize not in (2, 4):
        return f"dtype {info.dtype} is not served"
    if level is None and not is_packable(tensors.read(f"{layer}.weight")):
        return "its weights are not 2:4"
    return None


def _siblings(layer: str) -> list[str]:
    parent, _, leaf = layer.rpartition(".")
    group = next((parts for parts in FUSED if leaf in parts), ())
    return [f"{parent}.{part}" for part in group if part != leaf]


def pack_layer(weight: torch.Tensor, layer: str) -> tuple[Packed, int]:
    """Return a packed weight, and how many negative zeros had to become positive for it: 0 if it is exact.

    Raises:
        FormatError: the weight is not 2:4.
    """
    try:
        return pack(weight, layer), 0
    except FormatError:
        positive, count = positive_zeros(weight)
        if not count:
            raise
        return pack(positive, layer), count


def sparsity_config(tensors: TensorFiles | Mapping[str, TensorInfo], packing: Packing) -> dict[str, Any]:
    """Return the ``quantization_config`` of a packed checkpoint, as compressed-tensors 0.13 and vLLM 0.18.1 read it.

    Layers are named one by one: with ``targets: ["Linear"]`` vLLM 0.18.1 takes dense layers for packed ones. Further
    keys beside ``sparsity_config`` make compressed-tensors 0.13 ask for ``config_groups``.
    """
    others = [
        name.removesuffix(".weight")
        for name, info in tensors.items()
        if name.endswith(".weight")
        and len(info.shape) == 2
        and name.removesuffix(".weight") not in packing.packed
    ]
    return {
        "quant_method": "compressed-tensors",
        "version": _VERSION,
        "sparsity_config": {
            "format": FORMAT,
            "sparsity_structure": "2:4",
            "global_sparsity": 0.5,
            "registry_requires_subclass": False,
            "targets": list(packing.packed),
            "ignore": others,
        },
    }
