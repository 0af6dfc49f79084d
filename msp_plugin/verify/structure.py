"""The files against what was exported, and every layer against its level."""

from __future__ import annotations

from dataclasses import dataclass

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.errors import FormatError
from msp_plugin.plan.levels import Level
from msp_plugin.pruning.masks import recount
from msp_plugin.records.run import RunRecord
from msp_plugin.verify.base import FAIL, OK, SKIP, Check, Finding, StepProgress, Subject

#: Layers that fail are named one by one up to this many.
_NAMED = 10


@dataclass(frozen=True)
class Structure(Check):
    """Files as exported; every tensor there; zeros counted, and the pattern held in every group."""

    name = "structure"

    def run(self, subject: Subject, progress: StepProgress) -> list[Finding]:
        checkpoint = subject.checkpoint
        return [*_files(checkpoint), *_tensors(checkpoint), *_layers(checkpoint, progress)]


def _files(checkpoint: Checkpoint) -> list[Finding]:
    manifest = checkpoint.manifest
    if manifest is None:
        return [Finding("files", SKIP, "no export.json, so no checksums to hold the files against")]
    wrong = manifest.differences(checkpoint.path)
    expected = f"{len(manifest.files)} files with the SHA-256 of export.json"
    if wrong:
        return [Finding("files", FAIL, "; ".join(wrong), expected)]
    return [Finding("files", OK, expected)]


def _tensors(checkpoint: Checkpoint) -> list[Finding]:
    found = {name: list(info.shape) for name, info in checkpoint.tensors.items()}
    if checkpoint.manifest is None:
        return [Finding("tensors", SKIP, f"{len(found)} there; no export.json says which there must be")]
    expected = {name: list(shape) for name, shape in checkpoint.manifest.tensors.items()}
    lost, odd = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    other = sorted(name for name in set(found) & set(expected) if found[name] != expected[name])
    if lost or odd or other:
        parts = [
            f"{len(names)} {what}, e.g. {names[0]}"
            for names, what in ((lost, "missing"), (odd, "not of the export"), (other, "of another shape"))
            if names
        ]
        return [Finding("tensors", FAIL, "; ".join(parts), f"the {len(expected)} tensors of export.json")]
    return [Finding("tensors", OK, f"all {len(found)} of export.json")]


def _layers(checkpoint: Checkpoint, progress: StepProgress) -> list[Finding]:
    allocation = checkpoint.allocation
    if allocation is None:
        return [Finding("layers", SKIP, "no allocation.json, so no levels to hold the layers against")]
    quantized = checkpoint.quantization is not None
    if quantized and any(f"{layer}.weight" not in checkpoint.tensors for layer in allocation.by_layer):
        return [Finding("layers", SKIP, "the quantized weights are in a form that is not read here")]
    bad, zeros, details = [], 0, {}
    for i, (layer, level) in enumerate(allocation.by_layer.items(), 1):
        found, reason = _layer(checkpoint, layer, level)
        details[layer] = {"level": level.name, "zeros": found}
        zeros += found
        if reason:
            bad.append(Finding(layer, FAIL, reason, level.name))
        progress("structure", i, len(allocation.by_layer))
    budget = allocation.budget
    held = f"{len(allocation.by_layer) - len(bad)} of {len(allocation.by_layer)} layers hold their level"
    rows = [Finding("layers", FAIL if bad else OK, held, details=details), *bad[:_NAMED]]
    said = _recorded_zeros(checkpoint)
    expected = budget.zeros if said is None else said
    least = said is None or quantized  # quantizing rounds small weights to zero
    right = zeros >= expected if least else zeros == expected
    where = ("allocation.json" if said is None else "run.json") + (", at least" if least else "")
    rows.append(
        Finding(
            "zeros", OK if right else FAIL, f"{zeros:,} of {budget.weights:,} ({100 * zeros / budget.weights:.4f} %)",
            f"{expected:,} ({where})",
        )
    )  # fmt: skip
    return rows


def _layer(checkpoint: Checkpoint, layer: str, level: Level) -> tuple[int, str | None]:
    """Return the zeros of a layer, and what is wrong with it."""
    try:
        found = recount(checkpoint.weight(layer), level)
    except FormatError as error:
        return 0, error.message
    if not found.finite:
        return found.zeros, "holds weights that are not finite"
    return found.zeros, found.broken


def _recorded_zeros(checkpoint: Checkpoint) -> int | None:
    """Return the zeros that the run counted when it had pruned, None if no run.json says so."""
    record = RunRecord.beside(checkpoint.path)
    return None if record is None else record.sparsity.zeros
