"""From a model and calibration text to an allocation: sensitivity, level database, search."""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msp_plugin.allocators.base import AllocationInputs, AllocationResult
from msp_plugin.calibration import CalibrationSet
from msp_plugin.database.build import build_database, check_space
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import RecipeError
from msp_plugin.evaluation import CandidateLoss
from msp_plugin.files import default_cache, finite
from msp_plugin.models import (
    check_finite_weights,
    check_in_memory,
    check_widths,
    fingerprint,
    prunable_layers,
)
from msp_plugin.options import Plan
from msp_plugin.plan.allocation import Allocation, make_allocation
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.units import UnitTable
from msp_plugin.plugins import spec_of
from msp_plugin.sensitivity.base import unit_sensitivities

log = logging.getLogger(__name__)

#: Called with (step, done, total), step being a few words such as "sensitivity".
StepProgress = Callable[[str, int, int], None]


def no_progress(step: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Outcome:
    """An allocation and what it cost to find. ``search`` holds the ``search`` part of run.json."""

    allocation: Allocation
    search: dict[str, Any] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on, those that are installed."""
    found = {}
    for name in ("msp_plugin", "torch", "transformers", "llmcompressor", "compressed-tensors", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_model(model: torch.nn.Module, plan: Plan) -> UnitTable:
    """Return the model's units after the checks that need the model but no work.

    Raises:
        RecipeError, ModelError, BudgetError, VerificationError, NumericsError: see the functions called.
    """
    if plan.given is not None:  # its layers are the targets
        plan.given.check_matches(prunable_layers(model))
        table = plan.given.table
    else:
        table = prunable_layers(model, plan.targets, plan.ignore)
        check_widths(table, plan.menu)
        budget = AllocationProblem(table, plan.menu, plan.sparsity).budget
        if not budget.exact:
            log.info(
                "sparsity %s cannot be met to the weight: nearest is %d zeros of %d",
                plan.sparsity, budget.zeros, budget.weights,
            )  # fmt: skip
    check_finite_weights(model, table)
    return table


def allocate(
    model: torch.nn.Module,
    data: CalibrationSet | None,
    plan: Plan,
    *,
    batch_tokens: int = 4096,
    progress: StepProgress = no_progress,
) -> Outcome:
    """Return the allocation that the plan asks for; the model is left as it was found.

    The last samples of ``data`` are held out to measure candidates, as many as the allocator's
    ``tokens`` ask for; all others give sensitivities and statistics.

    Raises:
        MSPError: see check_model, CalibrationSet.split, build_database and the components.
    """
    table = check_model(model, plan)
    if plan.given is not None:
        return Outcome(plan.given)
    problem = AllocationProblem(table, plan.menu, plan.sparsity)
    allocator, model_id = plan.allocator, fingerprint(model)
    if not allocator.needs_database and not plan.estimators:
        result = allocator.allocate(_inputs(plan, problem, {}, None, None, lambda done, total: None))
        return Outcome(_finish(model, model_id, None, plan, problem, result, {}))
    if data is None:
        raise RecipeError(f"allocator {allocator.name!r} needs calibration text", hint="pass a dataset")
    start = time.monotonic()
    check_in_memory(model)
    head, held_out = data.split(allocator.held_out_tokens)
    sensitivities = _sensitivities(model, head, table, plan, progress)
    database = None
    if allocator.needs_database:
        database = open_database(model_id, head, plan)
        check_space(database, model, table)
        build_database(
            database, model, table, plan.pruner, head, batch_tokens=batch_tokens,
            progress=partial(progress, "level database"),
        )  # fmt: skip
    began = time.monotonic()
    measured = (
        CandidateLoss(model, database, problem, held_out, allocator.objective, batch_tokens)
        if database is not None and allocator.measures
        else nullcontext()
    )
    with measured as loss:
        report = partial(progress, "search")
        result = allocator.allocate(_inputs(plan, problem, sensitivities, database, loss, report))
    now = time.monotonic()
    log.info("search %s: %d candidates, %.1f s", allocator.name, result.evaluations, now - began)
    search = {
        "allocator": allocator.name,
        "forward_tokens": loss.forward_tokens if loss is not None else 0,
        "evaluations": result.evaluations,
        "seconds": round(now - began, 3),
        "total_seconds": round(now - start, 3),
        "loss": finite(result.loss),
        "uniform_loss": finite(result.uniform_loss),
        "curve": [list(point) for point in result.curve],
    }
    return Outcome(_finish(model, model_id, data, plan, problem, result, sensitivities), search)


def _sensitivities(
    model: torch.nn.Module, data: CalibrationSet, table: UnitTable, plan: Plan, progress: StepProgress
) -> dict[str, tuple[float, ...]]:
    found = {}
    for name, estimator in plan.estimators.items():
        began = time.monotonic()
        found[name] = unit_sensitivities(estimator, model, data, table, partial(progress, "sensitivity"))
        log.info("sensitivity %s: %d units, %.1f s", name, len(table), time.monotonic() - began)
    return found


def open_database(model_id: str, data: CalibrationSet, plan: Plan) -> LevelDatabase:
    """Return the level database of a model (its fingerprint), samples, method and levels, built or not."""
    identity = {
        "model": model_id,
        "calibration": data.fingerprint if plan.pruner.needs_statistics else None,
        "method": {**spec_of(plan.pruner), "host": plan.pruner.host, "version": plan.pruner.version()},
        "code": plan.pruner.code(),
        "torch": torch.__version__,
    }
    return LevelDatabase(Path(plan.cache or default_cache()), identity, plan.menu)


def _inputs(
    plan: Plan,
    problem: AllocationProblem,
    sensitivities: dict[str, tuple[float, ...]],
    database: LevelDatabase | None,
    loss: CandidateLoss | None,
    progress: Callable[[int, int], None],
) -> AllocationInputs:
    weight_error, output_error = database.errors(problem.table) if database else (None, None)
    values = {name: np.array(v) for name, v in sensitivities.items()}
    return AllocationInputs(problem, values, weight_error, output_error, loss, plan.seed, progress)


def _finish(
    model: torch.nn.Module,
    model_id: str,
    data: CalibrationSet | None,
    plan: Plan,
    problem: AllocationProblem,
    result: AllocationResult,
    sensitivities: dict[str, tuple[float, ...]],
) -> Allocation:
    """Return the allocation with where it came from; nothing in it differs from run to run."""
    provenance = {
        "model": {
            "architecture": type(model).__name__,
            "fingerprint": model_id,
        },
        "method": {**spec_of(plan.pruner), "host": plan.pruner.host, "version": plan.pruner.version()},
        "allocator": spec_of(plan.allocator),
        "estimators": {name: spec_of(e) for name, e in plan.estimators.items()},
        "levels": [level.name for level in plan.menu],
        "targets": list(plan.targets),
        "ignore": list(plan.ignore),
        "seed": plan.seed,
        "calibration": (None if data is None else {"fingerprint": data.fingerprint, "samples": len(data)}),
        "loss": finite(result.loss),
        "uniform_loss": finite(result.uniform_loss),
        "versions": versions(),
    }
    return make_allocation(problem, result.choice, sensitivities, provenance)
