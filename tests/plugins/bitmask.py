"""A format of packed weights, kept values and a bitmask for any pattern of zeros, and the exporter that writes it."""

from dataclasses import dataclass

import torch

from msp_plugin import FormatError, PackedExporter, PackedFormat, TensorInfo, hookimpl

BITS = 2 ** torch.arange(8)


@dataclass(frozen=True)
class Bitmask(PackedFormat):
    """Kept values and one bit a weight."""

    name = "row-bitmask"
    structure = "unstructured"
    suffixes = ("kept", "bits")
    own_suffixes = ("kept", "bits")
    description = "the kept weights and a bitmask"

    def refuses(self, layer, shape, dtype, level):
        if shape[1] % 8:
            return f"in_features = {shape[1]} is no multiple of 8"
        return "it is dense" if level is not None and level.is_dense else None

    def refuses_weight(self, weight):
        return None if bool((weight == 0).any()) else "it is dense"

    def sizes(self, shape, dtype, kept):
        return {"kept": kept * dtype.itemsize, "bits": shape[0] * shape[1] // 8}

    def pack(self, weight, layer):
        mask = weight != 0
        if bool((weight.signbit() & ~mask).any()):
            raise FormatError(f"{layer}: negative zeros have no place")
        return {
            "kept": weight[mask],
            "bits": (mask.view(weight.shape[0], -1, 8) * BITS).sum(-1).to(torch.uint8),
        }

    def unpack(self, tensors, layer):
        mask = (tensors["bits"][..., None] & BITS).view(len(tensors["bits"]), -1) != 0
        if int(mask.sum()) != len(tensors["kept"]):
            raise FormatError(f"{layer}: {int(mask.sum())} bits for {len(tensors['kept'])} weights")
        weight = torch.zeros(mask.shape, dtype=tensors["kept"].dtype)
        weight[mask] = tensors["kept"]
        return weight

    def header(self, stored, layer):
        kept, bits = stored["kept"], stored["bits"]
        if len(bits.shape) != 2 or bits.dtype != torch.uint8:
            raise FormatError(f"{layer}.bits is no bitmask")
        return TensorInfo(kept.file, kept.dtype, (bits.shape[0], 8 * bits.shape[1]))


@dataclass(frozen=True)
class ToBitmask(PackedExporter):
    """All pruned layers as kept weights and a bitmask."""

    name = "row_bitmask"
    format = Bitmask()


@hookimpl
def msp_register_formats():
    return [Bitmask]


@hookimpl
def msp_register_exporters():
    return [ToBitmask]
