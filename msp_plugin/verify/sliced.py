"""Check that a smaller checkpoint's tensors are slices of its reference's, and that the rest contributed nothing."""

from __future__ import annotations

import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.formats.bits import same_bits
from msp_plugin.progress import StepProgress
from msp_plugin.structure.slices import Slices
from msp_plugin.verify.base import FAIL, OK, Finding


def sliced(checkpoint: Checkpoint, reference: Checkpoint, progress: StepProgress) -> list[Finding]:
    """Compare every tensor with its slice of the reference as export.json records it, and check what was left out.

    Raises:
        FormatError: the record is damaged or of another model.
    """
    manifest, structure = checkpoint.manifest, reference.structure
    assert manifest is not None, "a smaller model has an export.json"
    slices = Slices.from_record(manifest.structure, structure.halves, structure.depth)
    return [_slices(checkpoint, reference, slices, progress), _left_out(reference, slices)]


def _slices(checkpoint: Checkpoint, reference: Checkpoint, slices: Slices, progress: StepProgress) -> Finding:
    """Compare names, shapes and bits of all tensors."""
    expected = {after: name for name in reference.dense_names if (after := slices.name(name)) is not None}
    lost = sorted(set(expected) - set(checkpoint.dense_names))
    odd = sorted(set(checkpoint.dense_names) - set(expected))
    shared = [name for name in expected if name in checkpoint.dense_names]
    other = []
    for i, name in enumerate(shared, 1):
        before = expected[name]
        if not same_bits(slices.cut(before, reference.dense(before)), checkpoint.dense(name)):
            other.append(name)
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
    return Finding("reference", OK, f"all {len(shared)} tensors are its slices, bit for bit")


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
