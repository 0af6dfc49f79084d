"""The contents of a comparison's report, section by section."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from msp_plugin.records.comparison import CompareRecord
from msp_plugin.records.statistics import finite_pairs, finite_values, rank_correlation, taken_back
from msp_plugin.report.charts import Chart, Series, draw
from msp_plugin.report.comparison import Cell, Entry, allocation_of, cells, labels
from msp_plugin.report.grid import Grid, Layout, lay_out, level_grid, sensitivity_grid
from msp_plugin.report.recovery import survival_chart
from msp_plugin.report.run_page import NOT_RECORDED, text_facts
from msp_plugin.report.storage import Storage, storages
from msp_plugin.report.text import NOTHING, number, rounded_percent

#: If perplexities differ by more than this factor, their axis is logarithmic.
_LOG_FROM = 4.0


@dataclass(frozen=True)
class EntryView:
    """An allocator in a cell, as the template shows it: numbers, mark, map of levels, bytes."""

    entry: Entry
    best: bool
    tie: bool
    taken_back: float | None
    seed: int | None
    grid: Grid | None
    storages: list[Storage]

    @property
    def color(self) -> str:
        """The CSS custom property of its colour in all charts."""
        return Series("", (), self.entry.slot).color

    @property
    def mark(self) -> str:
        """Its mark in all charts, as text."""
        return Series("", (), self.entry.slot).mark

    @property
    def unmeasured(self) -> str:
        """The reason why there is no mean perplexity."""
        if all(row.perplexity is None for row in self.entry.rows):
            return NOTHING
        return f"{len(self.entry.perplexities)} of {len(self.entry.rows)} seeds finite"


@dataclass(frozen=True)
class CellView:
    """A cell with its charts."""

    cell: Cell
    name: str
    title: str
    entries: list[EntryView]
    note: str
    curves: Chart | None
    cost: Chart | None
    predictions: Chart | None
    ranking: Chart | None
    survival: Chart | None


def comparison_page(comparison: CompareRecord) -> dict[str, Any]:
    """Return the variables of the template comparison.html."""
    table = comparison.table
    layout = lay_out(table)
    names = labels(comparison.rows)
    views = [_cell(i, cell, comparison, layout) for i, cell in enumerate(cells(comparison))]
    failed = [(row, names[i]) for i, row in enumerate(comparison.rows) if row.error is not None]
    notes = [(row, names[i]) for i, row in enumerate(comparison.rows) if row.notes]
    return {
        "title": f"Allocators compared on {_model_name(comparison)}",
        "facts": _facts(comparison, views, len(failed)),
        "dense": comparison.dense,
        "cells": views,
        "recovered": any(view.cell.has_recovery for view in views),
        "sensitivities": [
            sensitivity_grid(name, table, values, layout)
            for name, values in sorted(comparison.sensitivities.items())
        ],
        "storage_note": _dtype_note(views),
        "speed": comparison.speed,
        "failed": failed,
        "notes": notes,
        "provenance": _provenance(comparison),
    }


def _model_name(comparison: CompareRecord) -> str:
    model = comparison.model
    return PurePath(model.source or "").name or model.architecture or "a model"


def _facts(comparison: CompareRecord, views: list[CellView], failed: int) -> list[tuple[str, str]]:
    rows = comparison.rows
    seeds = sorted({row.seed for row in rows})
    return [
        ("Model", f"{_model_name(comparison)}, {comparison.model.architecture or '–'}"),
        ("Methods", ", ".join(dict.fromkeys(row.method for row in rows)) or "–"),
        ("Sparsities", ", ".join(rounded_percent(s) for s in sorted({row.sparsity for row in rows})) or "–"),
        ("Allocators", str(len(set(labels(rows).values())))),
        ("Seeds", ", ".join(map(str, seeds)) or "–"),
        ("Rows", f"{len(rows)}, {failed} failed" if failed else str(len(rows))),
        ("Units", f"{len(comparison.units)} in {len({u.block for u in comparison.units})} blocks"),
        ("Dense perplexity", number(comparison.dense.perplexity)),
    ]


def _cell(i: int, cell: Cell, comparison: CompareRecord, layout: Layout) -> CellView:
    """Return cell number ``i`` with its charts, and its entries' maps and bytes."""
    uniform = cell.uniform.perplexity if cell.uniform else None
    entries = []
    for entry in cell.entries:
        row = entry.first
        allocation = allocation_of(row, comparison.table) if row is not None else None
        entries.append(
            EntryView(
                entry,
                entry is cell.best,
                entry in cell.ties,
                taken_back(comparison.dense.perplexity, uniform, entry.perplexity),
                row.seed if row is not None else None,
                level_grid(allocation, layout, titles=False) if allocation else None,
                storages(allocation, comparison.model.dtype, None) if allocation else [],
            )
        )
    return CellView(
        cell=cell,
        name=f"cell{i}",
        title=f"{cell.method}, {rounded_percent(cell.sparsity)}",
        entries=entries,
        note=_note(cell),
        curves=_curves(cell),
        cost=_cost(cell, comparison),
        predictions=_predictions(cell),
        ranking=_ranking(cell),
        survival=survival_chart(cell, comparison.rank_correlation.get(f"{cell.method} {cell.sparsity}")),
    )


def _dtype_note(views: list[CellView]) -> str:
    """Return the sentence on the dtype of the weights."""
    known = next((row.storages[0] for view in views for row in view.entries if row.storages), None)
    if known is None:
        return "No row has levels."
    return f"Weights are {known.dtype}{', assumed because the record does not say' if known.assumed else ''}."


