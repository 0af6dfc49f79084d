"""Check weights in int8 against those that they were made of: zeros stay zeros, and no weight moves by more than half a step."""

from __future__ import annotations

import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.formats.base import without_shape
from msp_plugin.formats.bitmask_int8 import LARGEST, SCALE
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


def rounded_more(checkpoint: Checkpoint, reference: Checkpoint) -> bool:
    """Return True if a checkpoint's weights are rounded to int8 and the reference's are not, or one of two such forms is dense.

    The dense form is rounded to its dtype, int8 times a scale is computed in the dtype that is asked for.
    """
    lossy, reference_lossy = (c.format is not None and c.format.lossy for c in (checkpoint, reference))
    return checkpoint.rounded and (not reference.rounded or lossy != reference_lossy)


def is_rounded(checkpoint: Checkpoint, layer: str | None, before: torch.Tensor) -> bool:
    """Return True if every weight of a layer in int8 is within half a scale of ``before`` [out, in], and zero where that is.

    The scale must be no coarser than the largest weight of its row needs.

    Args:
        layer: None for a tensor that is no packed layer's.
    """
    if layer is None or checkpoint.format is None or not checkpoint.format.lossy:
        return False
    after = checkpoint.weight(layer, torch.float32)
    scale = checkpoint.tensors.read(f"{layer}.{SCALE}")
    if after.shape != before.shape or bool(after[before == 0].any()) or not _fits(scale, before):
        return False
    return bool(((before.double() - after.double()).abs() <= _HALF * scale.double()[:, None]).all())


def _fits(scale: torch.Tensor, before: torch.Tensor) -> bool:
    """Return True if each scale [out] is what its row of ``before`` [out, in] needs, but for the rounding of its dtype.

    Half of a scale that is too large would allow any weight. The scale of a row of zeros says nothing.
    """
    needed, dtype = before.abs().amax(dim=1).double() / LARGEST, torch.finfo(scale.dtype)
    off = (scale.double() - needed).abs()
    return bool(((off <= dtype.eps * needed.clamp(min=dtype.smallest_normal)) | (needed == 0)).all())
