"""run.json and compare.json, as far as a report shows them.

Unknown keys are ignored, missing ones are nothing measured; a value of another type is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from msp_plugin.errors import RecipeError
from msp_plugin.plan.levels import Level, parse_sparsity
from msp_plugin.plan.units import Layer, Unit, UnitTable

COMPARE_SCHEMA = "msp_plugin/compare"
COMPARE_VERSION = 1

#: (forward tokens, loss) or (predicted, measured).
Point = tuple[float | None, float | None]


class Record(BaseModel):
    """A part of a record."""

    model_config = ConfigDict(extra="ignore", frozen=True, arbitrary_types_allowed=True)


class Sparsity(Record):
    """run.json's ``sparsity``: shares and counts of zeros."""

    target: float | None = None
    planned: float | None = None
    achieved: float | None = None
    weights: int | None = None
    zeros: int | None = None
    planned_zeros: int | None = None


class Search(Record):
    """run.json's ``search``: what the search measured, nats per token, and what it cost."""

    allocator: str | None = None
    forward_tokens: int | None = None
    evaluations: int | None = None
    seconds: float | None = None
    total_seconds: float | None = None
    loss: float | None = None
    uniform_loss: float | None = None
    curve: list[Point] = []
    holdout: list[Point] = []
    predictions: list[Point] = []
    notes: list[str] = []


class Speed(Record):
    """One measurement of speed, and what measured it."""

    name: str
    value: float | None = None
    unit: str = ""
    source: str = ""


class RunRecord(Record):
    """run.json."""

    sparsity: Sparsity = Sparsity()
    perplexity: dict[str, float | None] = {}
    kl: dict[str, float | None] = {}
    search: Search = Search()
    speed: list[Speed] = []
    model: dict[str, Any] = {}
    calibration: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    command: str | None = None
    seed: int | None = None
    seconds: float | None = None
    versions: dict[str, str] = {}
    python: str | None = None


class Quality(Record):
    """Perplexity, and divergence from the dense model in nats per token, on the test text."""

    perplexity: float | None = None
    kl: float | None = None


class ComparedRow(Quality):
    """One allocation of a comparison: by whom, and what it gave."""

    method: str
    sparsity: Fraction
    allocator: str
    options: dict[str, Any] = {}
    seed: int = 0
    database: Quality | None = None
    loss: float | None = None
    uniform_loss: float | None = None
    holdout_loss: float | None = None
    forward_tokens: float | None = None
    sensitivity_tokens: float | None = None
    seconds: float | None = None
    evaluations: float | None = None
    curve: list[Point] = []
    holdout: list[Point] = []
    predictions: list[Point] = []
    levels: list[str] = []
    notes: list[str] = []
    error: str | None = None

    @property
    def tokens(self) -> float | None:
        """Forward tokens of candidates and of sensitivities; None where the first are not known."""
        return None if self.forward_tokens is None else self.forward_tokens + (self.sensitivity_tokens or 0.0)

    @field_validator("sparsity", mode="before")
    @classmethod
    def _exact(cls, value: object) -> Fraction:
        return _parsed(parse_sparsity, value)


class _LayerEntry(Record):
    name: str
    shape: tuple[int, int]


class _UnitEntry(Record):
    name: str
    block: int
    layers: list[_LayerEntry]


class Comparison(Record):
    """compare.json."""

    model: dict[str, Any] = {}
    levels: list[str] = []
    granularity: str = "unit"
    texts: dict[str, dict[str, Any] | None] = {}
    units: list[_UnitEntry]
    dense: Quality = Quality()
    sensitivities: dict[str, list[float | None]] = {}
    rows: list[ComparedRow]
    speed: list[Speed] = []
    versions: dict[str, str] = {}
    machine: str | None = None

    @property
    def table(self) -> UnitTable:
        """The units."""
        return UnitTable(
            tuple(Unit(u.name, u.block, tuple(Layer(a.name, *a.shape) for a in u.layers)) for u in self.units)
        )

    @model_validator(mode="after")
    def _consistent(self) -> Comparison:
        units = len(self.units)
        for unit in self.units:
            if not unit.layers or min(n for layer in unit.layers for n in layer.shape) < 1:
                raise ValueError(f"unit {unit.name!r} has no weights")
        for name, values in self.sensitivities.items():
            if len(values) != units:
                raise ValueError(f"sensitivity {name!r} has {len(values)} numbers for {units} units")
        for row in self.rows:
            if row.levels and len(row.levels) != units:
                raise ValueError(
                    f"the row of {row.allocator!r} has {len(row.levels)} levels for {units} units"
                )
            for name, unit in zip(row.levels, self.units, strict=False):
                level = _parsed(Level.parse, name)
                for layer in unit.layers:
                    _parsed(level.kept, *layer.shape)
        return self


def _parsed(parse: Callable[..., Any], *values: object) -> Any:
    """Return what a function of plan/ makes of values, its refusal as the error that pydantic knows."""
    try:
        return parse(*values)
    except RecipeError as error:
        raise ValueError(error.message) from None
