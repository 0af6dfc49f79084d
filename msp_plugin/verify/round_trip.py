"""Compressed against dense, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.packing import pack_layer
from msp_plugin.formats.sparse24 import positive_zeros, unpack
from msp_plugin.verify.base import FAIL, OK, SKIP, Check, Finding, StepProgress, Subject


@dataclass(frozen=True)
class RoundTrip(Check):
    """Packing and unpacking changes no bit; with a reference, every tensor equals it."""

    name = "round_trip"

    def run(self, subject: Subject, progress: StepProgress) -> list[Finding]:
        rows = [_packing(subject.checkpoint, progress)]
        if subject.reference is None:
            rows.append(
                Finding(
                    "reference", SKIP, "not compared: give a reference, the run that it was exported from"
                )
            )
        else:
            rows.append(_equality(subject.checkpoint, subject.reference, progress))
        return rows


def _packing(checkpoint: Checkpoint, progress: StepProgress) -> Finding:
    """Return whether every packed layer, or every layer that would be packed, survives the round trip."""
    if checkpoint.quantization is not None:
        return Finding(
            "pack and unpack", SKIP, "the checkpoint is quantized; sparse24 packs unquantized weights"
        )
    layers = checkpoint.packed or tuple(checkpoint.packing.packed)
    if not layers:
        return Finding("pack and unpack", SKIP, "no layer runs on 2:4 kernels")
    stored = dense = 0
    changed = []
    for i, layer in enumerate(layers, 1):
        weight = checkpoint.weight(layer)
        packed, signs = pack_layer(weight, layer)
        if not _same_bits(unpack(packed, layer), positive_zeros(weight)[0] if signs else weight):
            changed.append(layer)
        stored += packed.bytes
        dense += weight.numel() * weight.element_size()
        progress("round trip", i, len(layers))
    found = f"{len(layers) - len(changed)} of {len(layers)} layers unchanged; {stored:,} bytes packed, {dense:,} dense"
    return Finding(
        "pack and unpack", FAIL if changed else OK, f"{found} ({stored / dense:.4f})",
        f"changed: {', '.join(changed[:3])}" if changed else "", {"packed_bytes": stored, "dense_bytes": dense},
    )  # fmt: skip


def _equality(checkpoint: Checkpoint, reference: Checkpoint, progress: StepProgress) -> Finding:
    """Return whether every tensor of the dense form equals the reference's; in packed layers up to zeros' signs."""
    ours, theirs = checkpoint.dense_names, reference.dense_names
    lost, odd = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
    other, signs = [], 0
    shared = [name for name in ours if name in theirs]
    for i, name in enumerate(shared, 1):
        a, b = checkpoint.dense(name), reference.dense(name)
        if _same_bits(a, b):
            pass
        elif {checkpoint.dense_names[name], reference.dense_names[name]} == {None}:
            other.append(name)
        elif _same_bits(positive_zeros(a)[0], positive_zeros(b)[0]):  # packing had no place for their signs
            signs += int((torch.signbit(a) != torch.signbit(b)).count_nonzero())
        else:
            other.append(name)
        progress("round trip, reference", i, len(shared))
    if lost or odd or other:
        parts = [
            f"{len(names)} {what}, e.g. {names[0]}"
            for names, what in ((lost, "missing"), (odd, "too many"), (other, "with other bits"))
            if names
        ]
        return Finding("reference", FAIL, "; ".join(parts), f"the {len(theirs)} tensors of {reference.path}")
    note = f"; {signs:,} zeros have another sign" if signs else ""
    how = "equal but for signs of zeros" if signs else "equal, bit for bit"
    return Finding("reference", OK, f"all {len(shared)} tensors {how}{note}")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )
