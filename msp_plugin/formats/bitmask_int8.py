"""The bitmask layout with values in int8: each row has a scale, and a weight is its value times the row's scale.

The tensors are those of ``sparse-bitmask`` (bitmask.py), with ``compressed`` int8 [n], and ``scale`` [out] in the dtype
of the weight, which is how that dtype is recorded. Values run from -127 to 127 and are never zero: a kept weight that
rounds to zero leaves the bitmask. A 16-bit weight that keeps the share k takes k/2 + 1/16 + 5/in of its dense bytes.

Symmetric round-to-nearest with a scale of the largest magnitude of the row over 127, as in equations 1 to 4 of Nagel et
al., "A White Paper on Neural Network Quantization" (arXiv 2106.08295), with one scale for each output. One deviation:
the scale is rounded to the weight's dtype before values are made by it, so that a weight is at most half a scale off.

Shape legend: O out_features, I in_features, N values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from msp_plugin.errors import FormatError
from msp_plugin.formats import bitmask
from msp_plugin.formats.base import TensorInfo, unfit_headers
from msp_plugin.formats.bits import INTEGERS, row_chunks
from msp_plugin.formats.sparse24 import VALUE_DTYPES

SCALE = "scale"
#: The tensors that stand for ``<layer>.weight`` in a checkpoint, as ``<layer>.<suffix>``.
SUFFIXES = (*bitmask.SUFFIXES, SCALE)
#: The largest magnitude of a value.
LARGEST = 127
#: The most that quantizing may change a layer, by Frobenius norms, relative to the layer; and the largest share of its
#: nonzero weights that may become zero, which the norm does not show beside very large weights. Normal weights reach both
#: where the largest of each row is 13 standard deviations. Layers of the demo models at 75 % and of SmolLM2-135M at 62.5
#: and 75 % change by 0.0036 to 0.0101, and lose at most 0.0162.
MOST_ERROR, MOST_LOST = 0.03, 0.04


def quantize(weight: torch.Tensor, name: str = "weight") -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values int8 [O, I] of a weight [O, I] and the scales [O] of its rows, in its dtype, on the CPU.

    A value times its row's scale is at most half a scale from the weight. A row of zeros has the scale 1.

    Args:
        weight: in one of VALUE_DTYPES, on any device.
        name: for the errors.

    Raises:
        FormatError: the weight is no matrix of those dtypes, or not finite.
    """
    if weight.dim() != 2 or not weight.numel() or weight.dtype not in VALUE_DTYPES:
        raise FormatError(
            f"{name}: {weight.dtype} {list(weight.shape)} cannot be stored in int8",
            hint="expected a matrix in float16, bfloat16 or float32",
        )
    weight = weight.detach().cpu()
    largest = weight.abs().amax(dim=1).double()
    if not bool(largest.isfinite().all()):
        raise FormatError(
            f"{name}: row {int((~largest.isfinite()).nonzero()[0])} holds weights that are not finite",
            hint="store it with values=original",
        )
    scale = (largest / LARGEST).to(weight.dtype)
    # Only where a scale is subnormal can rounding it down leave a value out of range.
    bits = scale.view(INTEGERS[scale.element_size()])
    bits += largest >= (LARGEST + 0.5) * scale.double()
    scale[largest == 0] = 1
    values = torch.empty(weight.shape, dtype=torch.int8)
    for part in row_chunks(*weight.shape):
        values[part] = (weight[part].double() / scale[part].double()[:, None]).round_().to(torch.int8)
    return values, scale


def dequantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the weight [O, I] of values int8 [O, I] and scales [O], in the scales' dtype, each product rounded once."""
    weight = torch.empty(values.shape, dtype=scale.dtype)
    for part in row_chunks(*values.shape):
        weight[part] = (values[part].float() * scale[part].float()[:, None]).to(scale.dtype)
    return weight


def error(weight: torch.Tensor, stored: torch.Tensor) -> float:
    """Return how far a stored weight [O, I] is from the one before, by Frobenius norms, relative to that one."""
    norm = weight.double().norm()
    return float((stored.double() - weight.double()).norm() / norm) if norm else 0.0


@dataclass(frozen=True)
class Int8Bitmask(bitmask.SparseBitmask):
    """The nonzero weights in int8 with a scale for each row, and a bitmask, for any level."""

    name = "sparse-bitmask-int8"
    suffixes = SUFFIXES
    value_dtypes = (torch.int8,)
    description = "the nonzero weights in int8, a scale for each row, a bitmask, and where each row starts"
    lossy = True

    def refuses_weight(self, weight: torch.Tensor) -> str | None:
        try:
            values, scale = quantize(weight)
        except FormatError as reason:
            return reason.message.removeprefix("weight: ")
        change = error(weight.cpu(), dequantize(values, scale))
        if not change <= MOST_ERROR:
            return f"int8 changes it too much (by {change:.3g} of its norm, at most {MOST_ERROR:g})"
        before, after = int(torch.count_nonzero(weight)), int(torch.count_nonzero(values))
        if before - after > MOST_LOST * before:
            return (
                f"int8 makes too many weights zero ({before - after:,} of {before:,}, at most {MOST_LOST:g})"
            )
        return self._cost((weight.shape[0], weight.shape[1]), weight.dtype, after)

    def sizes(self, shape: tuple[int, int], dtype: torch.dtype, kept: int) -> dict[str, int]:
        return super().sizes(shape, torch.int8, kept) | {SCALE: shape[0] * dtype.itemsize}

    def pack(self, weight: torch.Tensor, layer: str) -> dict[str, torch.Tensor]:
        """Return the tensors by suffix; ``unpack`` gives each weight back within half a scale of its row.

        Raises:
            FormatError: the weight does not fit, or is not finite.
        """
        values, scale = quantize(weight, layer)
        return {**bitmask.pack(values, layer).by_suffix, SCALE: scale}

    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor:
        return dequantize(*self.values(tensors, layer))

    def values(self, tensors: Mapping[str, torch.Tensor], layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values int8 [O, I] and the scales [O] of a layer's tensors by suffix.

        Raises:
            FormatError: the tensors contradict each other, or hold numbers that quantizing never makes.
        """
        stored, scale = tensors["compressed"], tensors[SCALE].cpu()
        reason = ""
        if stored.dtype != torch.int8:
            reason = f"its values are {stored.dtype}, expected torch.int8"
        elif bool((stored == 0).any()) or bool((stored < -LARGEST).any()):
            reason = f"it has values of 0 or below -{LARGEST}"
        elif scale.dtype not in VALUE_DTYPES or tuple(scale.shape) != tuple(tensors["row_offsets"].shape):
            reason = f"its scale is {scale.dtype} {list(scale.shape)}, expected a number for each row"
        elif not bool(((scale > 0) & scale.isfinite()).all()):
            reason = "it has a scale that is not above 0, or not finite"
        if reason:
            raise FormatError(f"{layer}: {reason}", hint="the file is damaged: export or download it again")
        return bitmask.unpack(bitmask.Packed.of(tensors, layer), layer), scale

    def header(self, stored: Mapping[str, TensorInfo], layer: str) -> TensorInfo:
        values, scale = super().header(stored, layer), stored[SCALE]
        if scale.dtype not in VALUE_DTYPES or scale.shape != values.shape[:1]:
            expected = "compressed int8 [n] and scale [out] in float16, bfloat16 or float32"
            raise unfit_headers(layer, {s: stored[s] for s in ("compressed", SCALE)}, expected)
        return TensorInfo(values.file, scale.dtype, values.shape)
