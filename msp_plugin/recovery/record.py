"""The record of a run with a recovery: what was measured before it, and its stage."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from msp_plugin.records.run import (
    DENSE,
    FINAL,
    PRUNE,
    RECOVER,
    RECOVERED,
    UNIFORM,
    RunRecord,
    SparsityRecord,
    StageRecord,
)

#: The losses, rates and gradient norms of a training, a JSON line each.
LOG = "log.jsonl"


@dataclass(frozen=True)
class Measured:
    """The perplexity and the KL divergence from the dense model of one model on the test text; None where unmeasured."""

    perplexity: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Recovered:
    """A recovery that is done.

    Args:
        stage: its work, and the measurements of the recovered model.
        before: the measurements of the models before it, by stage; PRUNE stands for the model that was recovered.
        seconds: that it took with all measurements.
        state: the directory of its state, with its logs.
        changed: the model was changed since, e.g. quantized, so that the measurements are of an earlier state.
    """

    stage: StageRecord
    before: Mapping[str, Measured] = field(default_factory=dict)
    seconds: float = 0.0
    state: Path | None = None
    changed: bool = False


def copy_logs(state: Path | None, folder: Path) -> None:
    """Copy a training's log, and what it wrote for TensorBoard, from a recovery's state into a run's directory."""
    if state is None:
        return
    if (state / LOG).is_file():
        shutil.copyfile(state / LOG, folder / LOG)
    for runs in (state / "trainer").glob("*/runs"):
        shutil.copytree(runs, folder / "runs", dirs_exist_ok=True)


def with_recovery(record: RunRecord, recovered: Recovered) -> RunRecord:
    """Return the record of a run with a stage of recovery and with the measurements of the models before it.

    Zeros are those after the recovery, in which weights may have been rounded to zero.
    """
    before, stage = {PRUNE: Measured(), **recovered.before}, recovered.stage
    *earlier, last = record.stages
    earlier = [s for s in earlier if s.name != DENSE or DENSE not in before]
    if DENSE in before:
        earlier.insert(0, StageRecord(name=DENSE, perplexity=before[DENSE].perplexity))
    last = last.model_copy(update=vars(before[PRUNE]))
    name = RECOVERED if last.name == RECOVER else "result" if "result" in record.perplexity else "mixed"
    values = {name: before[PRUNE].perplexity}
    uniform = record.perplexity.get(UNIFORM) is not None and UNIFORM not in {s.name for s in earlier}
    if uniform and last.name != RECOVER:
        values[UNIFORM] = before[PRUNE].perplexity  # the uniform allocation is the result
    if DENSE in before:
        values[DENSE] = before[DENSE].perplexity
    perplexities = {**record.perplexity, **values, RECOVERED: stage.perplexity}
    perplexities.pop(FINAL, None)  # of the model before this recovery
    order = [key for key in (DENSE, UNIFORM) if key in perplexities]
    order += [key for key in perplexities if key not in order]
    divergences = {**record.kl, name: before[PRUNE].kl, RECOVERED: stage.kl}
    return record.model_copy(
        update={
            "stages": (*earlier, last, stage),
            "perplexity": {key: perplexities[key] for key in order},
            "kl": {key: value for key, value in divergences.items() if value is not None},
            "sparsity": _recounted(record.sparsity, stage.sparsity),
        }
    )


def _recounted(before: SparsityRecord, share: float | None) -> SparsityRecord:
    """Return the zeros of a run after a recovery, in which the layers have a share of zeros; there are never fewer."""
    if share is None or before.weights is None or before.zeros is None:
        return before
    zeros = max(before.zeros, round(share * before.weights))
    more = {"zeros": zeros, "achieved": zeros / before.weights}
    if before.planned_zeros is not None:
        more["extra_zeros"] = zeros - before.planned_zeros
    return before.model_copy(update=more)
