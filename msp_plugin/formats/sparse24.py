"""``sparse-24-bitmask`` of compressed-tensors (0.6 to 0.14): two of every four weights and a bitmask.

A weight [out, in] becomes ``values`` [out, in / 2], the stored weights of each row in order, and ``bitmask``
[out, ceil(in / 8)] uint8, one bit per weight, lowest bit first. Exactly two weights of each aligned group of
four are stored; where a group holds fewer nonzeros, zeros fill the places. A 16-bit weight takes 9/16 of its dense
bytes.

Everything here works on bit patterns, so any dtype of one, two or four bytes comes back bit for bit, NaN and
negative zeros included.

Shape legend: O out_features, I in_features, G groups of four.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import torch

from msp_plugin.errors import FormatError
from msp_plugin.formats.base import SHAPE, PackedFormat, TensorInfo, unfit_headers
from msp_plugin.formats.bits import INTEGERS, SIGNED_ZERO, as_integers, row_chunks

if TYPE_CHECKING:
    from msp_plugin.plan.levels import Level

#: The tensors that stand for ``<layer>.weight`` in a checkpoint, as ``<layer>.<suffix>``.
SUFFIXES = ("compressed", "bitmask", SHAPE)
#: Dtypes of packed values. Eight-bit values need a scale, which the format does not store.
VALUE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: Kernels need out_features and in_features to be multiples of these (16-bit tiles in vLLM 0.18 and cuSPARSELt).
OUT_MULTIPLE, IN_MULTIPLE = 16, 32


def _stored(nibble: int) -> tuple[int, int]:
    """Return the two places of a group that are stored: the nonzeros, filled up with the first zeros."""
    nonzeros = [i for i in range(4) if nibble >> i & 1]
    zeros = [i for i in range(4) if not nibble >> i & 1]
    first, second = sorted((nonzeros + zeros)[:2])
    return first, second


#: Marks a group that 2:4 cannot hold in the table below.
_TOO_MANY = 16
#: By the four bits that say which weights of a group are nonzero: the places stored [16, 2], and the four bits of the
#: bitmask [16].
_PLACES = torch.tensor([_stored(n) for n in range(16)])
_NIBBLE = torch.tensor(
    [sum(1 << i for i in _stored(n)) if n.bit_count() <= 2 else _TOO_MANY for n in range(16)],
    dtype=torch.uint8,
)
#: By byte of the bitmask: the columns, 0 to 7, of its four stored weights [256, 4]; -1 for a byte that does not store
#: two in each half.
_TARGETS = torch.full((256, 4), -1)
for _low in combinations(range(4), 2):
    for _high in combinations(range(4, 8), 2):
        _TARGETS[sum(1 << i for i in _low + _high)] = torch.tensor(_low + _high)


@dataclass(frozen=True)
class Packed:
    """A packed weight.

    Args:
        values: [O, I / 2] in the weight's dtype.
        bitmask: uint8 [O, ceil(I / 8)].
        shape: (O, I) of the weight.
    """

    values: torch.Tensor
    bitmask: torch.Tensor
    shape: tuple[int, int]

    @property
    def by_suffix(self) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint; ``shape`` is int64 [2, 1], as compressed-tensors wrote it."""
        shape = torch.tensor(self.shape, dtype=torch.int64).reshape(2, 1)
        return dict(zip(SUFFIXES, (self.values, self.bitmask, shape), strict=True))

    def tensors(self, layer: str) -> dict[str, torch.Tensor]:
        """Return the checkpoint's tensors for a layer, by their names."""
        return {f"{layer}.{suffix}": tensor for suffix, tensor in self.by_suffix.items()}

    @property
    def bytes(self) -> int:
        """Bytes of values and bitmask."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.bitmask))


def pack(weight: torch.Tensor, name: str = "weight") -> Packed:
    """Return the packed form of a weight [O, I]; ``unpack`` gives the same bits back.

    Args:
        name: for the errors.

    Raises:
        FormatError: not a matrix, I is not a multiple of four, a dtype whose size is not 1, 2 or 4 bytes, or a group
            of four holds more than two weights whose bits are not all zero. A negative zero counts as such a
            weight: see ``positive_zeros``.
    """
    bits = _as_bits(weight, name)
    rows, columns = weight.shape
    values = torch.empty(rows, columns // 2, dtype=bits.dtype, device=bits.device)
    bitmask = torch.empty(rows, -(-columns // 8), dtype=torch.uint8, device=bits.device)
    places, nibbles = _PLACES.to(bits.device), _NIBBLE.to(bits.device)
    for part in row_chunks(rows, columns):
        found = _nonzero_nibbles(bits[part])
        flat = found.reshape(-1)
        stored = nibbles.index_select(0, flat).reshape(found.shape)
        if bool(stored.max() == _TOO_MANY):
            raise _refusal(weight, name)
        index = places.index_select(0, flat)
        values[part] = bits[part].reshape(-1, 4).gather(1, index).reshape(-1, columns // 2)
        if found.shape[1] % 2:  # the last byte of a row has one group only
            stored = torch.nn.functional.pad(stored, (0, 1))
        bitmask[part] = stored[:, 0::2] | (stored[:, 1::2] << 4)
    return Packed(values.view(weight.dtype), bitmask, (rows, columns))


def unpack(packed: Packed, name: str = "weight") -> torch.Tensor:
    """Return the weight [O, I] of a packed form.

    Raises:
        FormatError: shapes or dtypes contradict each other, or the bitmask does not store exactly two weights
            in every group of four.
    """
    values, bitmask = _checked(packed, name)
    rows, columns = packed.shape
    out = torch.empty(rows, columns, dtype=values.dtype, device=values.device)
    targets, odd = _TARGETS.to(values.device), columns % 8 != 0
    for part in row_chunks(rows, columns):
        block, mask = values[part], bitmask[part]
        filled = True
        if odd:  # a half-empty last byte: two zeros are stored in its upper half, and cut off again
            filled = bool((mask[:, -1] < 16).all())
            mask = torch.cat([mask[:, :-1], mask[:, -1:] | 0x30], dim=1)
            block = torch.nn.functional.pad(block, (0, 2))
        index = targets.index_select(0, mask.reshape(-1).int())
        if not filled or bool((index < 0).any()):
            raise FormatError(
                f"{name}: the bitmask does not store two of four weights in every group",
                hint="the file is damaged; export or download it again",
            )
        body = torch.zeros(mask.numel(), 8, dtype=values.dtype, device=values.device)
        body.scatter_(1, index, block.reshape(-1, 4))
        out[part] = body.view(len(mask), -1)[:, :columns]
    return out.view(packed.values.dtype)


def is_packable(weight: torch.Tensor) -> bool:
    """Return True if no aligned group of four of a weight [O, I] holds more than two nonzeros (by value)."""
    if (
        weight.dim() != 2
        or weight.shape[1] % 4
        or weight.element_size() not in INTEGERS
        or not weight.numel()
    ):
        return False
    bits, nibbles = as_integers(weight), _NIBBLE.to(weight.device)
    sign = torch.iinfo(bits.dtype).min if weight.dtype in SIGNED_ZERO else 0
    for part in row_chunks(*weight.shape):
        nonzero = bits[part] if not sign else bits[part] & ~sign
        if bool(nibbles.index_select(0, _nonzero_nibbles(nonzero).reshape(-1)).max() == _TOO_MANY):
            return False
    return True


def _as_bits(weight: torch.Tensor, name: str) -> torch.Tensor:
    if weight.dim() != 2 or not weight.numel():
        raise FormatError(
            f"{name}: shape {tuple(weight.shape)} is not a matrix", hint="only linears are packed"
        )
    if weight.shape[1] % 4:
        raise FormatError(
            f"{name}: in_features = {weight.shape[1]} is not a multiple of 4", hint="keep it dense"
        )
    if weight.element_size() not in INTEGERS or weight.is_complex():
        raise FormatError(
            f"{name}: dtype {weight.dtype} cannot be packed", hint="use 1, 2 or 4 bytes a weight"
        )
    return as_integers(weight)


def _nonzero_nibbles(bits: torch.Tensor) -> torch.Tensor:
    """Return int32 [rows, G]: bit i says that weight i of the group is not zero.

    The four booleans of a group are one 32-bit word b0 + b1 2^8 + b2 2^16 + b3 2^24; times 2^24 + 2^17 + 2^10
    + 2^3 the bits 24 to 27 of the product are b0, b1, b2, b3, and no two terms meet in one bit.
    """
    words = (bits != 0).view(torch.int32)
    return (words * 0x01020408 >> 24) & 15


def _refusal(weight: torch.Tensor, name: str) -> FormatError:
    """Return the error for a weight that is not 2:4; it counts the groups that do not fit."""
    groups = (weight.detach().reshape(weight.shape[0], -1, 4).float() != 0).sum(-1)
    over = groups > 2
    if not bool(over.any()):
        return FormatError(
            f"{name}: negative zeros stand where 2:4 has no place for them",
            hint="make them positive first (positive_zeros): no value changes",
        )
    row, group = divmod(int(over.reshape(-1).int().argmax()), groups.shape[1])
    return FormatError(
        f"{name} is not 2:4: {int(over.sum()):,} of {over.numel():,} groups of four hold more than two "
        f"nonzeros, the first in row {row}, columns {4 * group} to {4 * group + 3}",
        hint="keep the layer dense, or prune it to a level that 2:4 holds (2:4, 1:4, 2:8, 1:8, ...)",
    )


def _checked(packed: Packed, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values as integers, bitmask) of a packed form.

    Raises:
        FormatError: shapes and dtypes do not agree.
    """
    rows, columns = packed.shape
    if min(rows, columns) < 1 or columns % 4:
        raise FormatError(f"{name}: shape ({rows}, {columns}) is not that of a 2:4 matrix")
    expected = ((rows, columns // 2), (rows, -(-columns // 8)))
    found = (tuple(packed.values.shape), tuple(packed.bitmask.shape))
    if found != expected or packed.bitmask.dtype != torch.uint8:
        raise FormatError(
            f"{name}: values {list(found[0])} and {packed.bitmask.dtype} bitmask {list(found[1])} do not "
            f"belong to a weight [{rows}, {columns}]",
            hint=f"expected values {list(expected[0])} and torch.uint8 bitmask {list(expected[1])}",
        )
    if packed.values.element_size() not in INTEGERS or packed.values.is_complex():
        raise FormatError(f"{name}: dtype {packed.values.dtype} cannot be unpacked")
    return as_integers(packed.values), packed.bitmask


@dataclass(frozen=True)
class Sparse24Bitmask(PackedFormat):
    """Two of every four weights and a bitmask, for 2:4 kernels."""

    name = "sparse-24-bitmask"
    structure = "2:4"
    least_sparsity = 0.5
    suffixes = SUFFIXES
    own_suffixes = SUFFIXES[:2]
    description = "two of every four weights and a bitmask"
    served = True

    def refuses(
        self, layer: str, shape: tuple[int, ...], dtype: torch.dtype, level: Level | None
    ) -> str | None:
        if level is not None and not level.servable:
            return f"level {level.name} does not run on 2:4 kernels"
        if "experts" in layer.split("."):
            return "experts are served dense"
        rows, columns = shape
        if rows % OUT_MULTIPLE or columns % IN_MULTIPLE:
            return f"shape [{rows}, {columns}] is not a multiple of [{OUT_MULTIPLE}, {IN_MULTIPLE}]"
        return None if dtype in VALUE_DTYPES else f"dtype {dtype} is not served"

    def refuses_weight(self, weight: torch.Tensor) -> str | None:
        return None if is_packable(weight) else "its weights are not 2:4"

    def sizes(self, shape: tuple[int, int], dtype: torch.dtype, kept: int) -> dict[str, int]:
        rows, columns = shape
        sizes = (rows * (columns // 2) * dtype.itemsize, rows * -(-columns // 8), 16)
        return dict(zip(SUFFIXES, sizes, strict=True))

    def pack(self, weight: torch.Tensor, layer: str) -> dict[str, torch.Tensor]:
        return pack(weight, layer).by_suffix

    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor:
        values, bitmask, shape = (tensors[suffix] for suffix in SUFFIXES)
        rows, columns = values.shape[0], 2 * values.shape[1]
        stored_shape = shape.reshape(-1).tolist()
        if shape.is_floating_point() or stored_shape != [rows, columns]:
            raise FormatError(
                f"{layer}.shape says {stored_shape}, its values are those of a weight [{rows}, {columns}]",
                hint="the file is damaged: export or download it again",
            )
        return unpack(Packed(values, bitmask, (rows, columns)), layer)

    def header(self, stored: Mapping[str, TensorInfo], layer: str) -> TensorInfo:
        values, bitmask, shape = (stored[suffix] for suffix in SUFFIXES)
        rows, half = values.shape if len(values.shape) == 2 else (0, 0)
        right = (
            rows > 0
            and half > 0
            and half % 2 == 0
            and values.dtype in VALUE_DTYPES
            and (bitmask.dtype, bitmask.shape) == (torch.uint8, (rows, -(-half // 4)))
            and (shape.dtype, shape.bytes) == (torch.int64, 16)
        )
        if not right:
            expected = (
                "compressed [out, in / 2] in float16, bfloat16 or float32, bitmask uint8 [out, in / 8] and "
                "shape int64 [2, 1]"
            )
            raise unfit_headers(layer, {suffix: stored[suffix] for suffix in SUFFIXES}, expected)
        return TensorInfo(values.file, values.dtype, (rows, 2 * half))
