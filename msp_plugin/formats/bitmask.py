"""``sparse-bitmask`` of compressed-tensors (up to 0.14.0.1): the nonzero weights and a bitmask, for any pattern of zeros.

A weight [out, in] becomes ``compressed`` [n], its nonzeros row by row; ``bitmask`` uint8 [out, ceil(in / 8)], one
bit per weight, lowest bit first, each row in bytes of its own; ``row_offsets`` int64 [out], where each row starts
in ``compressed``; and ``shape`` int64 [2]. A 16-bit weight that keeps the share k takes k + 1/16 + 4/in of its
dense bytes.

The layout is that of ``BitmaskTensor`` in compressed_tensors/compressors/sparse_compressors/sparse_bitmask.py. All
values but negative zeros, which it does not store, come back bit for bit, NaN included. numpy does the work, on
the CPU: its boolean indexing was the fastest of six ways to place the values.

Shape legend: O out_features, I in_features, B bytes of a row of the bitmask, N nonzeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from msp_plugin.errors import FormatError
from msp_plugin.formats.base import SHAPE, PackedFormat, TensorInfo, unfit_headers
from msp_plugin.formats.bits import INTEGERS, as_integers, positive_zeros, row_chunks
from msp_plugin.formats.sparse24 import VALUE_DTYPES
from msp_plugin.formats.tensor_files import read_tensor
from msp_plugin.plan.units import Layer

if TYPE_CHECKING:
    from msp_plugin.plan.levels import Level

#: The tensors that stand for ``<layer>.weight`` in a checkpoint, as ``<layer>.<suffix>``.
SUFFIXES = ("compressed", "bitmask", "row_offsets", SHAPE)
#: The number of ones in each byte.
_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


@dataclass(frozen=True)
class Packed:
    """A packed weight, on the CPU.

    Args:
        values: [N] in the weight's dtype, row by row.
        bitmask: uint8 [O, B].
        row_offsets: int64 [O], the first value of each row.
        shape: (O, I) of the weight.
    """

    values: torch.Tensor
    bitmask: torch.Tensor
    row_offsets: torch.Tensor
    shape: tuple[int, int]

    @property
    def by_suffix(self) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint; ``shape`` is int64 [2], as compressed-tensors wrote it."""
        shape = torch.tensor(self.shape, dtype=torch.int64)
        return dict(zip(SUFFIXES, (self.values, self.bitmask, self.row_offsets, shape), strict=True))

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], layer: str) -> Packed:
        """Return the packed weight of a checkpoint's tensors by suffix, which ``unpack`` checks further.

        Raises:
            FormatError: ``shape`` does not hold the two sizes of a matrix.
        """
        values, bitmask, row_offsets, shape = (tensors[suffix].cpu() for suffix in SUFFIXES)
        return cls(values, bitmask, row_offsets, _sizes(shape, layer))


