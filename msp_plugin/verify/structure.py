"""The check that files and tensors are those of the export, and that every layer has the pattern of its level."""

from __future__ import annotations

from dataclasses import dataclass

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.errors import FormatError
from msp_plugin.plan.levels import Level
from msp_plugin.plan.units import Layer
from msp_plugin.progress import StepProgress
from msp_plugin.pruning.masks import recount
from msp_plugin.records.run import RunRecord
from msp_plugin.structure.halves import find_halves
from msp_plugin.structure.small_model import empty_model
from msp_plugin.verify.base import FAIL, OK, SKIP, Check, Finding, Subject

#: The ends of names of tensors that transformers ignores when it loads a model: older Llamas store them.
_IGNORED = ".rotary_emb.inv_freq"
#: Most failing layers that are listed one by one.
_NAMED = 10


@dataclass(frozen=True)
class Structure(Check):
    """Files and tensors are those of the export; zeros are as planned, and every group holds its pattern."""

    name = "structure"

    def run(self, subject: Subject, progress: StepProgress) -> list[Finding]:
        checkpoint = subject.checkpoint
        return [
            *_files(checkpoint),
            *_tensors(checkpoint),
            *_widths(checkpoint),
            *_layers(checkpoint, progress),
        ]


def _files(checkpoint: Checkpoint) -> list[Finding]:
    """Compare the files with the checksums of export.json."""
    manifest = checkpoint.manifest
    if manifest is None:
        return [Finding("files", SKIP, "no export.json, so there are no checksums to compare with")]
    wrong = manifest.differences(checkpoint.path)
    expected = f"{len(manifest.files)} files with the SHA-256 of export.json"
    if wrong:
        return [Finding("files", FAIL, "; ".join(wrong), expected)]
    return [Finding("files", OK, expected)]


def _tensors(checkpoint: Checkpoint) -> list[Finding]:
    """Compare names and shapes of the tensors with export.json."""
    shapes = {name: list(info.shape) for name, info in checkpoint.tensors.items()}
    if checkpoint.manifest is None:
        return [Finding("tensors", SKIP, f"{len(shapes)} found; no export.json says which ones to expect")]
    expected = {name: list(shape) for name, shape in checkpoint.manifest.tensors.items()}
    lost, odd = sorted(set(expected) - set(shapes)), sorted(set(shapes) - set(expected))
    other = sorted(name for name in set(shapes) & set(expected) if shapes[name] != expected[name])
    if lost or odd or other:
        parts = [
            f"{len(names)} {what}, e.g. {names[0]}"
            for names, what in ((lost, "missing"), (odd, "not of the export"), (other, "of another shape"))
            if names
        ]
        return [Finding("tensors", FAIL, "; ".join(parts), f"the {len(expected)} tensors of export.json")]
    return [Finding("tensors", OK, f"all {len(shapes)} of export.json")]


def _widths(checkpoint: Checkpoint) -> list[Finding]:
    """Compare the tensors of a smaller model with the widths of its blocks in config.json.

    Tied tensors may be stored once or several times, and there may be tensors that transformers ignores.
    """
    if not checkpoint.smaller:
        return []
    model = empty_model(checkpoint.path)
    named = dict(model.named_parameters(remove_duplicate=False))
    planned = {name: tuple(parameter.shape) for name, parameter in named.items()}
    stored = {
        name: checkpoint.dense_info(name).shape
        for name in checkpoint.dense_names
        if not name.endswith(_IGNORED)
    }
    there = {id(parameter) for name, parameter in named.items() if name in stored}
    lost = {name for name, parameter in named.items() if id(parameter) not in there}
    odd = sorted(lost | {name for name in stored if planned.get(name) != stored[name]})
    halves = len(find_halves(model))
    found = f"{halves} attentions and MLPs, {sum(p.numel() for p in model.parameters()):,} weights"
    if odd:
        shapes = (
            f"{list(stored.get(odd[0], ()))} of the tensors is {list(planned.get(odd[0], ()))} in config.json"
        )
        return [Finding("widths", FAIL, f"{odd[0]}: {shapes}", found)]
    return [Finding("widths", OK, found)]


def _layers(checkpoint: Checkpoint, progress: StepProgress) -> list[Finding]:
    """Compare every layer with its level in allocation.json, and count all zeros."""
    allocation = checkpoint.allocation
    if allocation is None:
        return [Finding("layers", SKIP, "no allocation.json, so there are no levels to compare with")]
    quantized = checkpoint.quantization is not None
    if quantized and any(f"{layer}.weight" not in checkpoint.tensors for layer in allocation.by_layer):
        return [Finding("layers", SKIP, "the quantized weights are in a form that is not read here")]
    bad, zeros, details = [], 0, {}
    levels = allocation.by_layer
    for i, layer in enumerate(allocation.table.layers, 1):
        level = levels[layer.name]
        layer_zeros, reason = _layer(checkpoint, layer, level)
        details[layer.name] = {"level": level.name, "zeros": layer_zeros}
        zeros += layer_zeros
        if reason:
            bad.append(Finding(layer.name, FAIL, reason, level.name))
        progress("structure", i, len(allocation.by_layer))
    budget = allocation.budget
    holding = f"{len(allocation.by_layer) - len(bad)} of {len(allocation.by_layer)} layers hold their level"
    recorded = _recorded_zeros(checkpoint)
    expected = budget.zeros if recorded is None else recorded
    at_least = recorded is None or quantized or checkpoint.rounded  # quantizing rounds small weights to zero
    right = zeros >= expected if at_least else zeros == expected
    where = ("allocation.json" if recorded is None else "run.json") + (", at least" if at_least else "")
    share = f"{zeros:,} of {budget.weights:,} ({100 * zeros / budget.weights:.4f} %)"
    return [
        Finding("layers", FAIL if bad else OK, holding, details=details),
        *bad[:_NAMED],
        Finding("zeros", OK if right else FAIL, share, f"{expected:,} ({where})"),
    ]


def _layer(checkpoint: Checkpoint, layer: Layer, level: Level) -> tuple[int, str | None]:
    """Return (the zeros of a layer, the reason why it breaks its level or None)."""
    try:
        counted = recount(checkpoint.weight(layer.name), level, layer)
    except FormatError as error:
        return 0, error.message
    if not counted.finite:
        return counted.zeros, "holds weights that are not finite"
    return counted.zeros, counted.broken


def _recorded_zeros(checkpoint: Checkpoint) -> int | None:
    """Return the zeros that the run counted after pruning; None if no run.json has them."""
    record = RunRecord.beside(checkpoint.path)
    return None if record is None else record.sparsity.zeros
