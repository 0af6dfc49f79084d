"""Check that a smaller checkpoint's tensors are slices of its reference's, and that the rest contributed nothing."""

from __future__ import annotations

import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.errors import FormatError
from msp_plugin.formats.bits import positive_zeros, same_bits
from msp_plugin.progress import StepProgress
from msp_plugin.structure.halves import find_halves
from msp_plugin.structure.slices import Slices
from msp_plugin.structure.small_model import empty_model
from msp_plugin.verify.base import FAIL, OK, Finding
from msp_plugin.verify.rounded import is_rounded


def is_smaller(checkpoint: Checkpoint, reference: Checkpoint) -> bool:
    """Return True if a checkpoint was cut from a larger model and the reference is not as wide as it.

    A smaller model that is packed, and the same one dense, are compared like any other.

    Raises:
        MSPError: a config is damaged, or the reference's heads and channels cannot be removed.
    """
    if not checkpoint.smaller:
        return False
    widths = [
        {half.name: half.groups for half in find_halves(empty_model(c.path))} for c in (checkpoint, reference)
    ]
    return widths[0] != widths[1]


def sliced(checkpoint: Checkpoint, reference: Checkpoint, progress: StepProgress) -> list[Finding]:
    """Compare every tensor with its slice of the reference as export.json records it, and check what was left out.

    Raises:
        FormatError: the record is missing, damaged or of another model.
    """
    manifest, structure = checkpoint.manifest, reference.structure
    if manifest is None or not manifest.structure:
        raise FormatError(
            f"{checkpoint.path} has no export.json that says what it kept of {reference.path}",
            hint="a recovery changes weights, so that they are no slices: compare with quality",
        )
    slices = Slices.from_record(manifest.structure, structure.halves, structure.depth)
    return [_slices(checkpoint, reference, slices, progress), _left_out(reference, slices)]


def _slices(checkpoint: Checkpoint, reference: Checkpoint, slices: Slices, progress: StepProgress) -> Finding:
    """Compare names, shapes and bits of all tensors; weights in int8 may be half a scale away."""
    expected = {after: name for name in reference.dense_names if (after := slices.name(name)) is not None}
    lost = sorted(set(expected) - set(checkpoint.dense_names))
    odd = sorted(set(checkpoint.dense_names) - set(expected))
    shared = [name for name in expected if name in checkpoint.dense_names]
    other, signs, rounded = [], 0, 0
    for i, name in enumerate(shared, 1):
        before, layer = expected[name], checkpoint.dense_names[name]
        a, b = slices.cut(before, reference.dense(before)), checkpoint.dense(name)
        packed = {reference.dense_names[before], layer} != {None}
        if (different := different_signs(a, b, packed=packed)) is None:
            if is_rounded(checkpoint, layer, a):
                rounded += 1
            else:
                other.append(name)
        signs += different or 0
        progress("round trip, reference", i, len(shared))
    if lost or odd or other:
        parts = [
            f"{len(names)} {what}, e.g. {names[0]}"
            for names, what in (
                (lost, "missing"),
                (odd, "too many"),
                (other, "with other bits or another shape"),
            )
            if names
        ]
        return Finding("reference", FAIL, "; ".join(parts), f"slices of the tensors of {reference.path}")
    how = f"but for signs of {signs:,} zeros" if signs else "bit for bit"
    if rounded:
        how += f"; {rounded} in int8, each weight within half a scale, no zero filled in"
    return Finding("reference", OK, f"all {len(shared)} tensors are its slices, {how}")


def different_signs(a: torch.Tensor, b: torch.Tensor, *, packed: bool) -> int | None:
    """Return how many zeros of two equal tensors have other signs, None if the tensors are not equal.

    Args:
        packed: one of them was packed, which drops the signs of zeros; else all bits must be equal.
    """
    if same_bits(a, b):
        return 0
    if packed and same_bits(positive_zeros(a)[0], positive_zeros(b)[0]):
        return int((torch.signbit(a) != torch.signbit(b)).count_nonzero())
    return None


def _left_out(reference: Checkpoint, slices: Slices) -> Finding:
    """Return the finding whether every group that is left out contributes nothing in the reference."""
    structure, wrong, count = reference.structure, [], 0
    for half in slices.halves:
        out = torch.ones(half.groups, dtype=torch.bool)
        out[list(slices.kept[half.name])] = False
        count += int(out.sum())
        if (out & ~structure.silent[half.name]).any() or (out.all() and half.name in structure.biased):
            wrong.append(half.name)
    return Finding(
        "left out",
        FAIL if wrong else OK,
        f"{count:,} KV heads and channels",
        f"contributing in {len(wrong)} halves, e.g. {wrong[0]}"
        if wrong
        else "none contributes in the reference",
    )
