"""Find an allocation for a model: check it, measure sensitivities and the level database, search."""

from __future__ import annotations

import logging
from fractions import Fraction

import torch

from msp_plugin.allocators.base import AllocationResult
from msp_plugin.checkpoint.quantized import check_unquantized
from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import NO_TEXT, TextSplit
from msp_plugin.data.tokenize import check_ids
from msp_plugin.errors import DataError, ModelError, RecipeError, VerificationError
from msp_plugin.models.layers import (
    allowed_levels,
    check_finite_weights,
    check_fit,
    check_whole,
    prunable_layers,
    text_config,
)
from msp_plugin.models.offload import own_parameters
from msp_plugin.models.source import POSITIONS
from msp_plugin.passes.outputs import with_inner
from msp_plugin.plan.allocation import Allocation, make_allocation
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.menus import has_widths, menu_names
from msp_plugin.plan.units import UnitTable
from msp_plugin.plugins.manager import spec_of
from msp_plugin.progress import StepProgress, no_progress
from msp_plugin.records.parts import SearchRecord
from msp_plugin.records.run import Outcome
from msp_plugin.runtime.digests import versions
from msp_plugin.runtime.files import finite
from msp_plugin.runtime.memory import freed_memory_kept
from msp_plugin.runtime.ranks import ALONE, Ranks
from msp_plugin.search.measurements import Measurements
from msp_plugin.search.resolve import ResolvedOptions
from msp_plugin.structure.groups import with_groups
from msp_plugin.structure.halves import ATTENTION, find_halves, is_mixed

log = logging.getLogger(__name__)

#: A warning says so where the nearest budget is further than this from the asked sparsity.
FAR = Fraction(1, 200)


def check_before_loading(source: ModelSource, plan: ResolvedOptions) -> None:
    """Raise what ``check_model`` would raise for a source's model, but for its weights: none is loaded or fetched.

    Where transformers cannot make the model without weights, the loaded one is checked alone.
    """
    if (model := source.empty()) is not None:
        _check_plan(model, plan)


def check_model(model: torch.nn.Module, plan: ResolvedOptions) -> UnitTable:
    """Return the model's units, after all checks that are cheap once the model is loaded.

    Raises:
        RecipeError, ModelError, BudgetError, VerificationError, NumericsError: see the functions called.
    """
    table, problem = _check_plan(model, plan)
    if problem is not None:
        _warn(model, plan, problem)
        if any(level.narrows for level in plan.menu) and not has_widths(plan.menu):
            table = with_inner(model, table)
    check_finite_weights(model, table)
    return table


def _check_plan(model: torch.nn.Module, plan: ResolvedOptions) -> tuple[UnitTable, AllocationProblem | None]:
    """Return (units, problem) of a model, whose weights are not read; no problem for a finished allocation.

    Raises:
        RecipeError, ModelError, BudgetError, VerificationError: see the functions called.
    """
    check_unquantized(model)
    if plan.given is not None:  # its layers take the place of targets and ignore
        plan.given.check_matches(prunable_layers(model))
        _check_groups(model, plan.given.table)
        return plan.given.table, None
    table = prunable_layers(model, plan.targets, plan.ignore, plan.granularity)
    if any(level.narrows for level in plan.menu):
        check_whole(model, table, plan.granularity, plan.menu)
    if has_widths(plan.menu):
        table = with_groups(model, table, plan.quantum)
    check_fit(table, plan.menu)
    if plan.form is not None:
        plan.form.check_model(model, plan.menu, plan.granularity)
    problem = make_problem(model, table, plan)
    _check_attentions(model, problem)
    _ = problem.budget  # raises where the levels do not reach the sparsity
    return table, problem


