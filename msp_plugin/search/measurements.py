"""Measure, once each, the numbers that allocators read: sensitivities, errors and losses under one pruning method."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from msp_plugin.allocators.base import AllocationInputs, AllocationResult, Allocator, Choice
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import NO_TEXT, TextSplit
from msp_plugin.database.build import BATCH_TOKENS
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import HostError, RecipeError, nearest
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.offload import check_loadable, input_device
from msp_plugin.passes.gradients import BACKWARD
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.levels import DENSE, Level
from msp_plugin.plan.units import UnitTable
from msp_plugin.progress import Repeated, StepProgress, no_progress
from msp_plugin.pruning.base import Pruner
from msp_plugin.records.parts import SearchRecord
from msp_plugin.runtime.files import cache_directory
from msp_plugin.runtime.journal import Journal
from msp_plugin.runtime.ranks import ALONE, Ranks
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.candidate_weights import CandidateWeights, weight_for_errors
from msp_plugin.search.keys import problem_identity, search_identity, sensitivity_identity
from msp_plugin.search.level_database import complete_database, open_database
from msp_plugin.search.recorded import Journals, Recorded, RecordedEstimate, RecordedLoss
from msp_plugin.search.search_record import log_result, search_record
from msp_plugin.search.unit_errors import ERRORS, replace_one_errors, sum_over_units
from msp_plugin.sensitivity.base import Estimator, unit_sensitivities
from msp_plugin.sensitivity.fisher import FisherTrace
from msp_plugin.sensitivity.fisher_error import diagonal_groups, fisher_errors
from msp_plugin.sensitivity.kfac_error import kfac_errors

log = logging.getLogger(__name__)


class _Measured(NamedTuple):
    """The functions that measure candidates for an allocator; None if it does not need one."""

    loss: RecordedLoss | None = None
    holdout: RecordedLoss | None = None
    estimate: RecordedEstimate | None = None


@dataclass
class Measurements:
    """A model with its text and method, and the numbers measured so far.

    One object serves any number of allocators and seeds, and without ``prefix`` any number of budgets: sensitivities,
    the level database and errors are measured at first use.

    Args:
        pruner: None if nothing needs the level database.
        estimators: the estimators that allocators may use, by name. The Fisher-weighted and K-FAC errors use as many
            samples as ``fisher``.
        fresh: ignore the cached measurements of this model, method and text and make them again.
        ranks: share the measurements; each has the model, the text and the cache.
        prefix: the level's name of each unit in the pruned blocks whose outputs feed the level database's statistics
            (see build_database); None: dense blocks.
        renewed: the files that ``fresh`` has measured again; shared by objects with one cache.
        saved_seconds: that earlier processes spent on what the last search read from its journal.
    """

    model: torch.nn.Module
    table: UnitTable
    menu: tuple[Level, ...]
    pruner: Pruner | None
    text: TextSplit
    estimators: Mapping[str, Estimator]
    cache: str | None = None
    batch_tokens: int = BATCH_TOKENS
    progress: StepProgress = no_progress
    fresh: bool = False
    ranks: Ranks = ALONE
    prefix: tuple[str, ...] | None = None
    sensitivities: dict[str, tuple[float, ...]] = field(default_factory=dict)
    renewed: set[Path] = field(default_factory=set)
    saved_seconds: float = 0.0

    @property
    def device(self) -> str:
        """The kind of device that the model works on."""
        return input_device(self.model).type

    @property
    def journals(self) -> Journals:
        """The journals of the measurements."""
        return Journals(self.device, self.fresh, self.renewed, self.ranks)

    @cached_property
    def model_id(self) -> str:
        """The fingerprint of the dense model.

        Raises:
            HostError: ranks have different models, texts or kinds of device.
        """
        texts = [part.fingerprint for part in (self.text.calibration, self.text.search, self.text.holdout)]
        by_rank = self.ranks.gather(lambda: [fingerprint(self.model), self.device, *texts])
        if any(values != by_rank[0] for values in by_rank):
            raise HostError(
                "the ranks hold different models, texts or kinds of device",
                hint="give all of them the same files, and as many GPUs as ranks",
            )
        return by_rank[0][0]

    @cached_property
    def database(self) -> LevelDatabase:
        """The level database, built at first use.

        Raises:
            MSPError: see complete_database.
        """
        if self.pruner is None:
            raise RecipeError("the level database needs a pruning method", hint="name one")
        prefix = None
        if self.prefix is not None and self.pruner.needs_statistics:  # else inputs do not matter
            levels = zip(self.table, self.prefix, strict=True)
            prefix = {layer.name: level for unit, level in levels for layer in unit.layers}
        data = self.text.calibration
        database = open_database(
            self.model_id,
            data,
            self.pruner,
            self.menu,
            self.cache,
            device=self.device,
            prefix=prefix,
            batch_tokens=self.batch_tokens,
            table=self.table if self.pruner.prunes_units else None,
        )
        complete_database(
            database,
            self.model,
            self.table,
            self.pruner,
            data,
            fresh=self.fresh,
            renewed=self.renewed,
            progress=self.progress,
            ranks=self.ranks,
            prefix=prefix,
            batch_tokens=self.batch_tokens,
        )
        return database

    def sensitivity(self, name: str) -> tuple[float, ...]:
        """Return the sensitivity of each unit of the dense model.

        Raises:
            RecipeError: there is no such estimator, or no text for it.
            NumericsError: see unit_sensitivities.
        """
        if name not in self.sensitivities:
            if name not in self.estimators:
                raise RecipeError(f"there is no estimator {name!r} here", hint=nearest(name, self.estimators))
            about = sensitivity_identity(
                self.model_id, self.estimators[name], self.text.calibration, self.table
            )
            with self.journals.open(cache_directory(self.cache) / "sensitivity", name, about) as journal:
                began = time.monotonic()
                report = partial(self.progress, f"sensitivity, {name}")
                self.sensitivities[name] = self._estimate(name, report, journal)
                log.info("sensitivity %s: %d units, %.1f s", name, len(self.table), time.monotonic() - began)
        return self.sensitivities[name]

    def _estimate(
        self, name: str, progress: Callable[[int, int], None], journal: Journal | None = None
    ) -> tuple[float, ...]:
        """Return the sensitivity of each unit of the model with its present weights."""
        estimator, data = self.estimators[name], self.text.calibration
        if not data and estimator.needs_data:
            raise RecipeError(f"sensitivity {name!r} needs calibration text", hint="pass a dataset")
        return unit_sensitivities(estimator, self.model, data, self.table, progress, journal, self.ranks)

    def error(self, name: str) -> np.ndarray:
        """Return float64[U, K] of the error ``weight``, ``output``, ``fisher`` or ``kfac`` (see AllocationInputs).

        Raises:
            RecipeError: there is no error of that name.
        """
        if name in ("weight", "output"):
            return self.database.errors(self.table)[("weight", "output").index(name)]
        if name == "fisher":
            return self._fisher_error
        if name == "kfac":
            return self._kfac_error if self.database.has_row_errors(self.table) else self._fisher_error
        raise RecipeError(f"there is no error {name!r}", hint=nearest(name, ERRORS))

    def replace_one(self, tokens: int) -> tuple[np.ndarray, RecordedLoss]:
        """Return float64[units, levels], the KL divergence with one unit pruned and all others dense, and its loss.

        Measured on about ``tokens`` tokens of the search text; in nats per token.

        Raises:
            RecipeError: there is no search text.
        """
        if not self.text.search:
            raise RecipeError("the replace-one KL needs search text", hint="pass a dataset")
        _, data = self.text.search.cut(tokens)
        menu = (*self.menu, DENSE) if DENSE not in self.menu else self.menu
        problem = AllocationProblem(self.table, menu, Fraction(0))
        about = {"data": data.fingerprint}
        with self._candidates("replace-one", problem, about) as (weights, journal):
            loss = self._loss_on(data, "search", "kl", weights, journal)
            errors = replace_one_errors(problem, loss, partial(self.progress, "replace-one KL"))
        return errors[:, : len(self.menu)], loss

    def _fisher_data(self) -> CalibrationSet:
        most = getattr(self.estimators.get("fisher"), "samples", FisherTrace.samples)
        return CalibrationSet(self.text.calibration.samples[:most], "")

    def sensitivity_tokens(self, allocator: Allocator) -> int:
        """Return the forward tokens of the sensitivities and errors that an allocator reads, cached or not."""
        data, names = self.text.calibration, tuple(layer.name for layer in self.table.layers)
        read_by = [self.estimators[name] for name in allocator.sensitivities]
        total = sum(each.passes(self.model, names) * each.forward_tokens(data) for each in read_by)
        read = set(allocator.errors)
        if "kfac" in read and self.database.has_row_errors(self.table):
            total += BACKWARD * self._fisher_data().tokens
        elif "kfac" in read:
            read.add("fisher")
        if "fisher" in read:
            layers = [layer.name for layer in self.table.layers]
            total += BACKWARD * self._fisher_data().tokens * len(diagonal_groups(self.model, layers))
        return total

    @cached_property
    def _fisher_error(self) -> np.ndarray:
        weight = weight_for_errors(self.model, self.database, self.table)
        return self._gradient_error("Fisher-weighted error", "fisher-error", fisher_errors, weight)

    @cached_property
    def _kfac_error(self) -> np.ndarray:
        return self._gradient_error("K-FAC error", "kfac-error", kfac_errors, self.database.row_errors)

    def _gradient_error(
        self,
        title: str,
        name: str,
        measure: Callable[..., dict[str, dict[str, float]]],
        stored: Callable[[str, str], torch.Tensor],
    ) -> np.ndarray:
        """Return float64[units, levels], an error from gradients, recorded in the database's journal ``name``.

        Args:
            measure: fisher_errors or kfac_errors.
            stored: returns the tensor of the database that ``measure`` reads, for a layer and a level.
        """
        data, database = self._fisher_data(), self.database
        layers = [layer.name for layer in self.table.layers]
        levels = [level.name for level in self.menu if not level.is_dense]
        about = {"data": data.fingerprint, "layers": layers, "database": database.key}
        with self.journals.open(database.path, name, about) as journal:
            began = time.monotonic()
            errors = measure(
                self.model,
                data,
                layers,
                levels,
                stored,
                progress=partial(self.progress, title),
                journal=journal,
                ranks=self.ranks,
            )
            log.info("%s: %.1f s", title, time.monotonic() - began)
        return sum_over_units(errors, title, self.table, self.menu)

    def allocate(
        self, allocator: Allocator, problem: AllocationProblem, seed: int
    ) -> tuple[AllocationResult, SearchRecord]:
        """Return (the allocator's result, the ``search`` part of run.json).

        Raises:
            MSPError: see the components.
        """
        start = time.monotonic()
        if allocator.measures and not self.text.search:
            raise RecipeError(f"allocator {allocator.name!r} needs search text", hint="pass a dataset")
        exchanges = (
            allocator.measures or allocator.remeasures or {"kl", "fisher", "kfac"} & set(allocator.errors)
        )
        if allocator.needs_database and exchanges:
            check_loadable(self.model)
        values = {name: np.array(self.sensitivity(name)) for name in allocator.sensitivities}
        errors = {name: self.error(name) for name in allocator.errors if name != "kl"}
        if allocator.needs_database:
            _ = self.database
        began = time.monotonic()
        recorded: list[Recorded] = []
        if "kl" in allocator.errors:
            errors["kl"], loss = self.replace_one(int(getattr(allocator, "tokens", 0)))
            recorded.append(loss)
        report = Repeated(partial(self.progress, "search"))
        with self._measured(allocator, problem, seed, report.again) as measured:
            recorded += [part for part in measured if part is not None]
            clock = partial(self._clock, recorded)
            result = allocator.allocate(
                AllocationInputs(
                    problem,
                    values,
                    errors,
                    measured.loss,
                    seed,
                    report,
                    measured.holdout,
                    measured.estimate,
                    clock,
                )
            )
        now = time.monotonic()
        log_result(allocator, result, now - began)
        self.saved_seconds = sum(part.saved_seconds for part in recorded)
        record = search_record(
            allocator,
            result,
            sum(part.forward_tokens for part in recorded),
            sensitivity_tokens=self.sensitivity_tokens(allocator),
            seconds=now - began + self.saved_seconds,
            total_seconds=now - start + self.saved_seconds,
        )
        return result, record

    def _clock(self, recorded: Sequence[Recorded]) -> float:
        """Return rank 0's clock in seconds, plus the time that a stopped search spent on values read from its journal."""
        saved = sum(part.saved_seconds for part in recorded)
        return self.ranks.on_rank_zero(lambda: time.monotonic() + saved)

    @contextmanager
    def _measured(
        self, allocator: Allocator, problem: AllocationProblem, seed: int, report: Callable[[], None]
    ) -> Iterator[_Measured]:
        """Yield the losses and the estimate that an allocator needs; the model has its own weights afterwards.

        Args:
            report: called after each batch that a loss measures.
        """
        if not (allocator.measures or allocator.remeasures):
            yield _Measured()
            return
        text = replace(self.text, search=NO_TEXT, holdout=NO_TEXT)
        if allocator.measures:
            text = replace(text, search=self.text.search.cut(allocator.held_out_tokens)[1])
        if allocator.stopping_tokens:
            text = replace(text, holdout=self.text.holdout.cut(allocator.stopping_tokens)[1])
        read = [self.estimators[name] for name in sorted(allocator.sensitivities) if name in self.estimators]
        about = search_identity(allocator, seed, text, read)
        with self._candidates("search", problem, about) as (weights, journal):

            def loss_on(data: CalibrationSet, name: str) -> RecordedLoss | None:
                if not data:
                    return None
                return self._loss_on(data, name, allocator.objective, weights, journal, report)

            def measure(name: str, choice: Choice) -> tuple[tuple[float, ...], int]:
                weights.set(choice)
                tokens = self.estimators[name].forward_tokens(self.text.calibration)
                return self._estimate(name, lambda done, total: None), tokens

            estimate = RecordedEstimate(measure, journal) if allocator.remeasures else None
            yield _Measured(loss_on(text.search, "search"), loss_on(text.holdout, "holdout"), estimate)

    @contextmanager
    def _candidates(
        self, name: str, problem: AllocationProblem, about: Mapping[str, Any]
    ) -> Iterator[tuple[CandidateWeights, Journal]]:
        """Yield (the weights of a problem's candidates, the journal of their measurements)."""
        about = {**problem_identity(self.database.key, problem, self.batch_tokens), **about}
        with (
            self.journals.open(self.database.path, name, about) as journal,
            CandidateWeights(self.model, self.database, problem) as weights,
        ):
            yield weights, journal

    def _loss_on(
        self,
        data: CalibrationSet,
        name: str,
        objective: str,
        weights: CandidateWeights,
        journal: Journal,
        report: Callable[[], None] = lambda: None,
    ) -> RecordedLoss:
        loss = partial(CandidateLoss, ranks=self.ranks, measured=report)
        make = partial(loss, weights, data, objective, self.batch_tokens)
        return RecordedLoss(lambda: make().prepare(), data, journal, name)
