"""The rows of a comparison, grouped by method and sparsity, then by allocator over its seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.levels import Level
from msp_plugin.plan.units import UnitTable
from msp_plugin.records.comparison import ComparedRow, CompareRecord
from msp_plugin.records.statistics import deviation, finite_values, mean, within_noise

UNIFORM = "uniform"


@dataclass(frozen=True)
class Entry:
    """An allocator with its options in one cell: its rows over the seeds, without failed ones."""

    label: str
    slot: int
    rows: tuple[ComparedRow, ...]

    @property
    def perplexities(self) -> list[float]:
        """Test perplexity of every seed that has one."""
        return finite_values(row.perplexity for row in self.rows)

    @property
    def perplexity(self) -> float | None:
        """Mean test perplexity; None if a seed's is missing or infinite, because leaving it out would flatter."""
        return mean(self.perplexities) if len(self.perplexities) == len(self.rows) else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of the perplexity over seeds."""
        return deviation(self.perplexities)

    @property
    def kls(self) -> list[float]:
        """KL divergence from the dense model of every seed that has one."""
        return finite_values(row.kl for row in self.rows)

    @property
    def kl(self) -> float | None:
        """Mean KL divergence from the dense model; None if a seed's is missing or infinite."""
        return mean(self.kls) if len(self.kls) == len(self.rows) else None

    @property
    def kl_spread(self) -> float | None:
        """Standard deviation of the divergence over seeds."""
        return deviation(self.kls)

    @property
    def recovered(self) -> tuple[float | None, float | None] | None:
        """Mean test perplexity and divergence after the recovery, None where a seed's is missing; None without one."""
        stages = [row.recovered for row in self.rows if row.recovered is not None]
        if not stages:
            return None
        perplexities, kls = (
            finite_values(getattr(stage, name) for stage in stages) for name in ("perplexity", "kl")
        )
        whole = len(self.rows)
        return (
            mean(perplexities) if len(perplexities) == whole else None,
            mean(kls) if len(kls) == whole else None,
        )

    @property
    def tokens(self) -> float | None:
        """Mean forward tokens, of candidates and sensitivities together."""
        return mean(row.tokens for row in self.rows)

    @property
    def seconds(self) -> float | None:
        """Mean duration of the search in seconds."""
        return mean(row.seconds for row in self.rows)

    @property
    def first(self) -> ComparedRow | None:
        """The row of the lowest seed that has levels."""
        return min((row for row in self.rows if row.levels), key=lambda row: row.seed, default=None)


@dataclass(frozen=True)
class Cell:
    """The entries of one method at one sparsity, lowest divergence first."""

    method: str
    sparsity: Fraction
    entries: tuple[Entry, ...]

    @property
    def best(self) -> Entry | None:
        """The entry with the lowest mean divergence."""
        measured = [entry for entry in self.entries if entry.kl is not None]
        return min(measured, key=lambda entry: entry.kl or 0.0, default=None)

    @property
    def has_recovery(self) -> bool:
        """True if an entry was recovered."""
        return any(entry.recovered is not None for entry in self.entries)

    @property
    def has_spread(self) -> bool:
        """True if an entry has several seeds."""
        return any(entry.kl_spread is not None for entry in self.entries)

    @property
    def ties(self) -> list[Entry]:
        """The other entries within noise of the best one (see within_noise)."""
        best = self.best
        if best is None or best.kl is None:
            return []
        return [
            entry
            for entry in self.entries
            if entry is not best
            and entry.kl is not None
            and within_noise(entry.kl, entry.kl_spread, best.kl, best.kl_spread)
        ]

    @property
    def uniform(self) -> Entry | None:
        """The entry of the uniform allocation."""
        return next((e for e in self.entries if e.rows and e.rows[0].allocator == UNIFORM), None)


def labels(rows: Sequence[ComparedRow]) -> dict[int, str]:
    """Return by row number a label: the allocator's name, and the options in which rows of that name differ."""
    options: dict[str, list[dict[str, str]]] = {}
    texts = [{k: json.dumps(v, sort_keys=True, default=str) for k, v in row.options.items()} for row in rows]
    for row, text in zip(rows, texts, strict=True):
        options.setdefault(row.allocator, []).append(text)
    names = {}
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        others = options[row.allocator]
        keys = sorted({k for other in others for k in other if any(o.get(k) != other[k] for o in others)})
        differing = ", ".join(f"{key} {text[key].strip(chr(34))}" for key in keys if key in text)
        names[i] = f"{row.allocator} ({differing})" if differing else row.allocator
    return names


def cells(comparison: CompareRecord) -> list[Cell]:
    """Return the cells in the order of the rows' methods, higher sparsities last."""
    names = labels(comparison.rows)
    slots = {
        label: i
        for i, label in enumerate(label for label in dict.fromkeys(names.values()) if label != UNIFORM)
    }
    methods = {row.method: i for i, row in reversed(list(enumerate(comparison.rows)))}
    groups: dict[tuple[str, Fraction], dict[str, list[ComparedRow]]] = {}
    for i, row in enumerate(comparison.rows):
        group = groups.setdefault((row.method, row.sparsity), {})
        if row.error is None:
            group.setdefault(names[i], []).append(row)
    cells = []
    for method, sparsity in sorted(groups, key=lambda key: (methods[key[0]], key[1])):
        entries = [
            Entry(label, slots.get(label, -1), tuple(sorted(rows, key=lambda row: row.seed)))
            for label, rows in groups[method, sparsity].items()
        ]
        entries.sort(key=lambda e: (e.kl is None, e.kl or 0.0, e.label))
        cells.append(Cell(method, sparsity, tuple(entries)))
    return cells


def allocation_of(row: ComparedRow, table: UnitTable) -> Allocation:
    """Return a row's allocation."""
    return Allocation(table, tuple(map(Level.parse, row.levels)), row.sparsity)
