"""Whole runs: search an allocation, prune to it with a host, measure, and write a checkpoint with its records."""

from __future__ import annotations

import gc
import json
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from msp_plugin.checkpoint.load import is_packed
from msp_plugin.checkpoint.run_files import copy_processor, run_record, write_files
from msp_plugin.checkpoint.saving import check_savable, generation_config_kept, kept_if_it_fails
from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.data.samples import SearchText, Text, TextSplit, load_split
from msp_plugin.errors import ModelError, NumericsError, RecipeError
from msp_plugin.hosts.base import Host, Pruned, PruneInputs
from msp_plugin.hosts.builtin import BuiltIn
from msp_plugin.models.device import on_best_device
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.offload import check_room, named_parameters, quantized_forward
from msp_plugin.passes.losses import perplexity
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plugins.manager import Plugins
from msp_plugin.progress import prefixed
from msp_plugin.records.parts import ModelRecord
from msp_plugin.records.run import DENSE, PRUNE, UNIFORM, Outcome, RunRecord, StageRecord
from msp_plugin.runtime.context import RunContext
from msp_plugin.runtime.digests import versions
from msp_plugin.runtime.disk import check_free, writing
from msp_plugin.runtime.files import finite, output_directory, write_text
from msp_plugin.runtime.journal import Journal
from msp_plugin.runtime.locks import sole_run
from msp_plugin.runtime.memory import freed_memory_kept
from msp_plugin.search.allocate import allocate as allocate_on
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import Plan, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Run:
    """A finished run: its directory and its record."""

    path: Path
    record: RunRecord


def prune(
    model: str | Path,
    data: str | Text,
    out: str | Path,
    *,
    dtype: str = "auto",
    baseline: bool = True,
    trust_remote_code: bool = False,
    offload: bool = False,
    context: RunContext = RunContext(),
    **options: Any,
) -> Run | None:
    """Search an allocation, prune a model to it and write a checkpoint; needs no other framework.

    Leaves the checkpoint, recipe.yaml, allocation.json and run.json in ``out``.

    Args:
        model: directory or hub id.
        data: calibration text: a file, directory or dataset, or a Text that says more.
        out: a directory that is new or empty.
        baseline: also prune uniformly, in memory only, so that run.json can compare the two.
        offload: leave the weights on disk, for models larger than memory.
        options: of the recipe line, e.g. ``sparsity=0.75, method="wanda"`` (see search.options.Options).

    Returns:
        The run; None on all ranks but the first.

    Raises:
        MSPError: whatever the options alone show comes before the model is loaded.
    """
    plugins = Plugins()
    resolved = resolve(Options.parse(options), plugins)
    source = ModelSource(model, dtype, trust_remote_code, offload, resolved.cache)
    text = data if isinstance(data, Text) else Text(data)
    return run(host_for(resolved, plugins), source, text, resolved, out, baseline=baseline, context=context)


def allocate(
    model: str | Path,
    data: str | Text,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    offload: bool = False,
    context: RunContext = RunContext(),
    **options: Any,
) -> Allocation:
    """Return the allocation that a search finds for a model, which is not pruned; see ``prune`` for the arguments.

    Raises:
        MSPError: whatever the options alone show comes before the model is loaded.
    """
    resolved = resolve(Options.parse(options), Plugins())
    source = ModelSource(model, dtype, trust_remote_code, offload, resolved.cache)
    text = data if isinstance(data, Text) else Text(data)
    return search(source, text, resolved, context).allocation


def run_recipe(
    recipe: str | Path | Mapping[str, Any],
    model: str | Path,
    text: Text,
    out: str | Path,
    *,
    dtype: str = "auto",
    baseline: bool = True,
    trust_remote_code: bool = False,
    offload: bool = False,
    context: RunContext = RunContext(),
) -> Run | None:
    """Run any recipe of llm-compressor and leave a checkpoint with recipe.yaml, allocation.json and run.json.

    With a MixedSparsityModifier in the recipe and ``baseline``, the same recipe is run first with the uniform
    allocation, in memory only. Several ranks share the search of a recipe whose only modifier is ours.

    Raises:
        MSPError: see ``prune``.
    """
    from msp_plugin.hosts.llm_compressor import require_host
    from msp_plugin.hosts.llm_compressor.host import LLMCompressor
    from msp_plugin.hosts.llm_compressor.recipe import Recipe

    require_host()
    if is_packed(model):  # the host reads the source's config.json again and would copy it to the result
        raise ModelError(
            f"{model} is packed; llm-compressor takes dense models", hint="msp export it --to dense first"
        )
    parsed = Recipe.parse(recipe, Plugins())
    resolved = parsed.options
    source = ModelSource(model, dtype, trust_remote_code, offload, resolved and resolved.cache)
    return run(LLMCompressor(parsed), source, text, resolved, out, baseline=baseline, context=context)


