"""compare.json: allocators side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import PlainSerializer, PlainValidator, model_validator

from msp_plugin.errors import RecipeError
from msp_plugin.plan.fractions import parse_sparsity
from msp_plugin.plan.levels import Level
from msp_plugin.plan.units import Groups, Layer, Unit, UnitTable
from msp_plugin.records.base import Part, Record
from msp_plugin.records.parts import (
    ModelRecord,
    QualityRecord,
    ReadingRecord,
    SearchRecord,
    SpeedRecord,
    TextRecord,
)
from msp_plugin.records.run import StageRecord
from msp_plugin.records.statistics import finite_pairs, rank_correlation

COMPARE_FILE = "compare.json"

T = TypeVar("T")


def _parsed(parse: Callable[..., T], *values: object) -> T:
    """Return ``parse(*values)``; pydantic needs its RecipeError as a ValueError."""
    try:
        return parse(*values)
    except RecipeError as error:
        raise ValueError(error.message) from None


def _share(value: object) -> Fraction:
    return _parsed(parse_sparsity, value)


#: A share of zeros, exact in JSON too: ``"3/4"``.
Share = Annotated[Fraction, PlainValidator(_share), PlainSerializer(str, return_type=str)]


class LayerRecord(Part):
    """A layer."""

    name: str
    """Its module name."""
    shape: tuple[int, int]
    """[out_features, in_features] of its weight."""


class UnitRecord(Part):
    """A unit: layers that share a level."""

    name: str
    """Its name."""
    block: int
    """The decoder block, from 0."""
    weights: int | None = None
    """Weights of its layers."""
    layers: tuple[LayerRecord, ...]
    """Its layers."""


class GroupsRecord(Part):
    """The KV heads of an attention, or the channels of an MLP, as widths count them."""

    count: int
    """How many there are."""
    quantum: int = 1
    """A width keeps a multiple of so many."""
    columns: tuple[str, ...] = ()
    """The layers that hold them in columns; the others hold them in rows."""


class ComparedRow(SearchRecord):
    """An allocation, the cost of finding it, and the quality of the pruned model on the test text."""

    method: str
    """The pruning method."""
    sparsity: Share
    """Share of zeros, a fraction such as `3/4`."""
    allocator: str
    """The allocator's name in this comparison."""
    options: dict[str, Any] = {}
    """The allocator's options."""
    seed: int = 0
    """The seed of the search."""
    seeded: bool | None = None
    """False if the seed changes nothing."""
    error: str | None = None
    """The error that ended the row; null if the row is complete."""
    levels: tuple[str, ...] = ()
    """The level of each unit, in the order of `units`."""
    kept: int | None = None
    """Weights that the allocation keeps."""
    weights: int | None = None
    """Weights of the prunable layers."""
    perplexity: float | None = None
    """Perplexity of the pruned model on the test text."""
    kl: float | None = None
    """Its KL divergence from the dense model on the test text, nats per token."""
    database: QualityRecord | None = None
    """Perplexity and KL divergence on the test text with the weights of the level database."""
    holdout_loss: float | None = None
    """KL divergence on the hold-out text with the weights of the level database, nats per token."""
    recovered: StageRecord | None = None
    """The recovery of the pruned model, and its quality afterwards; null without one."""

    @property
    def tokens(self) -> float | None:
        """Forward tokens of candidates and sensitivities together; None if those of candidates are not known."""
        return None if self.forward_tokens is None else self.forward_tokens + (self.sensitivity_tokens or 0)


def survival(rows: Iterable[ComparedRow]) -> list[tuple[float, float]]:
    """Return the KL before and after the recovery of each different allocation, both finite."""
    pairs = {row.levels: (row.kl, row.recovered.kl) for row in rows if row.recovered is not None}
    return finite_pairs(pairs.values())


def rank_correlations(rows: Sequence[ComparedRow]) -> dict[str, float | None]:
    """Return CompareRecord's ``rank_correlation`` of its rows."""
    groups: dict[str, list[ComparedRow]] = {}
    for row in rows:
        if row.recovered is not None:
            groups.setdefault(f"{row.method} {row.sparsity}", []).append(row)
    return {name: rank_correlation(survival(group)) for name, group in groups.items()}


class CompareRecord(Record):
    """A comparison."""

    FILE: ClassVar[str] = COMPARE_FILE
    TITLE: ClassVar[str] = "record of a comparison"
    SCHEMA: ClassVar[str] = "msp_plugin/compare"

    model: ModelRecord = ModelRecord()
    """The dense model."""
    levels: tuple[str, ...] = ()
    """The levels that the allocators chose from."""
    granularity: str = "unit"
    """What a unit is: `layer`, `unit` (layers that inference fuses) or `block`."""
    bounds: dict[str, tuple[str, ...]] = {}
    """[least, most] share of zeros by pattern of layer names."""
    protect: tuple[str, ...] = ()
    """Patterns of the layers that stay dense."""
    texts: dict[str, TextRecord | None] = {}
    """The parts of the text: `calibration`, `search`, `holdout` and `test`."""
    sources: tuple[ReadingRecord, ...] = ()
    """What was read of each source of text."""
    units: tuple[UnitRecord, ...]
    """The units of the model, in its order."""
    groups: dict[str, GroupsRecord] = {}
    """By unit, where the levels hold widths."""
    dense: QualityRecord = QualityRecord()
    """The dense model on the test text."""
    sensitivities: dict[str, tuple[float | None, ...]] = {}
    """By estimator, a number for each unit."""
    rows: tuple[ComparedRow, ...]
    """The allocations that were compared."""
    rank_correlation: dict[str, float | None] = {}
    """By method and sparsity, such as `sparsegpt 3/4`, Spearman's correlation of the KL of the allocations before and \
after the recovery; null where fewer than three differ. Empty without a recovery."""
    speed: tuple[SpeedRecord, ...] = ()
    """Measurements of speed for the report."""
    versions: dict[str, str] = {}
    """Versions of the packages that ran."""
    machine: str | None = None
    """Processor, threads, Python and ranks."""

    @property
    def table(self) -> UnitTable:
        """The units."""
        return UnitTable(
            tuple(
                Unit(unit.name, unit.block, tuple(self._layer(unit.name, layer) for layer in unit.layers))
                for unit in self.units
            )
        )

    def _layer(self, unit: str, layer: LayerRecord) -> Layer:
        of = self.groups.get(unit)
        if of is None:
            return Layer(layer.name, *layer.shape)
        return Layer(layer.name, *layer.shape, Groups(of.count, of.quantum), layer.name not in of.columns)

    @model_validator(mode="after")
    def _consistent(self) -> CompareRecord:
        count = len(self.units)
        for unit in self.units:
            if not unit.layers or min(n for layer in unit.layers for n in layer.shape) < 1:
                raise ValueError(f"unit {unit.name!r} has no weights")
        for name, values in self.sensitivities.items():
            if len(values) != count:
                raise ValueError(f"sensitivity {name!r} has {len(values)} numbers for {count} units")
        table = self.table
        for row in self.rows:
            self._check_levels(row, table)
        return self

    def _check_levels(self, row: ComparedRow, table: UnitTable) -> None:
        if row.levels and len(row.levels) != len(self.units):
            raise ValueError(
                f"the row of {row.allocator!r} has {len(row.levels)} levels for {len(self.units)} units"
            )
        for name, unit in zip(row.levels, table, strict=False):
            _parsed(_parsed(Level.parse, name).kept, unit)