def _warn(model: torch.nn.Module, plan: ResolvedOptions, problem: AllocationProblem) -> None:
    """Log what a user may not expect of a problem."""
    budget = problem.budget
    if budget.kept == problem.reach[0] and not plan.is_uniform:
        log.warning(
            "sparsity %s is the highest that the levels reach, so only one allocation meets it; add sparser "
            "levels, e.g. 1:16, to give the search a choice",
            float(plan.sparsity),
        )
    if not budget.exact:
        far = abs(budget.sparsity - plan.sparsity) > FAR
        log.log(
            logging.WARNING if far else logging.INFO,
            "sparsity %s cannot be met exactly; the nearest is %d zeros of %d",
            plan.sparsity,
            budget.zeros,
            budget.weights,
        )
    if plan.granularity == "half" and is_mixed(model) and any(level.is_dropped for level in plan.menu):
        log.warning(
            "%s mixes blocks with and without a sliding window: where an attention is dropped, msp export --to small "
            "refuses the result; protect the attentions, or use granularity block",
            type(model).__name__,
        )


def _check_attentions(model: torch.nn.Module, problem: AllocationProblem) -> None:
    """Raise if every attention of a model that is known to have some may only be dropped.

    Raises:
        RecipeError: no token would see another one.
    """
    only = {
        unit.name
        for unit, may in zip(problem.table, problem.may, strict=True)
        if all(level.is_dropped for level, allowed in zip(problem.menu, may, strict=True) if allowed)
    }
    if not 0 < len(only) < len(problem.table):  # if all units may only be dropped, the budget is out of reach
        return
    if (attentions := _attentions(model)) and only.issuperset(attentions):
        raise RecipeError(
            f"every attention may only be dropped: no other level of {', '.join(menu_names(problem.menu))} fits one",
            hint='add levels that do, such as "dense"',
        )


def _attentions(model: torch.nn.Module) -> list[str]:
    """Return the names of a model's attentions; none if heads and channels of its type are not known."""
    try:
        return [half.name for half in find_halves(model) if half.kind == ATTENTION]
    except ModelError:
        return []


def _warn_of_no_attention(model: torch.nn.Module, allocation: Allocation) -> None:
    """Log a warning if an allocation drops every attention."""
    dropped = {
        unit.name for unit, level in zip(allocation.table, allocation.levels, strict=True) if level.is_dropped
    }
    if dropped and (attentions := _attentions(model)) and dropped.issuperset(attentions):
        log.warning("every attention is dropped, so that no token sees another one: protect some of them")


def _check_groups(model: torch.nn.Module, table: UnitTable) -> None:
    """Raise unless the groups of a finished allocation are those of the model.

    Raises:
        VerificationError: they are not.
        ModelError, RecipeError: see with_groups.
    """
    quantum = max((unit.groups.quantum for unit in table if unit.groups), default=0)
    if not quantum:
        return
    own = with_groups(model, table, quantum)
    odd = [
        a.name
        for a, b in zip(table.layers, own.layers, strict=True)
        if (a.groups, a.inner) != (b.groups, b.inner)
    ]
    if odd:
        raise VerificationError(
            f"the allocation gives {odd[0]} other heads or channels than the model has",
            hint="the file was edited, or is for another model; allocate anew",
        )


