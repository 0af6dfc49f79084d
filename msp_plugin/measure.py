"""What allocators read of a model under one pruning method; each number is measured once."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator
from msp_plugin.calibration import CalibrationSet
from msp_plugin.candidates import CandidateLoss, CandidateWeights
from msp_plugin.database.build import build_database, check_space
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import RecipeError, nearest
from msp_plugin.files import default_cache, finite, write_json
from msp_plugin.models import check_in_memory, fingerprint
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.levels import DENSE, Level
from msp_plugin.plan.units import UnitTable
from msp_plugin.plugins import spec_of
from msp_plugin.pruning.base import Pruner
from msp_plugin.sensitivity.base import Estimator, unit_sensitivities
from msp_plugin.sensitivity.fisher_error import fisher_errors

log = logging.getLogger(__name__)

#: Called with (step, done, total), step being a few words such as "sensitivity".
StepProgress = Callable[[str, int, int], None]


def no_progress(step: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass
class Measurements:
    """A model with its text and method, and what was measured of them so far.

    One object serves any number of allocators, budgets and seeds: sensitivities, the level database and
    errors are measured when the first of them asks.

    Args:
        calibration: samples of the sensitivities and of the pruning statistics.
        search, holdout: samples that measure candidates, and that tell a search when to stop; None where
            no allocator asks for them.
        estimators: by name, those that allocators may ask for.
        fisher_samples: calibration samples of the Fisher-weighted error.
    """

    model: torch.nn.Module
    table: UnitTable
    menu: tuple[Level, ...]
    pruner: Pruner
    calibration: CalibrationSet | None
    search: CalibrationSet | None
    holdout: CalibrationSet | None
    estimators: Mapping[str, Estimator]
    cache: str | None = None
    batch_tokens: int = 4096
    fisher_samples: int = 128
    progress: StepProgress = no_progress
    sensitivities: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @cached_property
    def model_id(self) -> str:
        """The fingerprint of the dense model."""
        return fingerprint(self.model)

    @cached_property
    def database(self) -> LevelDatabase:
        """The level database, built if it is not there.

        Raises:
            MSPError: see build_database and check_space.
        """
        database = open_database(self.model_id, self.calibration, self.pruner, self.menu, self.cache)
        check_space(database, self.model, self.table)
        build_database(
            database, self.model, self.table, self.pruner, self.calibration,
            progress=partial(self.progress, "level database"),
        )  # fmt: skip
        return database

    def sensitivity(self, name: str) -> tuple[float, ...]:
        """Return one number per unit of the dense model.

        Raises:
            RecipeError: there is no such estimator, or no text for it.
            NumericsError: see unit_sensitivities.
        """
        if name not in self.sensitivities:
            began = time.monotonic()
            self.sensitivities[name] = self._estimate(name, partial(self.progress, f"sensitivity, {name}"))
            log.info("sensitivity %s: %d units, %.1f s", name, len(self.table), time.monotonic() - began)
        return self.sensitivities[name]

    def _estimate(self, name: str, progress: Callable[[int, int], None]) -> tuple[float, ...]:
        if name not in self.estimators:
            raise RecipeError(f"there is no estimator {name!r} here", hint=nearest(name, self.estimators))
        estimator = self.estimators[name]
        if not self.calibration and estimator.needs_data:
            raise RecipeError(f"sensitivity {name!r} needs calibration text", hint="pass a dataset")
        data = self.calibration or CalibrationSet((), "none")
        return unit_sensitivities(estimator, self.model, data, self.table, progress)

    def error(self, name: str) -> np.ndarray:
        """Return float64[U, K] of the error ``weight``, ``output`` or ``fisher`` (see AllocationInputs).

        Raises:
            RecipeError: there is no error of that name.
        """
        if name in ("weight", "output"):
            return self.database.errors(self.table)[("weight", "output").index(name)]
        if name == "fisher":
            return self._fisher_error
        raise RecipeError(
            f"there is no error {name!r}", hint=nearest(name, ("weight", "output", "fisher", "kl"))
        )

    def replace_one(self, tokens: int) -> tuple[np.ndarray, int]:
        """Return float64[U, K], the KL divergence with one unit pruned and all others dense, and its cost.

        Measured on about ``tokens`` tokens of the search text; the cost is in forward tokens.

        Raises:
            RecipeError: there is no search text.
        """
        if not self.search:
            raise RecipeError("the replace-one KL needs search text", hint="pass a dataset")
        _, part = self.search.cut(tokens)
        units = [[layer.name for layer in unit.layers] for unit in self.table]
        key = {"data": part.fingerprint, "units": units, "database": self.database.key, "version": 1}

        def measure() -> dict[str, Any]:
            dense = (*self.menu, DENSE) if DENSE not in self.menu else self.menu
            problem = AllocationProblem(self.table, dense, Fraction(0))
            none = (dense.index(DENSE),) * len(self.table)
            found = np.zeros((len(self.table), len(dense)))
            with CandidateWeights(self.model, self.database, problem) as weights:
                loss = CandidateLoss(weights, part, "kl", self.batch_tokens).prepare()
                loss.keep(none)
                loss(none)
                for u in range(len(self.table)):
                    self.progress("replace-one KL", u + 1, len(self.table))
                    for k in range(len(dense)):
                        if k != none[u]:
                            found[u, k] = loss((*none[:u], k, *none[u + 1 :]))
            return {"kl": found[:, : len(self.menu)].tolist(), "tokens": loss.forward_tokens}

        held = self._held("replace-one", key, measure)
        return np.array(held["kl"]), held["tokens"]

    @cached_property
    def _fisher_error(self) -> np.ndarray:
        data = CalibrationSet(self.calibration.samples[: self.fisher_samples], "")
        names = [level.name for level in self.menu if not level.is_dense]
        layers = [layer.name for layer in self.table.layers]
        key = {"data": data.fingerprint, "layers": layers, "database": self.database.key, "version": 1}

        def measure() -> dict[str, Any]:
            report = partial(self.progress, "Fisher-weighted error")
            return fisher_errors(
                self.model, data, layers, names, self.database.weight, progress=report
            )  # fmt: skip

        by_layer = self._held("fisher-error", key, measure)
        return np.array(
            [
                [sum(by_layer[a.name].get(level.name, 0.0) for a in unit.layers) for level in self.menu]
                for unit in self.table
            ]  # a dense layer has no error
        )

    def _held(self, name: str, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return numbers that lie beside the level database, measured if those of this key do not."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        path = self.database.path / f"{name}-{digest[:16]}.json"
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            held = None
        if not isinstance(held, dict) or held.get("key") != key or "found" not in held:
            began = time.monotonic()
            held = {"key": key, "found": measure()}
            write_json(path, held)
            log.info("%s: %.1f s", name, time.monotonic() - began)
        return held["found"]

    def allocate(
        self, allocator: Allocator, problem: AllocationProblem, seed: int
    ) -> tuple[AllocationResult, dict[str, Any]]:
        """Return the allocator's result and the ``search`` part of run.json.

        Raises:
            MSPError: see the components.
        """
        start = time.monotonic()
        if allocator.measures and not self.search:
            raise RecipeError(f"allocator {allocator.name!r} needs search text", hint="pass a dataset")
        exchanges = allocator.measures or allocator.remeasures or {"kl", "fisher"} & set(allocator.errors)
        if allocator.needs_database and exchanges:
            check_in_memory(self.model)
        values = {name: np.array(self.sensitivity(name)) for name in allocator.sensitivities}
        errors, paid = {}, 0
        for name in allocator.errors:
            if name == "kl":
                errors[name], paid = self.replace_one(allocator.tokens)
            else:
                errors[name] = self.error(name)
        if allocator.needs_database:
            _ = self.database
        began = time.monotonic()
        with self._measured(allocator, problem) as (loss, holdout, estimate):
            result = allocator.allocate(
                AllocationInputs(
                    problem, values, errors, loss, seed, partial(self.progress, "search"), holdout, estimate
                )
            )
        now = time.monotonic()
        log.info("%s: %d candidates, %.1f s", allocator.name, result.evaluations, now - began)
        for note in result.notes:
            log.info("%s: %s", allocator.name, note)
        measured = [part for part in (loss, holdout) if part is not None]
        search = {
            "allocator": allocator.name,
            "forward_tokens": paid + sum(part.forward_tokens for part in measured),
            "evaluations": result.evaluations,
            "seconds": round(now - began, 3),
            "total_seconds": round(now - start, 3),
            "loss": finite(result.loss),
            "uniform_loss": finite(result.uniform_loss),
            "curve": [list(point) for point in result.curve],
            "holdout": [[tokens, finite(value)] for tokens, value in result.holdout],
            "predictions": [[finite(value) for value in pair] for pair in result.predictions],
            "notes": list(result.notes),
        }
        return result, search

    @contextmanager
    def _measured(self, allocator: Allocator, problem: AllocationProblem) -> Iterator[tuple[Any, Any, Any]]:
        """Yield the losses and the estimate that an allocator asks for; the model is itself afterwards."""
        if not (allocator.measures or allocator.remeasures):
            yield None, None, None
            return
        with CandidateWeights(self.model, self.database, problem) as weights:

            def loss_on(data: CalibrationSet | None) -> CandidateLoss | None:
                if data is None or not len(data):
                    return None
                return CandidateLoss(weights, data, allocator.objective, self.batch_tokens).prepare()

            def estimate(name: str, choice: tuple[int, ...]) -> np.ndarray:
                weights.set(choice)
                return np.array(self._estimate(name, lambda done, total: None))

            search = holdout = None
            if allocator.measures:
                search = loss_on(self.search.cut(allocator.held_out_tokens)[1])
            if allocator.stopping_tokens and self.holdout is not None:
                holdout = loss_on(self.holdout.cut(allocator.stopping_tokens)[1])
            yield search, holdout, estimate if allocator.remeasures else None


def open_database(
    model_id: str, data: CalibrationSet | None, pruner: Pruner, menu: tuple[Level, ...], cache: str | None
) -> LevelDatabase:
    """Return the level database of a model (its fingerprint), samples, method and levels, built or not."""
    identity = {
        "model": model_id,
        "calibration": data.fingerprint if pruner.needs_statistics else None,
        "method": {**spec_of(pruner), "host": pruner.host, "version": pruner.version()},
        "code": pruner.code(),
        "torch": torch.__version__,
    }
    return LevelDatabase(Path(cache or default_cache()), identity, menu)
