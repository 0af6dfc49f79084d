"""What allocators read of a model under one pruning method; each number is measured once."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator, Choice
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database import build
from msp_plugin.database.build import BATCH_TOKENS, build_database, check_space
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import HostError, NumericsError, RecipeError, nearest
from msp_plugin.formats import bitmask
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.offload import check_loadable, input_device
from msp_plugin.passes import by_block as blockwise
from msp_plugin.passes import losses as evaluation
from msp_plugin.passes import observe as activations
from msp_plugin.passes import prefix, recompute
from msp_plugin.passes.gradients import BACKWARD
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.levels import DENSE, Level
from msp_plugin.plan.units import UnitTable
from msp_plugin.plugins.manager import spec_of
from msp_plugin.progress import StepProgress, no_progress
from msp_plugin.pruning.base import Pruner
from msp_plugin.runtime.digests import component_digest, digest, source_digest, versions
from msp_plugin.runtime.files import cache_directory, finite
from msp_plugin.runtime.journal import Journal
from msp_plugin.runtime.locks import alone
from msp_plugin.runtime.memory import free_cached
from msp_plugin.runtime.ranks import ALONE, Ranks
from msp_plugin.search import batches, dense_reference
from msp_plugin.search import candidate_loss as candidates
from msp_plugin.search import candidate_weights as exchange
from msp_plugin.search import move_gradients as slopes
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.candidate_weights import CandidateWeights
from msp_plugin.search.recorded import RecordedEstimate, RecordedLoss
from msp_plugin.sensitivity import fisher_error
from msp_plugin.sensitivity.base import Estimator, unit_sensitivities
from msp_plugin.sensitivity.fisher import FisherTrace
from msp_plugin.sensitivity.fisher_error import diagonal_groups, fisher_errors

log = logging.getLogger(__name__)

#: What measures beside methods and estimators, which have keys of their own.
_MEASURING = (
    activations, bitmask, blockwise, build, candidates, evaluation, exchange, fisher_error, prefix, recompute, slopes,
)  # fmt: skip


@cache
def _code() -> str:
    """Return a digest of the code that measures: what other code has measured is measured anew."""
    return source_digest(modules=_MEASURING)


class _Paid(Protocol):
    """What measured values for an allocator: what that cost."""

    forward_tokens: int
    saved_seconds: float


@dataclass
class Measurements:
    """A model with its text and method, and what was measured of them so far.

    One object serves any number of allocators and seeds, and of budgets where there is no ``prefix``: sensitivities, the level database and
    errors are measured when the first of them asks.

    Args:
        pruner: None where nothing asks for the level database.
        calibration: samples of the sensitivities and of the pruning statistics.
        search, holdout: samples that measure candidates, and that tell a search when to stop; None where
            no allocator asks for them.
        estimators: by name, those that allocators may ask for. The Fisher-weighted error is of as many samples
            as ``fisher`` is.
        fresh: measure anew what the cache holds of this model, method and text.
        ranks: share the measurements; each has the model, the text and the cache.
        prefix: the name of a level by unit, the pruned blocks that the level database's statistics are taken behind
            (see build_database); None: dense ones.
        renewed: what ``fresh`` has measured anew, for measurements that share the cache.
    """

    model: torch.nn.Module
    table: UnitTable
    menu: tuple[Level, ...]
    pruner: Pruner | None
    calibration: CalibrationSet | None
    search: CalibrationSet | None
    holdout: CalibrationSet | None
    estimators: Mapping[str, Estimator]
    cache: str | None = None
    batch_tokens: int = BATCH_TOKENS
    progress: StepProgress = no_progress
    fresh: bool = False
    ranks: Ranks = ALONE
    prefix: tuple[str, ...] | None = None
    sensitivities: dict[str, tuple[float, ...]] = field(default_factory=dict)
    renewed: set[Path] = field(default_factory=set)

    @cached_property
    def model_id(self) -> str:
        """The fingerprint of the dense model.

        Raises:
            HostError: ranks have different ones.
        """
        texts = [part and part.fingerprint for part in (self.calibration, self.search, self.holdout)]
        device = input_device(self.model).type
        found = self.ranks.gather(lambda: [fingerprint(self.model), device, *texts])
        if any(of != found[0] for of in found):
            raise HostError(
                "the ranks hold different models, texts or kinds of device",
                hint="give all of them the same files, and as many GPUs as ranks",
            )
        return found[0][0]

    @cached_property
    def database(self) -> LevelDatabase:
        """The level database, built if it is not there.

        Raises:
            MSPError: see build_database and check_space.
        """
        database = open_database(
            self.model_id, self.calibration, self.pruner, self.menu, self.cache,
            prefix=self._by_layer, batch_tokens=self.batch_tokens, device=input_device(self.model).type,
        )  # fmt: skip

        def prepare() -> None:
            if self.fresh and database.path not in self.renewed:
                self.renewed.add(database.path)
                database.renew()
            database.tidy()
            check_space(database, self.model, self.table)

        with self._alone(database.lock, "it builds the level database", wait=True):
            self.ranks.first(prepare)
            build_database(
                database, self.model, self.table, self.pruner, self.calibration, prefix=self._by_layer,
                batch_tokens=self.batch_tokens, progress=partial(self.progress, "level database"),
                ranks=self.ranks,
            )  # fmt: skip
        return database

    @property
    def _by_layer(self) -> dict[str, str] | None:
        """The prefix by layer; None where the method does not look at inputs."""
        if self.prefix is None or not self.pruner.needs_statistics:
            return None
        return {
            a.name: level for unit, level in zip(self.table, self.prefix, strict=True) for a in unit.layers
        }

    @contextmanager
    def _alone(self, path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
        """Lock a file for all ranks while something is measured: rank 0 holds it; all give its memory back."""
        try:
            with alone(path, what, wait=wait) if self.ranks.rank == 0 else nullcontext():
                yield
        finally:
            free_cached()

    def sensitivity(self, name: str) -> tuple[float, ...]:
        """Return one number per unit of the dense model.

        Raises:
            RecipeError: there is no such estimator, or no text for it.
            NumericsError: see unit_sensitivities.
        """
        if name not in self.sensitivities:
            if name not in self.estimators:
                raise RecipeError(f"there is no estimator {name!r} here", hint=nearest(name, self.estimators))
            estimator = self.estimators[name]
            key = {
                "model": self.model_id, "estimator": spec_of(estimator), "code": component_digest(estimator),
                "data": self.calibration.fingerprint if self.calibration and estimator.needs_data else None,
                "units": [[layer.name for layer in unit.layers] for unit in self.table],
            }  # fmt: skip
            folder = cache_directory(self.cache) / "sensitivity"
            with self._journal(folder, name, key) as journal:
                began = time.monotonic()
                report = partial(self.progress, f"sensitivity, {name}")
                self.sensitivities[name] = self._estimate(name, report, journal)
                log.info("sensitivity %s: %d units, %.1f s", name, len(self.table), time.monotonic() - began)
        return self.sensitivities[name]

    def _estimate(
        self, name: str, progress: Callable[[int, int], None], journal: Journal | None = None
    ) -> tuple[float, ...]:
        estimator = self.estimators[name]
        if not self.calibration and estimator.needs_data:
            raise RecipeError(f"sensitivity {name!r} needs calibration text", hint="pass a dataset")
        data = self.calibration or CalibrationSet((), "none")
        return unit_sensitivities(
            estimator, self.model, data, self.table, progress, journal, self.ranks
        )  # fmt: skip

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

    def replace_one(self, tokens: int) -> tuple[np.ndarray, RecordedLoss]:
        """Return float64[U, K], the KL divergence with one unit pruned and all others dense, and what measured it.

        Measured on about ``tokens`` tokens of the search text.

        Raises:
            RecipeError: there is no search text.
        """
        if not self.search:
            raise RecipeError("the replace-one KL needs search text", hint="pass a dataset")
        _, part = self.search.cut(tokens)
        dense = (*self.menu, DENSE) if DENSE not in self.menu else self.menu
        problem = AllocationProblem(self.table, dense, Fraction(0))
        none = (dense.index(DENSE),) * len(self.table)
        found = np.zeros((len(self.table), len(dense)))
        with (
            self._search_journal("replace-one", problem, {"data": part.fingerprint}) as journal,
            CandidateWeights(self.model, self.database, problem) as weights,
        ):
            loss = self._recorded(weights, part, "kl", journal, "search")
            loss.set_incumbent(none)
            loss(none)
            for u in range(len(self.table)):
                self.progress("replace-one KL", u + 1, len(self.table))
                for k in range(len(dense)):
                    if k != none[u]:
                        found[u, k] = loss((*none[:u], k, *none[u + 1 :]))
        return found[:, : len(self.menu)], loss

    def _fisher_data(self) -> CalibrationSet:
        most = getattr(self.estimators.get("fisher"), "samples", FisherTrace.samples)
        return CalibrationSet(self.calibration.samples[:most], "")

    def sensitivity_tokens(self, allocator: Allocator) -> int:
        """Return the forward tokens of the sensitivities and errors that an allocator reads, whoever measured them."""
        data = self.calibration or CalibrationSet((), "none")
        total = sum(self.estimators[name].forward_tokens(data) for name in allocator.sensitivities)
        if "fisher" in allocator.errors:
            layers = [layer.name for layer in self.table.layers]
            total += BACKWARD * self._fisher_data().tokens * len(diagonal_groups(self.model, layers))
        return total

    @cached_property
    def _fisher_error(self) -> np.ndarray:
        data = self._fisher_data()
        names = [level.name for level in self.menu if not level.is_dense]
        layers = [layer.name for layer in self.table.layers]
        key = {"data": data.fingerprint, "layers": layers, "database": self.database.key}
        with self._journal(self.database.path, "fisher-error", key) as journal:
            began = time.monotonic()
            by_layer = fisher_errors(
                self.model, data, layers, names, self.database.weight,
                progress=partial(self.progress, "Fisher-weighted error"), journal=journal, ranks=self.ranks,
            )  # fmt: skip
            log.info("Fisher-weighted error: %.1f s", time.monotonic() - began)
        bad = [name for name, errors in by_layer.items() if not all(map(math.isfinite, errors.values()))]
        if bad:
            raise NumericsError(
                f"the Fisher-weighted error is not finite for {len(bad)} layers, e.g. {bad[0]}",
                hint="the model's loss or activations overflow: try dtype float32",
            )
        return np.array(
            [
                [sum(by_layer[a.name].get(level.name, 0.0) for a in unit.layers) for level in self.menu]
                for unit in self.table
            ]  # a dense layer has no error
        )

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
            check_loadable(self.model)
        values = {name: np.array(self.sensitivity(name)) for name in allocator.sensitivities}
        errors = {name: self.error(name) for name in allocator.errors if name != "kl"}
        if allocator.needs_database:
            _ = self.database
        began = time.monotonic()
        paid: list[_Paid] = []
        if "kl" in allocator.errors:
            errors["kl"], part = self.replace_one(allocator.tokens)
            paid.append(part)
        with self._measured(allocator, problem, seed) as (loss, holdout, estimate):
            paid += [part for part in (loss, holdout, estimate) if part is not None]
            result = allocator.allocate(
                AllocationInputs(
                    problem, values, errors, loss, seed, partial(self.progress, "search"), holdout, estimate,
                    lambda: self._clock(paid),
                )
            )  # fmt: skip
        now = time.monotonic()
        log.info("%s: %d candidates, %.1f s", allocator.name, result.evaluations, now - began)
        if result.ended:
            log.info("%s ended %s", allocator.name, result.ended)
        for note in result.notes:
            log.warning("%s: %s", allocator.name, note)
        read = sum(part.saved_seconds for part in paid)
        search = {
            "allocator": allocator.name,
            "forward_tokens": sum(part.forward_tokens for part in paid),
            "sensitivity_tokens": self.sensitivity_tokens(allocator),
            "evaluations": result.evaluations,
            "seconds": round(now - began + read, 3),
            "total_seconds": round(now - start + read, 3),
            "loss": finite(result.loss),
            "uniform_loss": finite(result.uniform_loss),
            "curve": [[tokens, finite(value)] for tokens, value in result.curve],
            "holdout": [[tokens, finite(value)] for tokens, value in result.holdout],
            "predictions": [[finite(value) for value in pair] for pair in result.predictions],
            "notes": list(result.notes),
            "ended": result.ended,
        }
        return result, search

    def _clock(self, paid: Sequence[_Paid]) -> float:
        """Return the seconds of rank 0, with those that values had taken which a stopped search left."""
        read = sum(part.saved_seconds for part in paid)
        return self.ranks.first(lambda: time.monotonic() + read)

    @contextmanager
    def _measured(
        self, allocator: Allocator, problem: AllocationProblem, seed: int
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Yield the losses and the estimate that an allocator asks for; the model is itself afterwards."""
        if not (allocator.measures or allocator.remeasures):
            yield None, None, None
            return
        search = holdout = None
        if allocator.measures:
            search = self.search.cut(allocator.held_out_tokens)[1]
        if allocator.stopping_tokens and self.holdout is not None:
            holdout = self.holdout.cut(allocator.stopping_tokens)[1] or None
        about = {
            "allocator": spec_of(allocator), "code": component_digest(allocator), "seed": seed,
            "search": search and search.fingerprint, "holdout": holdout and holdout.fingerprint,
            "calibration": self.calibration and self.calibration.fingerprint,
            "estimators": [
                [spec_of(estimator), component_digest(estimator)]
                for name, estimator in sorted(self.estimators.items()) if name in allocator.sensitivities
            ],
        }  # fmt: skip
        with (
            self._search_journal("search", problem, about) as journal,
            CandidateWeights(self.model, self.database, problem) as weights,
        ):

            def loss_on(data: CalibrationSet | None, name: str) -> RecordedLoss | None:
                return data and self._recorded(weights, data, allocator.objective, journal, name)

            def measure(name: str, choice: Choice) -> tuple[tuple[float, ...], int]:
                weights.set(choice)
                tokens = self.estimators[name].forward_tokens(self.calibration or CalibrationSet((), "none"))
                return self._estimate(name, lambda done, total: None), tokens

            remeasured = RecordedEstimate(measure, journal) if allocator.remeasures else None
            yield loss_on(search, "search"), loss_on(holdout, "holdout"), remeasured

    @contextmanager
    def _journal(self, folder: Path, name: str, identity: Mapping[str, Any]) -> Iterator[Journal]:
        """Yield the journal of what the identity names; another process that has it is waited for."""
        device = input_device(self.model).type
        identity = {**identity, "device": device, "measurement": _code(), "versions": versions()}
        path = folder / f"{name}-{digest(identity)[:16]}.jsonl"
        with self._alone(path.with_suffix(".lock"), f"it measures {name} of this model and text", wait=True):
            if self.fresh and path not in self.renewed:
                self.renewed.add(path)
                self.ranks.first(lambda: path.unlink(missing_ok=True))
            with closing(Journal(path, identity, self.ranks)) as journal:
                yield journal

    def _search_journal(
        self, name: str, problem: AllocationProblem, about: Mapping[str, Any]
    ) -> AbstractContextManager[Journal]:
        """Return the journal of a search over a problem."""
        identity = {
            "database": self.database.key, "target": str(problem.target),
            "levels": [level.name for level in problem.menu],
            "units": [[layer.name for layer in unit.layers] for unit in problem.table],
            "allowed": None if problem.allowed is None else problem.allowed.tolist(),
            "batch_tokens": self.batch_tokens, **about,
        }  # fmt: skip
        return self._journal(self.database.path, name, identity)

    def _recorded(
        self, weights: CandidateWeights, data: CalibrationSet, objective: str, journal: Journal, name: str
    ) -> RecordedLoss:
        def make() -> CandidateLoss:
            loss = CandidateLoss(weights, data, objective, self.batch_tokens, ranks=self.ranks)
            return loss.prepare()

        return RecordedLoss(make, data, journal, name)


def open_database(
    model_id: str, data: CalibrationSet | None, pruner: Pruner, menu: tuple[Level, ...], cache: str | None,
    *, prefix: Mapping[str, str] | None = None, batch_tokens: int = BATCH_TOKENS, device: str = "cpu",
) -> LevelDatabase:  # fmt: skip
    """Return the level database of a model (its fingerprint), samples, method and levels, built or not.

    How statistics are added up rounds by ``batch_tokens`` and the device.
    """
    identity = {
        "model": model_id,
        "calibration": data.fingerprint if pruner.needs_statistics else None,
        "method": {**spec_of(pruner), "host": pruner.host, "version": pruner.version()},
        "code": [pruner.code(), _code()],
        "batch_tokens": batch_tokens if pruner.needs_statistics else None,
        "prefix": prefix and dict(prefix),
        "device": device,
        "versions": versions(),
    }
    return LevelDatabase(cache_directory(cache), identity, menu)