def host_for(options: Plan, plugins: Plugins) -> Host:
    """Return the host that carries out a method: the built-in one, or llm-compressor for a modifier of its.

    Raises:
        HostError: llm-compressor is needed and not installed.
    """
    if options.pruner.host == BuiltIn.name:
        return BuiltIn(plugins)
    from msp_plugin.hosts.llm_compressor.host import LLMCompressor
    from msp_plugin.hosts.llm_compressor.recipe import OURS, Recipe

    line = options.spelled.model_dump(exclude_defaults=True)
    return LLMCompressor(Recipe({"sparsity_stage": {"sparsity_modifiers": {OURS: line}}}, options))


def run(
    host: Host,
    source: ModelSource,
    text: Text,
    options: Plan | None,
    out: str | Path,
    *,
    baseline: bool = True,
    context: RunContext = RunContext(),
) -> Run | None:
    """Prune a model with a host and write its directory; all files appear at the end, or none.

    The same call goes on where a stopped one was, with what lies in the cache: sensitivities, level database, the
    search's measurements and the perplexities of the dense and uniform models.

    Args:
        options: None for a recipe without mixed sparsity.

    Returns:
        The run; None on all ranks but the first.

    Raises:
        MSPError: see the steps; what the options alone show comes before the model is loaded.
    """
    source.check()
    if context.ranks.size > 1 and not host.on_all_ranks:
        _search_together(host, source, text, options, out, context)
        if context.ranks.rank:
            return None
        context = RunContext(progress=context.progress)
    ranks, cache = context.ranks, options and options.cache
    with ExitStack() as stack:
        path, journal_file = ranks.on_rank_zero(
            lambda: stack.enter_context(sole_run(out, cache, fresh=context.fresh))
        )
        text = text.for_model(source.name, trust_remote_code=source.trust_remote_code)
        tokenizer = source.tokenizer()
        samples = load_split(tokenizer, text, options.search_text if options else SearchText())
        inputs = PruneInputs(samples, text.batch, tokenizer, source.trust_remote_code)
        job = _Job(host, source, text, options, samples, inputs, path, context)
        stages = job.references(baseline, journal_file)
        gc.collect()
        start = time.monotonic()
        model = source.load()
        pruned = host.prune(model, options, inputs, context)
        seconds = round(time.monotonic() - start, 3)
        if ranks.size > 1:
            ranks.leave()
        if ranks.rank:
            return None
        record = job.finish(model, pruned, stages, seconds)
    Plugins().tell("msp_run_finished", record=record.to_dict())
    return Run(path, record)


def _search_together(
    host: Host, source: ModelSource, text: Text, options: Plan | None, out: str | Path, context: RunContext
) -> None:
    """Search with all ranks, so that everything is in the cache; the ranks have parted afterwards.

    Raises:
        RecipeError: there is no search in the recipe, or something runs before it.
        MSPError: see allocate.
    """
    ranks = context.ranks
    if options is None or options.given is not None or not host.recipe.mixes:
        raise RecipeError(
            f"{ranks.size} ranks share a search, and this recipe is not one of MixedSparsityModifier alone",
            hint="start it without torchrun",
        )
    with ExitStack() as stack:
        enter = stack.enter_context
        ranks.on_rank_zero(
            lambda: enter(sole_run(out, options.cache, fresh=context.fresh, keep=True)) and None
        )
        search(source, text, options, context)
        ranks.leave()


