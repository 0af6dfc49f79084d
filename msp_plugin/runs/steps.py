"""The steps of a run around the pruning: measure the dense and uniform models before, measure and write the result."""

from __future__ import annotations

import gc
import json
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from msp_plugin.checkpoint.run_files import copy_processor, run_record, write_files
from msp_plugin.checkpoint.saving import check_savable, generation_config_kept, kept_if_it_fails
from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.data.samples import Text, TextSplit
from msp_plugin.errors import BudgetError, NumericsError, RecipeError
from msp_plugin.hosts.base import MAYBE_CHANGED, Host, Pruned, PruneInputs
from msp_plugin.models.device import on_best_device
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.offload import check_room, named_parameters, quantized_forward
from msp_plugin.passes.losses import perplexity
from msp_plugin.plugins.manager import Plugins, spec_of
from msp_plugin.progress import prefixed
from msp_plugin.records.parts import ModelRecord
from msp_plugin.records.run import DENSE, FINAL, PRUNE, RECIPE_FILE, UNIFORM, RunRecord, StageRecord
from msp_plugin.recovery.record import Measured, Recovered, copy_logs, with_recovery
from msp_plugin.runtime.context import RunContext
from msp_plugin.runtime.digests import versions
from msp_plugin.runtime.disk import check_free, writing
from msp_plugin.runtime.files import finite, output_directory, write_text
from msp_plugin.runtime.journal import Journal
from msp_plugin.runtime.memory import freed_memory_kept
from msp_plugin.search.resolve import ResolvedOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A finished run: its directory and its record."""

    path: Path
    record: RunRecord


@dataclass(frozen=True)
class RunSteps:
    """The steps of a run, and the objects that they need.

    Args:
        options: None for a recipe without mixed sparsity.
        out: the directory to write.
    """

    host: Host
    source: ModelSource
    text: Text
    options: ResolvedOptions | None
    samples: TextSplit
    inputs: PruneInputs
    out: Path
    context: RunContext

    def references(
        self, baseline: bool, journal_file: Path, check: Callable[[PreTrainedModel], None] | None = None
    ) -> list[StageRecord]:
        """Return the dense stage and, with ``baseline``, the uniform stage; those in the journal are not repeated.

        First checks the model, the host and the free space.

        Args:
            check: checks what comes after the pruning on the dense model.

        Raises:
            MSPError: a check or the uniform pruning fails.
        """
        options, ranks = self.options, self.context.ranks
        model = self.source.load()
        check_room(model, self.source.cache)
        check_savable(model, self.inputs.tokenizer)
        if options is not None and self.host.prunes_only:  # a quantized model is smaller
            need = sum(p.numel() * p.element_size() for _, _, p in named_parameters(model))
            check_free(self.out, need, "the pruned model takes", "give an output directory on another disk")
        self.host.check(model, options, self.inputs)
        if check is not None:
            check(model)
        with closing(Journal(journal_file, self._identity(model), ranks)) as journal:
            dense = journal.get("dense", partial(self.measure, "dense", model))
            stages = [StageRecord(name=DENSE, perplexity=finite(dense))]
            del model
            gc.collect()
            if options is not None and baseline and self.samples.test and not options.is_uniform:
                uniform = journal.get("uniform stage", partial(self._uniform, options))
                stages.append(StageRecord.model_validate(uniform))
        return stages

    def _uniform(self, options: ResolvedOptions) -> dict[str, Any]:
        """Return the stage of the uniformly pruned model, as JSON; the model is not written."""
        ranks, start = self.context.ranks, time.monotonic()
        model = self.source.load()
        context = RunContext(progress=prefixed("uniform, ", self.context.progress), ranks=ranks)
        try:
            pruned = self.host.prune(model, options.uniform(), self.inputs, context, announce=False)
        except (RecipeError, BudgetError) as error:
            if options.given is None:
                raise
            raise RecipeError(
                f"{options.spelled.allocation} has no uniform baseline: {error.message}",
                hint="its provenance was edited: allocate anew, or prune without a baseline",
            ) from error
        stage = StageRecord(
            name=UNIFORM,
            seconds=ranks.on_rank_zero(lambda: round(time.monotonic() - start, 3)),
            sparsity=None if pruned.stats is None else pruned.stats.sparsity,
            perplexity=self.measure("uniform", model),
        )
        self.host.forget()
        return stage.to_dict()

    def measure(self, name: str, model: PreTrainedModel) -> float | None:
        """Return a model's test perplexity, measured on rank 0, on all ranks.

        None means that there is no test text, or that the loss of a pruned model is not a number.
        """
        return self.context.ranks.on_rank_zero(partial(self._perplexity, name, model))

    def _perplexity(self, name: str, model: PreTrainedModel) -> float | None:
        if not self.samples.test:
            return None
        progress = partial(self.context.progress, f"perplexity, {name}")
        try:
            with freed_memory_kept(), on_best_device(model), quantized_forward(model):
                return perplexity(model, self.samples.test, progress=progress)
        except NumericsError:
            if name == "dense":
                raise
            log.warning("the %s model's test loss is not a number", name)
            return None

    def finish(
        self,
        model: PreTrainedModel,
        pruned: Pruned,
        before: Sequence[StageRecord],
        seconds: float,
        recover: Callable[[], Recovered | None] = lambda: None,
    ) -> RunRecord:
        """Return the record of the run, after measuring the pruned model and writing the directory.

        Args:
            before: the stages of the models that the result is compared with.
            seconds: time of the host's work.
            recover: recovers the pruned model, or does nothing and returns None.

        Raises:
            OutputError: the directory cannot be written; the error names where the pruned model is kept.
        """
        options, outcome = self.options, pruned.outcome
        record = run_record(outcome, pruned.stats, None if options is None else options.seed)
        seconds += (outcome.saved_seconds if outcome else 0.0) - sum(
            each.seconds for each in pruned.recovered
        )
        record = record.model_copy(update={"seconds": round(seconds, 3)})
        kept = partial(
            kept_if_it_fails,
            model,
            self.out,
            lambda folder: write_files(folder, outcome, record),
            self.source.cache,
        )
        with kept():
            record = self._with_recipe_recoveries(model, record, before, pruned.recovered)
        with kept(what=MAYBE_CHANGED):
            recovered = recover()
        if recovered is not None:
            dense, sparse = Measured(record.perplexity.get(DENSE)), record.stages[-1].perplexity
            sparse_measured = replace(recovered.before[PRUNE], perplexity=sparse)
            known = {DENSE: dense, PRUNE: sparse_measured}
            record = with_recovery(record, replace(recovered, before=known))
        with writing(self.out), output_directory(self.out) as temporary, kept():
            with warnings.catch_warnings(), generation_config_kept(model, temporary):
                warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
                self.host.save(model, temporary)
            self.inputs.tokenizer.save_pretrained(temporary)
            copy_processor(model, temporary)
            write_files(temporary, outcome, record)
            copy_logs(None if recovered is None else recovered.state, temporary)
            if not (temporary / RECIPE_FILE).exists() and options is not None:
                write_text(temporary / RECIPE_FILE, recipe_text(options, recovery_line(recovered)))
        return record

    def _with_recipe_recoveries(
        self,
        model: PreTrainedModel,
        record: RunRecord,
        before: Sequence[StageRecord],
        done: Sequence[Recovered],
    ) -> RunRecord:
        """Return the record with what is measured of the pruned model, and with the recoveries that the host's recipe held."""
        name = "result" if self.options is None else "mixed"
        if not done:
            return self._measured(record, before, finite(self._perplexity(name, model)))
        record = self._measured(record, before, done[0].before[PRUNE].perplexity)
        for recovered in done:
            record = with_recovery(record, recovered)
        if done[-1].changed:
            quality = {**record.perplexity, FINAL: finite(self._perplexity(FINAL, model))}
            record = record.model_copy(update={"perplexity": quality})
        return record

    def _identity(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return everything that the measurements of an unfinished run depend on, by names for messages."""
        options, test = self.options, self.samples.test
        spelled = {"ours": options.spelled.model_dump() if options else None, "recipe": dict(self.host.steps)}
        return {
            "model": fingerprint(model),
            "recipe": json.loads(json.dumps(spelled, default=str)),
            "host": self.host.name,
            "calibration": self.samples.pruning.fingerprint,
            "batch": self.text.batch,
            "test": test.fingerprint if test else None,
            "versions": versions(),
            "method": options and options.pruner.code(),
            "allocation": options and options.given and options.given.to_dict(),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        }

    def _measured(self, record: RunRecord, before: Sequence[StageRecord], value: float | None) -> RunRecord:
        """Return the record with the stages, the perplexities, the model and the texts.

        Args:
            value: the perplexity of the pruned model.
        """
        options, text, test = self.options, self.text, self.samples.test
        length = len(self.samples.pruning.samples[0])
        perplexities = {stage.name: stage.perplexity for stage in before}
        quality = {DENSE: perplexities[DENSE]}
        if options is None:
            quality["result"] = value
        else:
            quality[UNIFORM] = value if options.is_uniform else perplexities.get(UNIFORM)
            quality["mixed"] = value
        pruned = record.stages[-1].model_copy(update={"perplexity": value, "seconds": record.seconds})
        return record.model_copy(
            update={
                "stages": (*before, pruned),
                "perplexity": quality,
                "model": ModelRecord(source=self.source.spelled, dtype=self.source.dtype),
                "calibration": self.samples.pruning.record(length=length, seed=text.seed),
                "test": test.record(length=length) if test else None,
            }
        )


def recovery_line(recovered: Recovered | None) -> dict[str, Any] | None:
    """Return the recipe line of a recovery; None if there is none, or a recipe cannot hold it."""
    work = None if recovered is None else recovered.stage.recovery
    if work is None or not Plugins().build("recoveries", dict(work.method)).by_calibration:
        return None
    return {"method": dict(work.method), "seed": work.seed}


def recipe_text(options: ResolvedOptions, recovery: dict[str, Any] | None = None) -> str:
    """Return the llm-compressor recipe with these options, defaults too, and the line of a recovery, as YAML."""
    searched = options.given is None
    line = options.spelled.model_dump(exclude_defaults=not searched, exclude_none=True, exclude={"cache"})
    line["method"] = spec_of(options.pruner)
    if searched:
        estimators = {name: spec_of(estimator) for name, estimator in options.estimators.items()}
        line["granularity"], line["allocator"] = options.granularity, spec_of(options.allocator)
        line["estimators"] = {name: spec for name, spec in estimators.items() if spec.pop("name")}
    modifiers = {"MixedSparsityModifier": line}
    if recovery is not None:
        modifiers["RecoveryModifier"] = recovery
    recipe = {"sparsity_stage": {"sparsity_modifiers": modifiers}}
    text: str = yaml.safe_dump(recipe, sort_keys=False, width=100)
    return text
