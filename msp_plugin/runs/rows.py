"""The rows of a comparison: each has an allocation, and the quality of the model pruned to it."""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msp_plugin.allocators.base import Choice
from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.data.samples import TextSplit
from msp_plugin.errors import MSPError
from msp_plugin.hosts.base import PruneInputs
from msp_plugin.hosts.builtin import BuiltIn, pruned_weights
from msp_plugin.models.offload import linear
from msp_plugin.models.weights import Weights
from msp_plugin.plan.allocation import make_allocation
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.units import UnitTable
from msp_plugin.plugins.manager import Plugins, spec_of
from msp_plugin.progress import prefixed
from msp_plugin.records.comparison import ComparedRow
from msp_plugin.recovery.base import Recovery
from msp_plugin.recovery.masks import Masks
from msp_plugin.recovery.step import RecoveryStep, RecoveryText
from msp_plugin.runs.grid import Grid
from msp_plugin.runs.prune import host_for
from msp_plugin.runtime.context import RunContext
from msp_plugin.runtime.digests import component_digest, digest
from msp_plugin.runtime.disk import is_full
from msp_plugin.runtime.files import finite
from msp_plugin.runtime.journal import Journal
from msp_plugin.runtime.ranks import LostError
from msp_plugin.search.allocate import make_problem, uniform_levels
from msp_plugin.search.candidate_loss import CandidateLoss, DenseReference
from msp_plugin.search.candidate_weights import CandidateWeights
from msp_plugin.search.measurements import Measurements
from msp_plugin.search.resolve import ResolvedOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """An allocator and a seed, with the measurements shared by all cells of one method and sparsity."""

    measurements: Measurements
    plan: ResolvedOptions
    label: str
    seed: int


