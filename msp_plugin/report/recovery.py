"""The section of a run's report on its recoveries: the loss that each stage took back, and each recovery's curve."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from msp_plugin.records.comparison import survival
from msp_plugin.records.run import DENSE, RECOVER, RecoveryRecord, RunRecord, StageRecord
from msp_plugin.records.statistics import taken_back
from msp_plugin.report.charts import Chart, Series, draw
from msp_plugin.report.comparison import Cell
from msp_plugin.report.text import count, number, percent, rounded_percent, seconds


@dataclass(frozen=True)
class StageRow:
    """A stage as a row of the table; ``back`` is the share of the loss over dense that it took back."""

    name: str
    perplexity: float | None
    kl: float | None
    seconds: float | None
    back: float | None


@dataclass(frozen=True)
class RecoveryPart:
    """One recovery: its facts, its curve, and its remarks."""

    facts: list[tuple[str, str]]
    curve: Chart | None
    notes: tuple[str, ...]


def stage_rows(record: RunRecord) -> list[StageRow]:
    """Return a row for each stage; its ``back`` is a share of the previous stage's loss over dense.

    Empty for a run without a recovery.
    """
    if not any(stage.name == RECOVER for stage in record.stages):
        return []
    dense = next((stage.perplexity for stage in record.stages if stage.name == DENSE), None)
    sparse = [stage for stage in record.stages if stage.name != DENSE]
    shares = [None, *(taken_back(dense, a.perplexity, b.perplexity) for a, b in pairwise(sparse))]
    rows = [
        StageRow(_stage_name(stage), stage.perplexity, stage.kl, stage.seconds, share)
        for stage, share in zip(sparse, shares, strict=True)
    ]
    return [StageRow(DENSE, dense, None, None, None), *rows]


def _stage_name(stage: StageRecord) -> str:
    """Return a stage's name with that of its method."""
    method = None if stage.recovery is None else stage.recovery.method.get("name")
    return f"{stage.name}, {method}" if method else stage.name


def recovery_parts(record: RunRecord) -> list[RecoveryPart]:
    """Return the recoveries of a run in their order."""
    return [
        RecoveryPart(_facts(stage, stage.recovery), _curve(stage.recovery), stage.recovery.notes)
        for stage in record.stages
        if stage.recovery is not None
    ]


def _facts(stage: StageRecord, work: RecoveryRecord) -> list[tuple[str, str]]:
    options = ", ".join(f"{key} {value}" for key, value in sorted(work.method.items()) if key != "name")
    facts = [("Recovery", str(work.method.get("name", "–"))), ("Options", options or "none")]
    for name, text in (("Text", work.data), ("Hold-out", work.holdout)):
        if text is not None:
            facts.append((name, f"{count(text.samples)} samples, {count(text.tokens)} tokens"))
    return [
        *facts,
        ("Tokens through the blocks", count(work.tokens)),
        ("Time", seconds(stage.seconds)),
        ("Zeros, recounted", percent(stage.sparsity, 4)),
        ("Weights rounded to zero", count(sum(work.rounded.values()))),
    ]


def survival_chart(cell: Cell, rho: float | None) -> Chart | None:
    """Return the chart of the divergences after a recovery against those before it, None without a recovery.

    Args:
        rho: their rank correlation.
    """
    series = [Series(entry.label, survival(entry.rows), entry.slot, strong=True) for entry in cell.entries]
    correlation = "too few for a rank correlation" if rho is None else f"Spearman's rho {number(rho, 2)}"
    return draw(
        Chart(
            f"Divergence after the recovery against that before, {cell.method} at {rounded_percent(cell.sparsity)}",
            "KL after the final pruning, nats per token",
            "KL after the recovery",
            tuple(series),
            caption=f"Both on the test text, each allocation once: {correlation}.",
        )
    )


def _curve(work: RecoveryRecord) -> Chart | None:
    return draw(
        Chart(
            "Hold-out loss against tokens",
            "tokens through the blocks",
            "loss, nats per token",
            (Series("hold-out text", work.curve, 0, "line"),),
            caption="The loss during the recovery on the hold-out text, which is not trained on: the KL divergence "
            "from the dense model, unless the method uses another loss.",
        )
    )
