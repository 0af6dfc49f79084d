"""Weights as bit patterns: zeros with a sign, and equality bit for bit."""

from __future__ import annotations

import torch

#: Weights handled at once; bounds the temporary memory to about 16 bytes for each.
CHUNK = 2**20
#: The integer dtype of each size in bytes.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
#: Dtypes with a negative zero, whose only set bit is the sign.
SIGNED_ZERO = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)


def as_integers(weight: torch.Tensor) -> torch.Tensor:
    """Return the bits of a weight as integers of 1, 2 or 4 bytes, in its memory if it is contiguous."""
    return weight.detach().contiguous().view(INTEGERS[weight.element_size()])


def row_chunks(rows: int, columns: int) -> list[slice]:
    """Return slices of the rows of a matrix, of at most ``CHUNK`` weights or one row."""
    step = max(1, CHUNK // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def positive_zeros(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the weight with every negative zero made positive, and how many there were.

    No value changes: -0.0 equals 0.0, and a product with either adds the same to a sum. The weight itself
    comes back if it has none.
    """
    if weight.dtype not in SIGNED_ZERO:
        return weight, 0
    bits = as_integers(weight).reshape(-1)
    sign = torch.iinfo(bits.dtype).min
    count = sum(int(torch.count_nonzero(part == sign)) for part in torch.split(bits, CHUNK))
    if not count:
        return weight, 0
    changed = bits.clone()
    for part in torch.split(changed, CHUNK):
        part.masked_fill_(part == sign, 0)
    return changed.view(weight.dtype).reshape(weight.shape), count


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return True if dtype, shape and bytes are the same: NaN equals NaN, -0.0 differs from 0.0."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    bytes_of_first, bytes_of_second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (first, second))
    return torch.equal(bytes_of_first, bytes_of_second)