@dataclass
class ComparisonRows:
    """Computes the rows of a comparison on a loaded model.

    Args:
        inputs: for the hosts that prune the model to an allocation.
        recovery: of each pruned model.
        references: the dense model's outputs on the hold-out and on the test text, once a row has measured them.
    """

    source: ModelSource
    model: PreTrainedModel
    table: UnitTable
    inputs: PruneInputs
    samples: TextSplit
    grid: Grid
    plugins: Plugins
    context: RunContext
    recovery: Recovery | None = None
    sensitivities: dict[str, tuple[float, ...]] = field(default_factory=dict)
    renewed: set[Path] = field(default_factory=set)
    references: dict[str, DenseReference] = field(default_factory=dict)

    def cells(self) -> Iterator[Cell]:
        """Yield the cell of each row; cells of one method and sparsity share a level database."""
        first_label = next(iter(self.grid.allocators))
        for method in self.grid.methods:
            plans = [self._plan(method, self.grid.sparsities[0], label) for label in self.grid.allocators]
            for sparsity in self.grid.sparsities:
                problem = make_problem(self.model, self.table, self._plan(method, sparsity, first_label))
                measurements = self._measurements(plans, problem)
                for label in self.grid.allocators:
                    plan = self._plan(method, sparsity, label)
                    step = f"{plan.pruner.name} {float(plan.sparsity):g} {label}: "
                    measurements.progress = prefixed(step, self.context.progress)
                    seeds = self.grid.seeds if plan.allocator.seeded else self.grid.seeds[:1]
                    for seed in seeds:
                        yield Cell(measurements, plan, label, seed)

    def _measurements(self, plans: list[ResolvedOptions], problem: AllocationProblem) -> Measurements:
        """Return the measurements for these plans, which differ only in their allocators."""
        first = plans[0]
        return Measurements(
            self.model,
            self.table,
            first.menu,
            first.pruner,
            self.samples,
            {name: built for plan in plans for name, built in plan.estimators.items()},
            first.cache,
            fresh=self.context.fresh,
            ranks=self.context.ranks,
            sensitivities=self.sensitivities,
            renewed=self.renewed,
            prefix=uniform_levels(problem),
        )

    def _plan(self, method: Any, sparsity: str, label: str) -> ResolvedOptions:
        return self.grid.plan(self.plugins, method, sparsity, self.grid.allocators[label])

    def allocate_together(self) -> None:
        """Find all allocations with all ranks, which puts them into the cache; afterwards rank 0 works alone.

        Raises:
            LostError: a rank has ended.
            HostError: the ranks hold different models or texts.
        """
        for cell in self.cells():
            _ = cell.measurements.model_id
            try:
                self.context.ranks.collective(partial(self._allocate, cell))
            except (LostError, OSError):
                raise
            except Exception as error:  # raised again on rank 0, for its row
                if is_full(error):
                    raise
                log.info("%s at %s: %s", cell.plan.allocator.name, cell.plan.sparsity, error)
        self.context.ranks.leave()
        self.context = RunContext(progress=self.context.progress)

    def _allocate(self, cell: Cell) -> None:
        _ = cell.measurements.database  # every row needs it to measure the result
        problem = make_problem(self.model, self.table, cell.plan)
        cell.measurements.allocate(cell.plan.allocator, problem, cell.seed)

    def row(self, cell: Cell, finals: Journal) -> ComparedRow:
        """Return one row: the allocation, its cost, and the quality of the pruned model on the test text.

        Args:
            finals: journal of the quality of pruned models; those in it are not measured again.

        Raises:
            OSError: the disk fails; any other error becomes the error of the row.
        """
        plan, label = cell.plan, cell.label
        row: dict[str, Any] = {
            "method": plan.pruner.name,
            "sparsity": str(plan.sparsity),
            "allocator": label,
            "options": spec_of(plan.allocator),
            "seed": cell.seed,
            "seeded": plan.allocator.seeded,
            "error": None,
        }
        start = time.monotonic()
        try:
            self._fill(row, cell, finals)
        except OSError:
            raise
        except MSPError as error:
            if is_full(error):
                raise
            log.warning("%s at %s: %s", label, plan.sparsity, error)
            row["error"] = str(error)
        except Exception as error:  # a plugin's bug must not cost the rows of all others
            log.exception("%s at %s", label, plan.sparsity)
            row["error"] = f"{type(error).__name__}: {error}"
        log.info("%s %s %s: %.1f s", plan.pruner.name, plan.sparsity, label, time.monotonic() - start)
        return ComparedRow.model_validate(row)

    def _fill(self, row: dict[str, Any], cell: Cell, finals: Journal) -> None:
        """Add the allocation, its cost and the quality to a row; an error leaves in it what was added before."""
        problem = make_problem(self.model, self.table, cell.plan)
        result, search = cell.measurements.allocate(cell.plan.allocator, problem, cell.seed)
        make_allocation(problem, result.choice)  # raises if it is off the budget
        row |= dict(search) | {"allocator": cell.label}
        row["levels"] = [problem.menu[k].name for k in result.choice]
        row["kept"], row["weights"] = problem.total_kept(result.choice), self.table.weights
        units = [[layer.name for layer in unit.layers] for unit in self.table]
        key = f"{cell.measurements.database.key} {digest(units)[:16]} {','.join(row['levels'])}"
        if self.recovery is not None:
            key += f" {digest([spec_of(self.recovery), component_digest(self.recovery), cell.seed])[:16]}"
        quality = dict(finals.get(key, partial(self._quality, cell, problem, result.choice)))
        if failure := quality.pop("failure", None):
            row["notes"] = (*row["notes"], f"the recovery failed: {failure}")
        row |= quality

    def _quality(self, cell: Cell, problem: AllocationProblem, choice: Choice) -> dict[str, Any]:
        """Return test perplexity and KL of an allocation after the final pruning, and with the database's weights."""
        database = cell.measurements.database
        with CandidateWeights(self.model, database, problem) as weights:
            test = self._loss(weights, "test")
            holdout_loss = self._loss(weights, "holdout")(choice) if self.samples.holdout else None
            weights.set(choice)
            of_database = _named(test.quality())
        quality = {"holdout_loss": finite(holdout_loss), "database": of_database}
        if not self.grid.prune:
            return {**quality, **of_database}
        with (
            tempfile.TemporaryDirectory(dir=database.path.parent) as folder,
            self._pruned(cell, problem, choice, Path(folder)),
        ):
            quality |= _named(test.quality())
            if self.recovery is None:
                return quality
            sparse = self._copy()
        try:
            return {**quality, "recovered": self._recovered(self.recovery, sparse, cell, problem, choice)}
        except MSPError as error:  # the figures before it stay
            if is_full(error):
                raise
            log.warning("%s at %s: the recovery failed: %s", cell.label, cell.plan.sparsity, error)
            return {**quality, "failure": str(error)}

    def _loss(self, weights: CandidateWeights, text: str) -> CandidateLoss:
        """Return the loss on one of the texts; the dense model runs on it for the first row alone."""
        loss = CandidateLoss(weights, getattr(self.samples, text), reuse=False).prepare(
            self.references.get(text)
        )
        self.references[text] = loss.reference
        return loss

    def _copy(self) -> PreTrainedModel:
        """Return a new model with the weights that this model's layers hold now."""
        gc.collect()  # the modules of the last one refer to each other
        model, weights = self.source.load(), Weights(self.model)
        for layer in self.table.layers:
            linear(model, layer.name).weight.data.copy_(weights[layer.name])
        return model

    def _recovered(
        self,
        recovery: Recovery,
        sparse: PreTrainedModel,
        cell: Cell,
        problem: AllocationProblem,
        choice: Choice,
    ) -> dict[str, Any]:
        """Return the stage of the recovery of a pruned model, as JSON; this model is its original."""
        masks = Masks.of(sparse, [layer.name for layer in self.table.layers])
        recovery.check(sparse, masks)
        context = RunContext(progress=cell.measurements.progress, fresh=self.context.fresh)
        step = RecoveryStep(recovery, self._recovery_text, cell.seed, cell.plan.cache, context)
        key = digest(step.identity(sparse, cell.measurements.model_id))
        with ExitStack() as until:
            stage = step.run(sparse, self.model, masks, make_allocation(problem, choice), key, until)
        return stage.to_dict()

    @cached_property
    def _recovery_text(self) -> RecoveryText:
        return RecoveryText.of(self.samples.pruning, self.samples.test)

    @contextmanager
    def _pruned(self, cell: Cell, problem: AllocationProblem, choice: Choice, folder: Path) -> Iterator[None]:
        """Give the model in the block the weights that a run with this allocation would write."""
        plan, measurements = cell.plan, cell.measurements
        allocation = make_allocation(problem, choice)
        if plan.pruner.host == BuiltIn.name:
            progress = partial(measurements.progress, "pruning")
            database = pruned_weights(self.model, allocation, plan.pruner, self.inputs, folder, progress)
            with CandidateWeights(self.model, database, problem) as weights:
                weights.set(choice)
                yield
            return
        gc.collect()  # the last model is garbage with reference cycles
        model, host = self.source.load(), host_for(plan, self.plugins)
        given = replace(plan, given=allocation)
        host.prune(model, given, self.inputs, RunContext(), announce=False)
        host.forget()
        with CandidateWeights(self.model, measurements.database, problem) as weights:
            weights.put(Weights(model))
            yield


def _named(quality: tuple[float, float]) -> dict[str, float | None]:
    kl, perplexity = quality
    return {"kl": finite(kl), "perplexity": finite(perplexity)}