@dataclass(frozen=True)
class _Job:
    """A run's parts, of which each step reads what it needs."""

    host: Host
    source: ModelSource
    text: Text
    options: Plan | None
    samples: TextSplit
    inputs: PruneInputs
    out: Path
    context: RunContext

    @property
    def mixes_alone(self) -> bool:
        """True if the run prunes and does nothing else; others may quantize: the model is smaller then."""
        recipe = getattr(self.host, "recipe", None)
        return self.options is not None and (recipe is None or recipe.mixes)

    def references(self, baseline: bool, journal_file: Path) -> list[StageRecord]:
        """Return the dense stage and, if it is measured, the uniform one; those in the journal cost nothing.

        Raises:
            MSPError: what the model shows before anything is pruned, or the uniform pruning.
        """
        options, ranks = self.options, self.context.ranks
        model = self.source.load()
        check_room(model, self.source.cache)
        check_savable(model, self.inputs.tokenizer)
        if self.mixes_alone:
            need = sum(p.numel() * p.element_size() for _, _, p in named_parameters(model))
            check_free(self.out, need, "the pruned model takes", "give an output directory on another disk")
        self.host.check(model, options, self.inputs)
        with closing(Journal(journal_file, self._identity(model), ranks)) as journal:
            dense = journal.get("dense", partial(self.measure, "dense", model))
            stages = [StageRecord(name=DENSE, perplexity=finite(dense))]
            del model
            gc.collect()
            if options is not None and baseline and self.samples.test and not options.is_uniform:
                stages.append(StageRecord.model_validate(journal.get("uniform stage", self._uniform)))
        return stages

    def _uniform(self) -> dict[str, Any]:
        """Return the stage, as JSON, of the model that is pruned uniformly."""
        ranks, start = self.context.ranks, time.monotonic()
        model = self.source.load()
        context = RunContext(progress=prefixed("uniform, ", self.context.progress), ranks=ranks)
        pruned = self.host.prune(model, self.options.uniform(), self.inputs, context, announce=False)
        stage = StageRecord(
            name=UNIFORM,
            seconds=ranks.on_rank_zero(lambda: round(time.monotonic() - start, 3)),
            sparsity=pruned.stats and pruned.stats.sparsity,
            perplexity=self.measure("uniform", model),
        )
        self.host.forget()
        return stage.to_dict()

    def measure(self, name: str, model: PreTrainedModel) -> float | None:
        """Return the test perplexity; None without test text, or, after pruning, if it is not a number."""
        if not self.samples.test:
            return None
        return self.context.ranks.on_rank_zero(partial(self._perplexity, name, model))

    def _perplexity(self, name: str, model: PreTrainedModel) -> float | None:
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
        self, model: PreTrainedModel, pruned: Pruned, before: Sequence[StageRecord], seconds: float
    ) -> RunRecord:
        """Measure the pruned model, write its directory, and return the record.

        Raises:
            OutputError: it cannot be written; the error says where the pruned model is kept.
        """
        options, outcome = self.options, pruned.outcome
        record = RunRecord(stages=(StageRecord(name=PRUNE),), versions=versions())
        if outcome is not None:
            record = run_record(outcome, pruned.stats, options.seed)
        record = record.model_copy(update={"seconds": seconds})
        kept = partial(
            kept_if_it_fails,
            model,
            self.out,
            lambda folder: write_files(folder, outcome, record),
            self.source.cache,
        )
        name = "result" if options is None else "mixed"
        with kept():
            value = finite(self._perplexity(name, model)) if self.samples.test else None
        record = self._measured(record, before, value)
        with writing(self.out), output_directory(self.out) as temporary, kept():
            with warnings.catch_warnings(), generation_config_kept(model, temporary):
                warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
                self.host.save(model, temporary)
            self.inputs.tokenizer.save_pretrained(temporary)
            copy_processor(model, temporary)
            write_files(temporary, outcome, record)
            if not (temporary / RECIPE_FILE).exists() and options is not None:
                write_text(temporary / RECIPE_FILE, recipe_text(options))
        return record

    def _identity(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return what the measurements of an unfinished run depend on, by words that a user can read."""
        options, test = self.options, self.samples.test
        spelled = options.spelled.model_dump() if options else self.host.recipe.steps
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
        """Return the record with what was measured, on what; ``value`` is the perplexity of the pruned model."""
        options, text, test = self.options, self.text, self.samples.test
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
                "model": ModelRecord(source=str(self.source.name), dtype=self.source.dtype),
                "calibration": self.samples.pruning.record(length=text.length, seed=text.seed),
                "test": test.record(length=text.length) if test else None,
            }
        )


def recipe_text(options: Plan) -> str:
    """Return the recipe of llm-compressor that does what the options say."""
    line = options.spelled.model_dump(exclude_defaults=True, exclude={"cache"})
    recipe = {"sparsity_stage": {"sparsity_modifiers": {"MixedSparsityModifier": line}}}
    return yaml.safe_dump(recipe, sort_keys=False, width=100)


def search(source: ModelSource, text: Text, options: Plan, context: RunContext = RunContext()) -> Outcome:
    """Return the allocation for a model without pruning it; needs a host's package only if the method does.

    Raises:
        MSPError: see allocate.
    """
    source.check()
    text = text.for_model(source.name, trust_remote_code=source.trust_remote_code)
    samples = load_split(source.tokenizer(), text, options.search_text)
    model = source.load()
    with on_best_device(model):
        return allocate_on(
            model,
            samples,
            options,
            fresh=context.fresh,
            progress=context.progress,
            ranks=context.ranks,
        )
