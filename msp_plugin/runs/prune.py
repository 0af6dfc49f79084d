"""Whole runs: search an allocation, prune to it with a host, measure, and write a checkpoint with its records."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from msp_plugin.checkpoint.load import is_packed
from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.data.samples import Text, load_split
from msp_plugin.data.search_text import SearchText
from msp_plugin.errors import ModelError, RecipeError
from msp_plugin.hosts.base import Host, PruneInputs, check_recovery
from msp_plugin.hosts.builtin import BuiltIn
from msp_plugin.models.device import on_best_device
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plugins.manager import Plugins
from msp_plugin.records.run import Outcome
from msp_plugin.recovery.base import Recovery, check_sensitivities
from msp_plugin.recovery.record import Recovered
from msp_plugin.recovery.step import RecoveryStep, RecoveryText
from msp_plugin.runs.recover import check_beside, recover_pruned
from msp_plugin.runs.steps import Run, RunSteps
from msp_plugin.runtime.context import RunContext
from msp_plugin.runtime.locks import sole_run
from msp_plugin.search.allocate import allocate as allocate_on
from msp_plugin.search.allocate import check_before_loading
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import ResolvedOptions, resolve


def prune(
    model: str | Path,
    data: str | Text,
    out: str | Path,
    *,
    dtype: str = "auto",
    baseline: bool = True,
    trust_remote_code: bool = False,
    offload: bool = False,
    recover: str | Mapping[str, Any] | None = None,
    context: RunContext = RunContext(),
    **options: Any,
) -> Run | None:
    """Search an allocation, prune a model to it and write a checkpoint; needs no other framework.

    ``out`` gets the checkpoint, recipe.yaml, allocation.json and run.json.

    Args:
        model: directory or hub id.
        data: calibration text: a file, directory or dataset, or a Text with more settings.
        out: a directory that is new or empty.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        baseline: also prune uniformly, in memory only, so that run.json can compare the two.
        trust_remote_code: run the model repository's code.
        offload: leave the weights on disk, for models larger than memory.
        recover: a recovery to run afterwards, by name or as a mapping with ``name`` and options; None for none.
        context: progress, ranks, and whether to use cached measurements.
        options: options of the recipe line, e.g. ``sparsity=0.75, method="wanda"`` (see search.options.Options).

    Returns:
        The run; None on all ranks but the first.

    Raises:
        MSPError: an error in the options is raised before the model is loaded.
    """
    plugins = Plugins()
    resolved = resolve(Options.parse(options), plugins)
    recovery = None if recover is None else plugins.build("recoveries", recover)
    if recovery is not None:
        if recovery.writes:
            raise RecipeError(
                f"the adapter {recovery.writes[0]} is for the pruned model, which is not saved where a recovery follows",
                hint="prune without a recovery first, and then use msp recover with the adapter",
            )
        check_beside(recovery, Path(out), resolved.cache, fresh=context.fresh)
        given = resolved.given
        check_sensitivities(recovery, bool((resolved.allocator if given is None else given).sensitivities))
    if recovery is not None and offload and not recovery.offloads:
        raise RecipeError(
            f"recovery {recovery.name!r} changes weights in memory, and with offload they are on disk",
            hint="use blockwise, or prune without offload",
        )
    source = ModelSource(model, dtype, trust_remote_code, offload, resolved.cache)
    text = data if isinstance(data, Text) else Text(data)
    host = host_for(resolved, plugins)
    return run(host, source, text, resolved, out, baseline=baseline, recovery=recovery, context=context)


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
    """Return the allocation that a search finds; nothing is pruned. See ``prune`` for the arguments.

    Raises:
        MSPError: an error in the options is raised before the model is loaded.
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
    """Run any recipe of llm-compressor and write a checkpoint with recipe.yaml, allocation.json and run.json.

    With a MixedSparsityModifier in the recipe and ``baseline``, the same recipe is run first with the uniform
    allocation, in memory only. Several ranks share the search of a recipe whose only modifier is ours.

    Raises:
        MSPError: see ``prune``.
    """
    from msp_plugin.hosts.llm_compressor import require_host
    from msp_plugin.hosts.llm_compressor.host import LLMCompressor
    from msp_plugin.hosts.llm_compressor.recipe import Recipe

    require_host()
    if is_packed(model):  # llm-compressor would copy the source's config.json to the result
        raise ModelError(
            f"{model} is packed; llm-compressor takes dense models", hint="msp export it --to dense first"
        )
    parsed = Recipe.parse(recipe, Plugins())
    resolved = parsed.options
    cache = None if resolved is None else resolved.cache
    source = ModelSource(model, dtype, trust_remote_code, offload, cache)
    return run(LLMCompressor(parsed), source, text, resolved, out, baseline=baseline, context=context)


