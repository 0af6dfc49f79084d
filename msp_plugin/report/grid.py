"""Maps of a model's levels or sensitivities: one row per block, one column per projection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.levels import Level
from msp_plugin.plan.units import Unit, UnitTable
from msp_plugin.records.statistics import finite_values
from msp_plugin.report.palette import LEVEL_STEPS, SENSITIVITY_STEPS
from msp_plugin.report.text import count, percent, rounded_percent, scientific


@dataclass(frozen=True)
class Cell:
    """One unit on a map: its text, the CSS class of its colour, whether 2:4 kernels run it, and its tooltip."""

    text: str
    css: str = ""
    servable: bool = False
    title: str = ""


@dataclass(frozen=True)
class Row:
    """A block's cells, a tuple per column (several entries only if names coincide), and its share of zeros."""

    block: int
    cells: tuple[tuple[Cell, ...], ...]
    share: str = ""


@dataclass(frozen=True)
class Grid:
    """A map: column names, rows, and shares of zeros by column and in total; empty for sensitivities."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    shares: tuple[str, ...] = ()
    total: str = ""


@dataclass(frozen=True)
class Layout:
    """The places of the units: column names, and rows of (block, the units' indices for each column)."""

    columns: tuple[str, ...]
    rows: tuple[tuple[int, tuple[tuple[int, ...], ...]], ...]


def lay_out(table: UnitTable) -> Layout:
    """Return the layout of a table: columns in the model's order, with the shortest names that differ."""
    places = [_place(unit) for unit in table]
    if len(set(places)) > 1 and len({unit.block for unit in table}) == len(table):  # a unit is a block
        places = ["block"] * len(table)
    last = {place: place.rpartition(".")[2] for place in places}
    if len(set(last.values())) < len(last):
        last = {place: place for place in places}
    columns = tuple(dict.fromkeys(last[place] for place in places))
    cells: dict[int, dict[str, list[int]]] = {}
    for i, (unit, place) in enumerate(zip(table, places, strict=True)):
        cells.setdefault(unit.block, {}).setdefault(last[place], []).append(i)
    rows = tuple(
        (block, tuple(tuple(row.get(c, ())) for c in columns)) for block, row in sorted(cells.items())
    )
    return Layout(columns, rows)


def _place(unit: Unit) -> str:
    """Return the part of a unit's name after its block's number; ``block`` for a whole block."""
    parts = unit.name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    if not numbers:
        return unit.name
    at = next((i for i in numbers if parts[i] == str(unit.block)), numbers[0])
    return ".".join(parts[at + 1 :]) or "block"


def level_class(level: Level) -> str:
    """Return the CSS class of a level's colour, by its sparsity."""
    return f"l{round(float(level.sparsity) * LEVEL_STEPS)}"


def level_grid(allocation: Allocation, layout: Layout | None = None, *, titles: bool = True) -> Grid:
    """Return the map of levels; without ``titles`` it has no tooltips, for pages with many maps."""
    table, layout = allocation.table, layout or lay_out(allocation.table)
    cells = [
        Cell(level.name, level_class(level), level.servable, _level_title(unit, level) if titles else "")
        for unit, level in zip(table, allocation.levels, strict=True)
    ]

    kept = kept_weights(allocation)

    def share(indices: Sequence[int]) -> Fraction | None:
        weights = sum(table[i].weights for i in indices)
        return 1 - Fraction(sum(kept[i] for i in indices), weights) if weights else None

    rows = tuple(
        Row(
            block,
            tuple(tuple(cells[i] for i in unit) for unit in units),
            percent(share([i for unit in units for i in unit]), 1),
        )
        for block, units in layout.rows
    )
    by_column = zip(*(units for _, units in layout.rows), strict=True)
    shares = tuple(percent(share([i for unit in column for i in unit]), 1) for column in by_column)
    return Grid(layout.columns, rows, shares, percent(share(range(len(table))), 1))


def kept_weights(allocation: Allocation) -> list[int]:
    """Return the number of weights that each unit keeps."""
    return [level.kept(unit) for unit, level in zip(allocation.table, allocation.levels, strict=True)]


def _level_title(unit: Unit, level: Level) -> str:
    zeros = f"{rounded_percent(level.sparsity_of(unit))} zeros of {count(unit.weights)} weights"
    if (width := level.width(unit)) and unit.groups:
        return f"{unit.name}: {level.name}, {width[0]} of {unit.groups.count} heads or channels stay, {zeros}"
    kernels = "runs" if level.servable else "does not run"
    return f"{unit.name}: {level.name}, {zeros}, {kernels} on 2:4 kernels"


@dataclass(frozen=True)
class Sensitivity:
    """An estimator's numbers on a map, coloured by their logarithm between ``low`` and ``high``.

    ``left_out`` counts numbers without a colour: zero, negative or not finite.
    """

    name: str
    grid: Grid
    low: str
    high: str
    left_out: int


def sensitivity_grid(
    name: str, table: UnitTable, values: Sequence[float | None], layout: Layout
) -> Sensitivity:
    """Return the map of an estimator's numbers; numbers without a logarithm have no colour."""
    positive = [value for value in finite_values(values) if value > 0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 1.0)
    spread = math.log(high / low) or 1.0

    def cell(i: int) -> Cell:
        value = values[i]
        if value is None or not math.isfinite(value) or value <= 0:
            return Cell(scientific(value), title=f"{table[i].name}: {value}")
        step = round(math.log(value / low) / spread * SENSITIVITY_STEPS)
        per_weight = scientific(value / table[i].weights)
        return Cell(
            scientific(value), f"v{step}", title=f"{table[i].name}: {value:.4g}, {per_weight} per weight"
        )

    rows = tuple(
        Row(block, tuple(tuple(cell(i) for i in unit) for unit in units)) for block, units in layout.rows
    )
    return Sensitivity(
        name, Grid(layout.columns, rows), scientific(low), scientific(high), len(values) - len(positive)
    )
