"""Check weights in int8 against those that they were made of: zeros stay zeros, and no weight moves by more than half a step."""

from __future__ import annotations

import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.formats.base import without_shape
from msp_plugin.formats.bitmask_int8 import SCALE
from msp_plugin.progress import StepProgress
from msp_plugin.verify.base import OK, Finding

#: Half a scale, and what rounding the product of a value and a scale to float32 adds to it.
_HALF = 0.5 + 127 * 2**-24


def readable(checkpoint: Checkpoint, progress: StepProgress) -> Finding:
    """Return the finding that every packed layer can be read, and its bytes; unpacking refuses damage.

    Raises:
        FormatError: a layer is damaged.
    """
    assert checkpoint.format is not None, "a packed checkpoint has a format"
    stored = dense = 0
    for i, layer in enumerate(checkpoint.packed, 1):
        weight = checkpoint.weight(layer)
        dense += weight.nbytes
        names = {suffix: f"{layer}.{suffix}" for suffix in checkpoint.format.suffixes}
        stored += without_shape({suffix: checkpoint.tensors[name].bytes for suffix, name in names.items()})
        progress("round trip", i, len(checkpoint.packed))
    return Finding(
        "unpack",
        OK,
        f"{len(checkpoint.packed)} layers in int8; {stored:,} bytes packed, {dense:,} dense ({stored / dense:.4f})",
        details={"packed_bytes": stored, "dense_bytes": dense},
    )


def is_rounded(checkpoint: Checkpoint, layer: str | None, before: torch.Tensor) -> bool:
    """Return True if every weight of a layer in int8 is within half a scale of ``before`` [out, in], and zero where that is.

    Args:
        layer: None for a tensor that is no packed layer's.
    """
    if layer is None or checkpoint.format is None or not checkpoint.format.lossy:
        return False
    after = checkpoint.weight(layer, torch.float32)
    scale = checkpoint.tensors.read(f"{layer}.{SCALE}").double()[:, None]
    if after.shape != before.shape or bool(after[before == 0].any()):
        return False
    return bool(((before.double() - after.double()).abs() <= _HALF * scale).all())