def host_for(options: ResolvedOptions, plugins: Plugins) -> Host:
    """Return the host of a method: the built-in one, or llm-compressor for a method that is one of its modifiers.

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
    options: ResolvedOptions | None,
    out: str | Path,
    *,
    baseline: bool = True,
    recovery: Recovery | None = None,
    context: RunContext = RunContext(),
) -> Run | None:
    """Prune a model with a host and write its directory; all files appear at the end, or none.

    After a stop, the same call continues from the cache, which has the sensitivities, the level database, the search's
    measurements and the perplexities of the dense and uniform models.

    Args:
        options: None for a recipe without mixed sparsity.
        recovery: a recovery to run on the pruned model; ignored without ``options``.

    Returns:
        The run; None on all ranks but the first.

    Raises:
        MSPError: see Host and RunSteps; an error in the text or the source is raised before the model is loaded.
    """
    source.check()
    # Not for llm-compressor, which splits experts into linears once they are loaded.
    if options is not None and isinstance(host, BuiltIn):
        check_before_loading(source, options)
    if context.ranks.size > 1 and not host.on_all_ranks:
        _search_together(host, source, text, options, out, context)
        if context.ranks.rank:
            return None
        context = RunContext(progress=context.progress)
    ranks, cache = context.ranks, None if options is None else options.cache
    with ExitStack() as stack:
        path, journal_file = ranks.on_rank_zero(
            lambda: stack.enter_context(sole_run(out, cache, fresh=context.fresh))
        )
        text = text.for_model(source.name, trust_remote_code=source.trust_remote_code)
        tokenizer = source.tokenizer()
        samples = load_split(tokenizer, text, options.search_text if options else SearchText())
        step = None
        if recovery is not None and options is not None:
            recovery_samples = RecoveryText.of(samples.pruning, samples.test)
            step = RecoveryStep(recovery, recovery_samples, options.seed, cache, context)
        inputs = PruneInputs(samples, text.batch, tokenizer, source.trust_remote_code, path)
        steps = RunSteps(host, source, text, options, samples, inputs, path, context)
        check = None
        if step is not None:
            sample = samples.pruning.samples[0]
            check = partial(check_recovery, step.recovery, plan=options, sample=sample)
        stages = steps.references(baseline, journal_file, check)
        gc.collect()
        start = time.monotonic()
        model = source.load()
        pruned = host.prune(model, options, inputs, context)
        seconds = round(time.monotonic() - start, 3)

        def recover_it() -> Recovered | None:
            recovered = None if step is None else recover_pruned(step, source, model, pruned, path, stack)
            if ranks.size > 1:
                ranks.leave()
            return recovered

        if ranks.rank:
            recover_it()
            return None
        record = steps.finish(model, pruned, stages, seconds, recover_it)
    Plugins().tell("msp_run_finished", record=record.to_dict())
    return Run(path, record)


def _search_together(
    host: Host,
    source: ModelSource,
    text: Text,
    options: ResolvedOptions | None,
    out: str | Path,
    context: RunContext,
) -> None:
    """Search with all ranks, which puts everything into the cache; afterwards rank 0 works alone.

    Raises:
        RecipeError: there is no search, or the recipe has other modifiers too.
        MSPError: see allocate.
    """
    ranks = context.ranks
    if options is None or options.given is not None or not host.prunes_only:
        raise RecipeError(
            f"{ranks.size} ranks share a search, and this recipe has none, or has other modifiers beside "
            "MixedSparsityModifier",
            hint="start it without torchrun",
        )
    with ExitStack() as stack:
        enter = stack.enter_context
        ranks.on_rank_zero(
            lambda: enter(sole_run(out, options.cache, fresh=context.fresh, keep=True)) and None
        )
        search(source, text, options, context)
        ranks.leave()


def search(
    source: ModelSource, text: Text, options: ResolvedOptions, context: RunContext = RunContext()
) -> Outcome:
    """Return the allocation that a search finds, with its cost; nothing is pruned.

    Raises:
        MSPError: see allocate.
    """
    source.check()
    check_before_loading(source, options)
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
