"""run.json: one run, from the dense model to the checkpoint beside the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from msp_plugin.plan.allocation import Allocation
from msp_plugin.records.base import Part, Record, read_json
from msp_plugin.records.parts import ModelRecord, Point, SearchRecord, SpeedRecord, TextRecord

RUN_FILE = "run.json"
#: The recipe that made a run.
RECIPE_FILE = "recipe.yaml"
#: The stages of a pruning run.
DENSE, UNIFORM, PRUNE = "dense", "uniform", "prune"
#: The stage of a recovery, and the name of its model beside `mixed`.
RECOVER, RECOVERED = "recover", "recovered"
#: The model of a recipe that changed it after its last recovery, e.g. quantized it.
FINAL = "final"


@dataclass(frozen=True)
class Outcome:
    """An allocation and the cost of finding it.

    Args:
        saved_seconds: that earlier processes, stopped or not, spent on measurements that the search read from the cache.
    """

    allocation: Allocation
    search: SearchRecord = field(default_factory=SearchRecord)
    saved_seconds: float = 0.0


class RecoveryRecord(Part):
    """The work of a recovery."""

    method: dict[str, Any] = {}
    """Its name and all of its options."""
    seed: int | None = None
    """Seed of its random choices."""
    tokens: int | float | None = None
    """Tokens through the model's blocks; a backward pass counts as two forward passes."""
    data: TextRecord | None = None
    """The text that the model was trained on."""
    holdout: TextRecord | None = None
    """The text that measured progress."""
    curve: tuple[Point, ...] = ()
    """[tokens, loss on the hold-out text in nats per token]; the method chooses the loss, most take the KL to the dense model."""
    rounded: dict[str, int] = {}
    """By layer, weights that became zero because their new value rounds to it."""
    notes: tuple[str, ...] = ()
    """Remarks of the method for a reader of the result."""


class StageRecord(Part):
    """A step of a run that leaves a model, and the model that it leaves."""

    name: str
    """`dense`, the model before the run; `uniform`, the baseline of equal sparsity everywhere, if it was measured; \
`prune`; `recover`."""
    perplexity: float | None = None
    """Perplexity of the model on the test text."""
    kl: float | None = None
    """KL divergence from the dense model on the test text, nats per token; only a run with a recovery measures it."""
    seconds: float | None = None
    """Duration of the step without measuring the perplexity; null if it took none or was not measured. Of a step that \
was stopped and went on, of its last part; a search counts whole, as in `seconds` of the run."""
    sparsity: float | None = None
    """Share of zeros in the prunable layers, recounted; null for the dense model."""
    recovery: RecoveryRecord | None = None
    """The work of a stage `recover`; null for all others."""


class SparsityRecord(Part):
    """Zeros in the prunable layers."""

    target: float | None = None
    """Requested share of zeros."""
    planned: float | None = None
    """Share of zeros of the allocation."""
    achieved: float | None = None
    """Share of zeros, recounted after pruning."""
    exact: bool | None = None
    """True if the levels can reach the target exactly, to the weight."""
    weights: int | None = None
    """Weights of the prunable layers."""
    zeros: int | None = None
    """Zeros, recounted after pruning."""
    planned_zeros: int | None = None
    """Zeros of the allocation."""
    extra_zeros: int | None = None
    """Zeros beyond the allocation: weights that were zero before, or have a dead input."""


class RunRecord(Record):
    """A run. Version 1 had no `stages`; reading such a file derives them."""

    FILE: ClassVar[str] = RUN_FILE
    TITLE: ClassVar[str] = "record of a run"
    SCHEMA: ClassVar[str] = "msp_plugin/run"
    VERSION: ClassVar[int] = 2

    stages: tuple[StageRecord, ...] = ()
    """The models of the run, in the order in which they were made."""
    sparsity: SparsityRecord = SparsityRecord()
    """Zeros: requested, planned and achieved."""
    perplexity: dict[str, float | None] = {}
    """Perplexity on the test text by model: `dense`, `uniform` (the baseline), `mixed` (the pruned model), `recovered` after \
a recovery, and `final` where a recipe changed the model after that, e.g. quantized it; a recipe without \
MixedSparsityModifier has `dense` and `result`."""
    kl: dict[str, float | None] = {}
    """KL divergence from the dense model by model, nats per token; only a run with a recovery measures it."""
    search: SearchRecord = SearchRecord()
    """The search for the allocation."""
    model: ModelRecord = ModelRecord()
    """The dense model."""
    calibration: TextRecord | None = None
    """The calibration text."""
    test: TextRecord | None = None
    """The test text; null without one."""
    seed: int | None = None
    """The seed of the search."""
    seconds: float | None = None
    """Duration of search and pruning, without the baseline and the perplexities; of a run that was stopped and went on, \
of its last part and of the whole search. Losses that the search read from the cache, of this run or an earlier one, count \
with the time that they once took."""
    speed: tuple[SpeedRecord, ...] = ()
    """Measurements of speed for the report."""
    command: str | None = None
    """The command line. This package writes none; the report shows it."""
    versions: dict[str, str] = {}
    """Versions of the packages that ran."""
    python: str | None = None
    """Version of Python."""

    @classmethod
    def beside(cls, directory: Path) -> Self | None:
        """Return the record in a checkpoint's directory; None if there is none, or a run.json of another program.

        Raises:
            RecipeError: the file is damaged, or of a newer version.
        """
        path = directory / RUN_FILE
        data = read_json(path) if path.is_file() else None
        if not isinstance(data, dict) or data.get("schema") != cls.SCHEMA:
            return None
        return cls.from_dict(data, str(path))

    @property
    def result_perplexity(self) -> float | None:
        """Perplexity of the checkpoint on the test text; None if the last model of the run was not measured."""
        recovered = any(stage.name == RECOVER for stage in self.stages)
        names = (FINAL, RECOVERED) if recovered else ("mixed", "result")
        return next((self.perplexity[name] for name in names if name in self.perplexity), None)

    def _converted(self, version: int) -> Self:
        return self.model_copy(update={"stages": tuple(self._stages())}) if version == 1 else self

    def _stages(self) -> Iterator[StageRecord]:
        """Yield the stages that a file of version 1 shows; it repeats the result as `uniform` if the result is uniform."""
        dense, uniform = (self.perplexity.get(name) for name in (DENSE, UNIFORM))
        result = self.result_perplexity
        if dense is not None:
            yield StageRecord(name=DENSE, perplexity=dense)
        if uniform not in (None, result):
            yield StageRecord(name=UNIFORM, perplexity=uniform)
        yield StageRecord(
            name=PRUNE, perplexity=result, seconds=self.seconds, sparsity=self.sparsity.achieved
        )