def pack(weight: torch.Tensor, name: str = "weight") -> Packed:
    """Return the packed form of a weight [O, I], on the CPU; ``unpack`` gives the same bits back.

    Args:
        weight: on any device.
        name: for the errors.

    Raises:
        FormatError: not a matrix, a dtype whose size is not 1, 2 or 4 bytes, or a negative zero, which the layout
            does not store: see ``positive_zeros``.
    """
    if weight.dim() != 2 or not weight.numel():
        raise FormatError(
            f"{name}: shape {tuple(weight.shape)} is not a matrix", hint="only linears are packed"
        )
    if weight.element_size() not in INTEGERS or weight.is_complex():
        raise FormatError(
            f"{name}: dtype {weight.dtype} cannot be packed", hint="use 1, 2 or 4 bytes a weight"
        )
    weight = weight.detach().cpu()
    if negative := positive_zeros(weight)[1]:
        raise FormatError(
            f"{name}: {negative:,} negative zeros, which the layout does not store",
            hint="make them positive first (positive_zeros): no value changes",
        )
    rows, columns = weight.shape
    integers, chunks = as_integers(weight), row_chunks(rows, columns)
    bits = integers.numpy()
    bitmask = np.empty((rows, -(-columns // 8)), dtype=np.uint8)
    for part in chunks:
        bitmask[part] = np.packbits(bits[part] != 0, axis=1, bitorder="little")
    ends = _row_counts(bitmask).cumsum()
    values = torch.empty(int(ends[-1]), dtype=integers.dtype)
    for part in chunks:
        values.numpy()[_span(ends, part)] = bits[part][bits[part] != 0]
    offsets = torch.from_numpy(np.concatenate([[0], ends[:-1]]))
    return Packed(values.view(weight.dtype), torch.from_numpy(bitmask), offsets, (rows, columns))


def unpack(packed: Packed, name: str = "weight") -> torch.Tensor:
    """Return the weight [O, I] of a packed form, on the CPU.

    Raises:
        FormatError: shapes or dtypes contradict each other, the bitmask does not keep N weights or keeps some beyond
            the last column, or row_offsets disagree with the bitmask.
    """
    _check_headers(packed, name)
    rows, columns = packed.shape
    bitmask, values = packed.bitmask.numpy(), as_integers(packed.values).numpy()
    ends = _checked_ends(packed, name)
    out = np.zeros((rows, columns), dtype=values.dtype)
    for part in row_chunks(rows, columns):
        kept = np.unpackbits(bitmask[part], axis=1, count=columns, bitorder="little").view(np.bool_)
        out[part][kept] = values[_span(ends, part)]
    return torch.from_numpy(out).view(packed.values.dtype)


def _row_counts(bitmask: np.ndarray) -> np.ndarray:
    """Return int64 [O], the ones in each row of a bitmask."""
    counts: np.ndarray = _ONES[bitmask].sum(axis=1, dtype=np.int64)
    return counts


def _span(ends: np.ndarray, part: slice) -> slice:
    """Return the slice of the values that belongs to the rows ``part``; ``ends`` are the rows' ends in the values."""
    return slice(int(ends[part.start - 1]) if part.start else 0, int(ends[part.stop - 1]))


def _checked_ends(packed: Packed, name: str) -> np.ndarray:
    """Return int64 [O], the end of each row in the values.

    Raises:
        FormatError: bitmask, row_offsets and values do not agree.
    """
    bitmask, (_, columns) = packed.bitmask.numpy(), packed.shape
    counts = _row_counts(bitmask)
    ends: np.ndarray = counts.cumsum()
    wrong = np.flatnonzero(packed.row_offsets.numpy() != ends - counts)
    reason = ""
    if columns % 8 and (bitmask[:, -1] >> columns % 8).any():
        reason = f"the bitmask keeps weights beyond its {columns} columns"
    elif ends[-1] != len(packed.values):
        reason = f"the bitmask keeps {ends[-1]:,} weights, there are {len(packed.values):,} values"
    elif wrong.size:
        row = wrong[0]
        reason = (
            f"row {row} starts at value {int(packed.row_offsets[row]):,}, by the bitmask at "
            f"{ends[row] - counts[row]:,}"
        )
    if reason:
        raise FormatError(f"{name}: {reason}", hint="the file is damaged: export or download it again")
    return ends


def _check_headers(packed: Packed, name: str) -> None:
    """Raise unless the shapes and dtypes of a packed form agree."""
    rows, columns = packed.shape
    values, bitmask, offsets = packed.values, packed.bitmask, packed.row_offsets
    if (
        min(rows, columns) < 1
        or (bitmask.dtype, tuple(bitmask.shape)) != (torch.uint8, (rows, -(-columns // 8)))
        or (offsets.dtype, tuple(offsets.shape)) != (torch.int64, (rows,))
        or values.dim() != 1
    ):
        raise FormatError(
            f"{name}: values {list(values.shape)}, {bitmask.dtype} bitmask {list(bitmask.shape)} and "
            f"{offsets.dtype} row_offsets {list(offsets.shape)} do not belong to a weight [{rows}, {columns}]",
            hint=f"expected values of one dimension, torch.uint8 bitmask [{rows}, {-(-columns // 8)}] and "
            f"torch.int64 row_offsets [{rows}]; the file is damaged: export or download it again",
        )
    if values.element_size() not in INTEGERS or values.is_complex():
        raise FormatError(f"{name}: dtype {values.dtype} cannot be unpacked")


def _sizes(shape: torch.Tensor, layer: str) -> tuple[int, int]:
    """Return (O, I) from the tensor ``shape``.

    Raises:
        FormatError: it does not hold two whole numbers of at least 1.
    """
    sizes = shape.reshape(-1).tolist()
    if shape.dtype != torch.int64 or len(sizes) != 2 or min(sizes) < 1:
        raise FormatError(
            f"{layer}.shape holds {sizes[:3]} as {shape.dtype}, expected two sizes as torch.int64",
            hint="the file is damaged: export or download it again",
        )
    return sizes[0], sizes[1]


@dataclass(frozen=True)
class SparseBitmask(PackedFormat):
    """The nonzero weights and a bitmask, for any level."""

    name = "sparse-bitmask"
    structure = "unstructured"
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES
    own_suffixes = SUFFIXES[:3]
    description = "the nonzero weights, a bitmask, and where each row starts"
    fused_together = False
    served = True
    value_dtypes: ClassVar[tuple[torch.dtype, ...]] = VALUE_DTYPES

    def refuses(
        self, layer: str, shape: tuple[int, ...], dtype: torch.dtype, level: Level | None
    ) -> str | None:
        if "experts" in layer.split("."):
            return "experts are served dense"
        if dtype not in VALUE_DTYPES:
            return f"dtype {dtype} is not served"
        rows, columns = shape
        if level is None:
            return None
        # How many weights a width keeps of a layer depends on its unit; the share is near enough to choose a form.
        kept = (
            round(rows * columns * (1 - level.sparsity))
            if level.narrows
            else level.kept(Layer(layer, rows, columns))
        )
        return self._cost((rows, columns), dtype, kept, f"at level {level.name} ")

    def refuses_weight(self, weight: torch.Tensor) -> str | None:
        rows, columns = weight.shape
        return self._cost((rows, columns), weight.dtype, int(torch.count_nonzero(weight)))

    def _cost(self, shape: tuple[int, int], dtype: torch.dtype, kept: int, level: str = "") -> str | None:
        """Return the reason that packing saves no bytes, or None if it does."""
        packed, dense = sum(self.sizes(shape, dtype, kept).values()), shape[0] * shape[1] * dtype.itemsize
        return (
            f"{level}packing does not pay ({packed:,} bytes packed, {dense:,} dense)"
            if packed >= dense
            else None
        )

    def sizes(self, shape: tuple[int, int], dtype: torch.dtype, kept: int) -> dict[str, int]:
        rows, columns = shape
        sizes = (kept * dtype.itemsize, rows * -(-columns // 8), 8 * rows, 16)
        return dict(zip(SUFFIXES, sizes, strict=True))

    def pack(self, weight: torch.Tensor, layer: str) -> dict[str, torch.Tensor]:
        return pack(weight, layer).by_suffix

    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor:
        return unpack(Packed.of(tensors, layer), layer)

    def header(self, stored: Mapping[str, TensorInfo], layer: str) -> TensorInfo:
        """Return the header of the dense weight; reads the tensor ``shape``, which alone knows in_features."""
        values, bitmask, offsets, shape = (stored[suffix] for suffix in SUFFIXES)
        rows, width = bitmask.shape if len(bitmask.shape) == 2 else (0, 0)
        right = (
            rows > 0
            and width > 0
            and values.dtype in self.value_dtypes
            and len(values.shape) == 1
            and values.shape[0] <= 8 * rows * width
            and bitmask.dtype == torch.uint8
            and (offsets.dtype, offsets.shape) == (torch.int64, (rows,))
            and (shape.dtype, shape.bytes) == (torch.int64, 16)
        )
        if not right:
            dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.value_dtypes)
            expected = f"compressed [n] in {dtypes}, bitmask uint8 [out, in / 8], row_offsets int64 [out] and shape int64 [2]"
            raise unfit_headers(layer, {suffix: stored[suffix] for suffix in SUFFIXES}, expected)
        sizes = _sizes(read_tensor(shape.file, f"{layer}.{SHAPE}"), layer)
        if (rows, width) != (sizes[0], -(-sizes[1] // 8)):
            raise FormatError(
                f"{layer}.shape says {list(sizes)}, its bitmask is [{rows}, {width}]",
                hint="the file is damaged: export or download it again",
            )
        return TensorInfo(values.file, values.dtype, sizes)
