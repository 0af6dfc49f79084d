"""A level of the database on disk: kept values and a bitmask over all rows, for any pattern of zeros.

numpy finds the places of the ones, because torch's masked_scatter and nonzero are slower on a CPU.
integration/database_bench.py measures the cost of reading against a dense copy.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from msp_plugin.errors import FormatError


def bitmask_bytes(out_features: int, in_features: int) -> int:
    """Return the bytes of the bitmask of a weight [out, in]."""
    return (out_features * in_features + 7) // 8


def pack_bitmask(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (kept values [n] by rows, bitmask uint8[ceil(out * in / 8)] of little-endian bits).

    -0.0, which methods leave that multiply by a mask, is not kept and comes back as 0.0. All other values, also
    NaN, come back bit for bit.

    Args:
        weight: [out, in], on the CPU, of any floating dtype.
    """
    flat = weight.contiguous().view(-1)
    kept = (flat != 0).numpy()
    return flat[torch.from_numpy(np.flatnonzero(kept))], torch.from_numpy(
        np.packbits(kept, bitorder="little")
    )


def unpack_bitmask(values: torch.Tensor, mask: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Return the weight [out, in] that pack_bitmask packed, on the CPU.

    Raises:
        FormatError: the mask is for another shape, or does not have as many ones as there are values.
    """
    count = math.prod(shape)
    if mask.numel() != bitmask_bytes(*shape):
        raise FormatError(
            f"the bitmask has {mask.numel()} bytes, a weight of {shape} takes {bitmask_bytes(*shape)}"
        )
    kept = np.unpackbits(mask.numpy(), count=count, bitorder="little").view(np.bool_)
    places = torch.from_numpy(np.flatnonzero(kept))
    if len(places) != len(values):
        raise FormatError(f"the bitmask has {len(places)} ones, there are {len(values)} values")
    weight = torch.zeros(count, dtype=values.dtype)
    weight[places] = values
    return weight.view(shape)
