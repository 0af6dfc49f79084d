"""Compare allocators that share model, method, budget, text and level database."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import closing
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.data.samples import Text, TextSplit, load_split
from msp_plugin.data.search_text import SearchText
from msp_plugin.errors import DataError, RecipeError
from msp_plugin.hosts.base import PruneInputs, check_recovery
from msp_plugin.models.device import on_best_device
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.offload import check_room, input_device
from msp_plugin.passes.losses import perplexity
from msp_plugin.plan.units import Groups, Unit, UnitTable
from msp_plugin.plugins.manager import Plugins
from msp_plugin.records.comparison import (
    ComparedRow,
    CompareRecord,
    GroupsRecord,
    LayerRecord,
    UnitRecord,
    rank_correlations,
)
from msp_plugin.records.parts import ModelRecord, QualityRecord
from msp_plugin.runs.grid import Grid
from msp_plugin.runs.prune import host_for
from msp_plugin.runs.rows import ComparisonRows
from msp_plugin.runtime.context import RunContext
from msp_plugin.runtime.digests import versions
from msp_plugin.runtime.journal import Journal
from msp_plugin.runtime.memory import freed_memory_kept
from msp_plugin.search.allocate import check_before_loading, check_model
from msp_plugin.search.resolve import ResolvedOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def compare(
    source: ModelSource,
    text: Text,
    grid: Grid,
    *,
    finals: Path | None = None,
    context: RunContext = RunContext(),
) -> CompareRecord | None:
    """Return the record of a comparison; None on all ranks but the first.

    All allocators get the same samples for calibration, search, hold-out and test. A cell that fails becomes a row with
    its error, and the others are still computed. A stopped comparison continues from the cache.

    Several ranks find the allocations together. Then rank 0 alone prunes to each of them and measures the result.

    Args:
        finals: journal file for the measurements of pruned models; None keeps them in memory only.

    Raises:
        MSPError: an error in the options, the text or the model is raised before the first allocation.
    """
    plugins, ranks = Plugins(), context.ranks
    plans = grid.check(plugins)
    if grid.recover is not None and source.offload:
        raise RecipeError(
            "a comparison recovers copies of the model in memory, and with offload it is on disk",
            hint="compare without --offload, or recover single runs with `msp recover`",
        )
    source.check()
    for plan in plans:
        check_before_loading(source, plan)
    text = text.for_model(source.name, trust_remote_code=source.trust_remote_code)
    tokenizer = source.tokenizer()
    samples = _samples(tokenizer, text, plans)
    model = source.load()
    if grid.prune:
        check_room(model, source.cache)
    inputs = PruneInputs(samples, text.batch, tokenizer, source.trust_remote_code)
    table = _check(model, plans, inputs, plugins, prune=grid.prune)
    recovery = grid.recovery(plugins)
    if recovery is not None:
        for plan in plans:
            check_recovery(recovery, model, plan, samples.pruning.samples[0])
    comparison = ComparisonRows(source, model, table, inputs, samples, grid, plugins, context, recovery)
    with freed_memory_kept(), on_best_device(model):
        if ranks.size > 1:
            comparison.allocate_together()
            if ranks.rank:
                return None
        dense = perplexity(model, samples.test, progress=partial(context.progress, "perplexity, dense"))
        identity = {
            "model": (model_id := fingerprint(model)),
            "calibration": samples.pruning.fingerprint,
            "batch": text.batch,
            "test": samples.test.fingerprint,
            "holdout": samples.holdout.fingerprint,
            "prune": grid.prune,
            "device": input_device(model).type,
            "versions": versions(),
        }
        with closing(Journal(finals, identity)) as journal:
            rows = [comparison.row(cell, journal) for cell in comparison.cells()]
    return _record(comparison, plans[0], model_id, dense, rows, ranks.size)


def _record(
    comparison: ComparisonRows,
    plan: ResolvedOptions,
    model_id: str,
    dense: float,
    rows: Sequence[ComparedRow],
    ranks: int,
) -> CompareRecord:
    """Return the record of a comparison.

    Args:
        plan: of any cell; levels, granularity and bounds are the same for all.
        dense: test perplexity of the dense model.
    """
    source, model, samples = comparison.source, comparison.model, comparison.samples
    texts = ("calibration", "search", "holdout", "test")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}"
    return CompareRecord(
        model=ModelRecord(
            source=source.spelled,
            architecture=type(model).__name__,
            dtype=source.dtype,
            fingerprint=model_id,
        ),
        levels=tuple(level.name for level in plan.menu),
        granularity=plan.granularity,
        bounds={pattern: tuple(map(str, shares)) for pattern, shares in plan.bounds.shares.items()},
        protect=plan.bounds.protect,
        texts={name: getattr(samples, name).record() for name in texts},
        sources=tuple(r.record() for part in (samples.pruning, samples.test) for r in part.readings),
        units=tuple(map(_unit_record, comparison.table)),
        groups={unit.name: _groups_record(unit, unit.groups) for unit in comparison.table if unit.groups},
        dense=QualityRecord(perplexity=dense),
        sensitivities=dict(comparison.sensitivities),
        rows=tuple(rows),
        rank_correlation=rank_correlations(rows),
        versions=versions(),
        machine=machine + (f", {ranks} ranks" if ranks > 1 else ""),
    )


def _samples(tokenizer: PreTrainedTokenizerBase, text: Text, plans: Sequence[ResolvedOptions]) -> TextSplit:
    """Return the samples, with enough search and hold-out tokens for every plan.

    Raises:
        DataError: there is no test text, or too little text.
    """
    asked = [plan.search_text for plan in plans]
    search, holdout = max(a.search for a in asked), max(a.holdout for a in asked)
    most = SearchText(
        search,
        holdout,
        fit_search=all(a.fit_search for a in asked if a.search == search),
        fit_holdout=all(a.fit_holdout for a in asked if a.holdout == holdout),
    )
    samples = load_split(tokenizer, text, most)
    if not samples.test:
        raise DataError("a comparison needs test text", hint="give test samples")
    return samples


def _check(
    model: PreTrainedModel,
    plans: Sequence[ResolvedOptions],
    inputs: PruneInputs,
    plugins: Plugins,
    *,
    prune: bool,
) -> UnitTable:
    """Check every plan against the model, and return the model's units, which are the same for all plans.

    Raises:
        MSPError: a plan does not fit the model, or its host cannot run it.
    """
    tables = []
    for plan in plans:
        tables.append(check_model(model, plan))
        if prune:
            host_for(plan, plugins).check(model, plan, inputs)
    return tables[0]


def _unit_record(unit: Unit) -> UnitRecord:
    layers = tuple(
        LayerRecord(name=layer.name, shape=(layer.out_features, layer.in_features)) for layer in unit.layers
    )
    return UnitRecord(name=unit.name, block=unit.block, weights=unit.weights, layers=layers)


def _groups_record(unit: Unit, groups: Groups) -> GroupsRecord:
    columns = tuple(layer.name for layer in unit.layers if not layer.inner)
    return GroupsRecord(count=groups.count, quantum=groups.quantum, columns=columns)


def cells(rows: Sequence[ComparedRow]) -> dict[tuple[str, Fraction], dict[str, list[ComparedRow]]]:
    """Return the rows without an error, by (method, sparsity) and then by allocator."""
    results: dict[tuple[str, Fraction], dict[str, list[ComparedRow]]] = {}
    for row in rows:
        if row.error is None:
            results.setdefault((row.method, row.sparsity), {}).setdefault(row.allocator, []).append(row)
    return results