def allocate(
    model: torch.nn.Module,
    text: TextSplit,
    plan: ResolvedOptions,
    *,
    batch_tokens: int = 4096,
    fresh: bool = False,
    progress: StepProgress = no_progress,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Return the allocation that the plan asks for, with its cost; the model is left as it was.

    Unless ``fresh``, measurements of this model, text and method are read from the cache, so that a stopped search
    continues.

    Args:
        text: split as ``plan.search_text`` asks; ``TextSplit()`` without text.
        batch_tokens: most tokens of one forward pass.
        fresh: ignore the cached measurements and make them again.

    Raises:
        MSPError: see check_model, check_samples, build_database and the components.
    """
    table = check_model(model, plan)
    if text.pruning:
        check_samples(model, text.pruning)
    if plan.given is not None:
        return Outcome(plan.given)
    problem = make_problem(model, table, plan)
    allocator = plan.allocator
    if not text.pruning and plan.allocation_needs_data:
        raise RecipeError(f"allocator {allocator.name!r} needs calibration text", hint="pass a dataset")
    measurements = Measurements(
        model,
        table,
        plan.menu,
        plan.pruner,
        text,
        plan.estimators,
        plan.cache,
        batch_tokens,
        progress=progress,
        fresh=fresh,
        ranks=ranks,
        prefix=uniform_levels(problem),
    )
    with freed_memory_kept():
        result, record = measurements.allocate(allocator, problem, plan.seed)
    used = text.pruning if plan.allocation_needs_data else NO_TEXT
    allocation = _finish(
        model, measurements.model_id, used, plan, problem, result, measurements.sensitivities
    )
    _warn_of_no_attention(model, allocation)
    search = record if allocator.needs_database or plan.estimators else SearchRecord()
    return Outcome(allocation, search, measurements.saved_seconds)


def check_samples(model: torch.nn.Module, data: CalibrationSet) -> None:
    """Raise unless the model has an embedding for each token and, where it learned positions, for each place of its samples.

    Raises:
        DataError: a token id or a sample's length is beyond the model's.
    """
    embeddings = model.get_input_embeddings()  # type: ignore[operator]  # of transformers' models
    weight = own_parameters(embeddings)["weight"]
    assert weight is not None
    check_ids(data, int(weight.shape[0]))
    config, longest = text_config(model), max(len(sample) for sample in data.samples)
    most = next((value for key in POSITIONS if isinstance(value := getattr(config, key, None), int)), None)
    learned = {
        m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not embeddings
    }
    if most is not None and longest > most and learned & {most, most + 2}:  # OPT has two more
        raise DataError(
            f"samples of {longest} tokens, the model takes {most} at most",
            hint="give shorter ones: max_seq_length of oneshot",
        )


def make_problem(model: torch.nn.Module, table: UnitTable, plan: ResolvedOptions) -> AllocationProblem:
    """Return the problem of choosing a level for each of a model's units.

    Raises:
        RecipeError: see allowed_levels.
        BudgetError: see AllocationProblem.budget, which is computed when first asked for.
    """
    allowed = allowed_levels(model, table, plan.menu, plan.bounds)
    return AllocationProblem(table, plan.menu, plan.sparsity, allowed)


def uniform_levels(problem: AllocationProblem) -> tuple[str, ...]:
    """Return the name of each unit's level in the uniform allocation."""
    return tuple(problem.menu[k].name for k in problem.uniform())


def _finish(
    model: torch.nn.Module,
    model_id: str,
    data: CalibrationSet,
    plan: ResolvedOptions,
    problem: AllocationProblem,
    result: AllocationResult,
    sensitivities: dict[str, tuple[float, ...]],
) -> Allocation:
    """Return the allocation with its provenance; nothing in it differs from run to run."""
    provenance = {
        "model": {
            "architecture": type(model).__name__,
            "fingerprint": model_id,
        },
        "method": {**spec_of(plan.pruner), "host": plan.pruner.host, "version": plan.pruner.version()},
        "allocator": spec_of(plan.allocator),
        "estimators": {name: spec_of(e) for name, e in plan.estimators.items()},
        "levels": [level.name for level in plan.bounds.unprotected(plan.menu)],
        "targets": list(plan.targets),
        "ignore": list(plan.ignore),
        "granularity": plan.granularity,
        **({"quantum": plan.quantum} if has_widths(plan.menu) else {}),
        **plan.bounds.to_dict(),
        "seed": plan.seed,
        "calibration": {"fingerprint": data.fingerprint, "samples": len(data)} if data else None,
        "loss": finite(result.loss),
        "uniform_loss": finite(result.uniform_loss),
        "versions": versions(),
    }
    return make_allocation(problem, result.choice, sensitivities, provenance)
