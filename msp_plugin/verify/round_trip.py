"""The check that packing changes no bit, or no more than int8 may, and that a checkpoint equals the one it was made of."""

from __future__ import annotations

from dataclasses import dataclass

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.packing import pack_layer
from msp_plugin.checkpoint.tokenizers import same_tokens
from msp_plugin.formats.base import without_shape
from msp_plugin.formats.bits import positive_zeros, same_bits
from msp_plugin.formats.sparse24 import Sparse24Bitmask
from msp_plugin.progress import StepProgress
from msp_plugin.verify.base import FAIL, OK, SKIP, Check, Finding, Subject
from msp_plugin.verify.rounded import is_rounded, readable
from msp_plugin.verify.sliced import different_signs, is_smaller, sliced


@dataclass(frozen=True)
class RoundTrip(Check):
    """Packing and unpacking changes no bit; with a reference, every tensor and its tokens of a text equal the reference's.

    Weights in int8 are within half a scale of the reference's, and zero where those are zero.
    """

    name = "round_trip"

    def run(self, subject: Subject, progress: StepProgress) -> list[Finding]:
        rows, reference = [_packing(subject.checkpoint, progress)], subject.reference
        if reference is None:
            says = "not compared: give a reference, the run that was exported"
            return [*rows, Finding("reference", SKIP, says)]
        if is_smaller(subject.checkpoint, reference):
            rows += sliced(subject.checkpoint, reference, progress)
        else:
            rows.append(_equality(subject.checkpoint, reference, progress))
        if (same := same_tokens(subject.checkpoint.path, reference.path)) is not None:
            says = "the same tokens" if same else f"other tokens than {reference.path}"
            rows.append(Finding("tokenizer", OK if same else FAIL, says, "as the reference splits a text"))
        return rows


def _packing(checkpoint: Checkpoint, progress: StepProgress) -> Finding:
    """Return the finding whether every layer comes back from packing with the same bits.

    The layers of a dense checkpoint are those that an export to sparse24 would pack.
    """
    format = checkpoint.format or Sparse24Bitmask()
    if format.lossy:
        return readable(checkpoint, progress)
    if checkpoint.quantization is not None:
        return Finding(
            "pack and unpack", SKIP, "the checkpoint is quantized; sparse24 packs unquantized weights"
        )
    layers = checkpoint.packed or tuple(checkpoint.packing_in(format).packed)
    if not layers:
        return Finding("pack and unpack", SKIP, "no layer runs on 2:4 kernels")
    stored = dense = 0
    changed = []
    for i, layer in enumerate(layers, 1):
        weight = checkpoint.weight(layer)
        packed, signs = pack_layer(format, weight, layer)
        if not same_bits(format.unpack(packed, layer), positive_zeros(weight)[0] if signs else weight):
            changed.append(layer)
        stored += without_shape({suffix: tensor.nbytes for suffix, tensor in packed.items()})
        dense += weight.numel() * weight.element_size()
        progress("round trip", i, len(layers))
    unchanged = f"{len(layers) - len(changed)} of {len(layers)} layers unchanged"
    return Finding(
        "pack and unpack",
        FAIL if changed else OK,
        f"{unchanged}; {stored:,} bytes packed, {dense:,} dense ({stored / dense:.4f})",
        f"changed: {', '.join(changed[:3])}" if changed else "",
        {"packed_bytes": stored, "dense_bytes": dense},
    )


def _equality(checkpoint: Checkpoint, reference: Checkpoint, progress: StepProgress) -> Finding:
    """Return the finding whether dense tensors equal the reference's; zeros of packed layers may differ in sign."""
    ours, theirs = checkpoint.dense_names, reference.dense_names
    lost, odd = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
    other, signs, rounded = [], 0, 0
    lossy = checkpoint.format is not None and checkpoint.format.lossy
    shared = [name for name in ours if name in theirs]
    for i, name in enumerate(shared, 1):
        a, b = checkpoint.dense(name), reference.dense(name)
        layer = ours[name]
        different = different_signs(a, b, packed={layer, theirs[name]} != {None})
        if different is None and is_rounded(checkpoint, layer, b):
            rounded += 1
        elif different is None:
            other.append(name)
        signs += different or 0
        progress("round trip, reference", i, len(shared))
    changed = "with other bits"
    if lossy:
        changed += ", or more than half a scale away in int8"
    if lost or odd or other:
        parts = [
            f"{len(names)} {what}, e.g. {names[0]}"
            for names, what in ((lost, "missing"), (odd, "too many"), (other, changed))
            if names
        ]
        return Finding("reference", FAIL, "; ".join(parts), f"the {len(theirs)} tensors of {reference.path}")
    note = f"; {signs:,} zeros have another sign" if signs else ""
    how = "equal but for signs of zeros" if signs else "equal, bit for bit"
    if rounded:
        note += f"; {rounded} in int8, each weight within half a scale, no zero filled in"
    count = f"{len(shared) - rounded}" if rounded else f"all {len(shared)}"
    return Finding("reference", OK, f"{count} tensors {how}{note}")