def _note(cell: Cell) -> str:
    """Return the sentence that explains the marks in a cell's table."""
    if cell.best is None:
        return "No divergence was measured."
    if not cell.has_spread:
        return "Lowest KL in bold. One seed: no spread, so small differences mean nothing."
    return "Lowest KL in bold; ≈ marks those within twice the standard deviation over seeds, the larger of the two."


def _curves(cell: Cell) -> Chart | None:
    """Return the chart of the search losses against forward tokens."""
    series = []
    for entry in cell.entries:
        for row in entry.rows:
            curve = list(row.curve)
            if curve and row.forward_tokens and (curve[-1][0] or 0) < row.forward_tokens:
                curve.append((row.forward_tokens, curve[-1][1]))
            series.append(Series(entry.label, curve, entry.slot, "steps"))
    uniform = finite_values([row.uniform_loss for entry in cell.entries for row in entry.rows])
    kinds = {
        str(row.options["loss"])
        for e in cell.entries
        for row in e.rows
        if row.curve and "loss" in row.options
    }
    warning = " The allocators minimise different losses, which cannot be compared." if len(kinds) > 1 else ""
    return draw(
        Chart(
            f"Search curves, {cell.method} at {rounded_percent(cell.sparsity)}",
            "forward tokens",
            "search loss, nats per token",
            tuple(series),
            tuple(
                (value, "uniform" if i == 0 else "")
                for i, value in enumerate(sorted(set(uniform), reverse=True))
            ),
            log_x=True,
            caption="Lowest loss so far on the search text; one line per seed, with a mark at its end."
            + warning,
        )
    )


def _cost(cell: Cell, comparison: CompareRecord) -> Chart | None:
    """Return the chart of the test perplexities against forward tokens."""
    series = []
    for entry in cell.entries:
        points = [(row.tokens or 0.0, row.perplexity) for row in entry.rows]
        if len(points) > 1:
            series.append(Series(entry.label, points, entry.slot))
        if entry.perplexity is not None:
            spread = [entry.spread] if entry.spread is not None else []
            middle = [(entry.tokens or 0.0, entry.perplexity)]
            series.append(Series(entry.label, middle, entry.slot, errors=spread, strong=True))
    values = [y for s in series for _, y in s.drawn]
    dense = finite_values([comparison.dense.perplexity])
    return draw(
        Chart(
            f"Test perplexity against forward tokens, {cell.method} at {rounded_percent(cell.sparsity)}",
            "forward tokens",
            "test perplexity",
            tuple(series),
            tuple((value, "dense") for value in dense),
            log_x=True,
            log_y=bool(values) and max([*values, *dense]) > _LOG_FROM * max(min([*values, *dense]), 1e-9),
            caption="Test perplexity after the final pruning against the tokens that measured candidates and "
            "sensitivities. Large marks are means over seeds; bars are one standard deviation.",
        )
    )


def _predictions(cell: Cell) -> Chart | None:
    """Return the chart of the measured against the predicted changes of the loss."""
    series: list[Series] = []
    pairs: list[tuple[float, float]] = []
    for entry in cell.entries:
        own = finite_pairs(pair for row in entry.rows for pair in row.predictions)
        pairs += own
        series.append(Series(entry.label, own, entry.slot))
    rho = rank_correlation(pairs)
    correlation = f" Spearman's rho {number(rho, 2)}." if rho is not None else ""
    return draw(
        Chart(
            "Measured against predicted change of the loss, "
            f"{cell.method} at {rounded_percent(cell.sparsity)}",
            "predicted change, nats per token",
            "measured change, nats per token",
            tuple(series),
            diagonal=True,
            caption=f"{len(pairs)} proposals of a surrogate. On the dashed line prediction and measurement are "
            f"equal.{correlation}",
        )
    )


def _ranking(cell: Cell) -> Chart | None:
    """Return the chart of KL after the final pruning against KL with the level database's weights."""
    series: list[Series] = []
    pairs: list[tuple[float, float]] = []
    for entry in cell.entries:
        own = finite_pairs((row.database.kl, row.kl) for row in entry.rows if row.database is not None)
        pairs = list(dict.fromkeys([*pairs, *own]))  # an allocation of several entries counts once
        series.append(Series(entry.label, own, entry.slot, strong=True))
    rho = rank_correlation(pairs)
    correlation = f"Spearman's rho {number(rho, 2)}" if rho is not None else "too few for a rank correlation"
    return draw(
        Chart(
            f"KL after the final pruning against KL with the level database's weights, {cell.method} "
            f"at {rounded_percent(cell.sparsity)}",
            "KL with the database's weights, nats per token",
            "KL after the final pruning",
            tuple(series),
            diagonal=True,
            caption=f"Both on the test text, {len(pairs)} different allocations: {correlation}. "
            "Below the dashed line the final pruning is better than the database's weights.",
        )
    )


def _provenance(comparison: CompareRecord) -> list[tuple[str, str]]:
    rows = [
        ("Model", comparison.model.source or NOT_RECORDED),
        ("Architecture", comparison.model.architecture or NOT_RECORDED),
        ("Model fingerprint", comparison.model.fingerprint or NOT_RECORDED),
        ("Model dtype", comparison.model.dtype or NOT_RECORDED),
        ("Levels offered", ", ".join(comparison.levels) or NOT_RECORDED),
        ("Granularity", comparison.granularity),
    ]
    rows += [(f"Text, {name}", text_facts(text)) for name, text in comparison.texts.items()]
    rows.append(("Seeds", ", ".join(map(str, sorted({row.seed for row in comparison.rows})))))
    rows.append(("Machine", comparison.machine or NOT_RECORDED))
    return rows + sorted(comparison.versions.items())
