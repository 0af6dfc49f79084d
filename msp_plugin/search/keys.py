"""Identities of measurements: JSON values with everything that a measurement depends on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from msp_plugin.allocators.base import Allocator
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import TextSplit
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.units import UnitTable
from msp_plugin.plugins.manager import spec_of
from msp_plugin.pruning.base import Pruner
from msp_plugin.runtime.digests import component_digest, folders_digest, versions
from msp_plugin.sensitivity.base import Estimator

#: Packages whose code decides the measured numbers. Components have digests of their own.
MEASURING_ROOMS = ("database", "formats", "passes", "plan", "pruning", "search", "sensitivity", "structure")


@cache
def measuring_code() -> str:
    """Return the SHA-256, in hex, of all source files that measure; when it changes, everything is measured again."""
    return folders_digest(Path(__file__).parents[1], MEASURING_ROOMS)


def journal_identity(about: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return the identity of a journal: what it is about, the kind of device, the code and the versions."""
    return {**about, "device": device, "measurement": measuring_code(), "versions": versions()}


def database_identity(
    model_id: str,
    data: CalibrationSet,
    pruner: Pruner,
    *,
    prefix: Mapping[str, str] | None,
    batch_tokens: int,
    device: str,
    table: UnitTable | None = None,
) -> dict[str, Any]:
    """Return the identity of a level database; ``batch_tokens`` and the device decide how statistics are rounded.

    Args:
        table: for a method that prunes whole units, whose layers' weights depend on each other.
    """
    statistics = pruner.needs_statistics
    return {
        **(
            {}
            if table is None
            else {"units": units_of(table), "groups": [str(unit.groups) for unit in table]}
        ),
        "model": model_id,
        "calibration": data.fingerprint if pruner.needs_data else None,
        "method": {**spec_of(pruner), "host": pruner.host, "version": pruner.version()},
        "code": [pruner.code(), measuring_code()],
        "batch_tokens": batch_tokens if statistics else None,
        "prefix": prefix and dict(prefix),
        "device": device,
        "versions": versions(),
    }


def sensitivity_identity(
    model_id: str, estimator: Estimator, data: CalibrationSet, table: UnitTable
) -> dict[str, Any]:
    """Return the identity of the sensitivities of a dense model."""
    return {
        "model": model_id,
        "estimator": spec_of(estimator),
        "code": component_digest(estimator),
        "data": data.fingerprint if data and estimator.needs_data else None,
        "units": units_of(table),
    }


def problem_identity(database_key: str, problem: AllocationProblem, batch_tokens: int) -> dict[str, Any]:
    """Return the identity of the losses of a problem's candidates, without the text that they are measured on."""
    return {
        "database": database_key,
        "target": str(problem.target),
        "levels": [level.name for level in problem.menu],
        "units": units_of(problem.table),
        "allowed": None if problem.allowed is None else problem.allowed.tolist(),
        "batch_tokens": batch_tokens,
    }


def search_identity(
    allocator: Allocator, seed: int, text: TextSplit, estimators: Iterable[Estimator]
) -> dict[str, Any]:
    """Return the identity of an allocator's search, without its problem (see problem_identity).

    Args:
        text: the search text, hold-out and calibration text that it measures on.
        estimators: the estimators whose sensitivities it reads.
    """
    return {
        "allocator": spec_of(allocator),
        "code": component_digest(allocator),
        "seed": seed,
        "search": text.search.fingerprint,
        "holdout": text.holdout.fingerprint,
        "calibration": text.calibration.fingerprint,
        "estimators": [[spec_of(estimator), component_digest(estimator)] for estimator in estimators],
    }


def units_of(table: UnitTable) -> list[list[str]]:
    """Return the names of the layers of each unit."""
    return [[layer.name for layer in unit.layers] for unit in table]
