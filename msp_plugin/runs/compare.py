"""Compare allocators: the same model, method, budget, text and level database for all of them."""

from __future__ import annotations

import gc
import logging
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from msp_plugin.allocators.base import Choice
from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.data.samples import SearchText, Text, TextSplit, load_split
from msp_plugin.errors import DataError, MSPError
from msp_plugin.hosts.base import PruneInputs
from msp_plugin.hosts.builtin import BuiltIn, pruned_weights
from msp_plugin.models.device import on_best_device
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.offload import check_room, input_device
from msp_plugin.models.weights import Weights
from msp_plugin.passes.losses import perplexity
from msp_plugin.plan.allocation import make_allocation
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.units import Unit
from msp_plugin.plugins.manager import Plugins, spec_of
from msp_plugin.progress import prefixed
from msp_plugin.records.comparison import ComparedRow, CompareRecord, LayerRecord, UnitRecord
from msp_plugin.records.parts import ModelRecord, QualityRecord
from msp_plugin.runs.grid import Grid
from msp_plugin.runs.prune import host_for
from msp_plugin.runtime.context import RunContext
from msp_plugin.runtime.digests import digest, versions
from msp_plugin.runtime.disk import is_full
from msp_plugin.runtime.files import finite
from msp_plugin.runtime.journal import Journal
from msp_plugin.runtime.memory import freed_memory_kept
from msp_plugin.runtime.ranks import LostError
from msp_plugin.search.allocate import check_model, make_problem, uniform_levels
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.candidate_weights import CandidateWeights
from msp_plugin.search.measurements import Measurements
from msp_plugin.search.resolve import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def compare(
    source: ModelSource,
    text: Text,
    grid: Grid,
    *,
    finals: Path | None = None,
    context: RunContext = RunContext(),
) -> CompareRecord | None:
    """Return the record of a comparison.

    All allocators get the same calibration, search, stopping and test samples. A cell that fails is a
    row with its error; the others go on. A comparison that was stopped goes on with what lies in the cache.

    Several ranks find the allocations together; then rank 0 goes on alone, finds them in the cache, prunes to
    each of them and measures the result. The others return None.

    Args:
        finals: journal of the measurements of pruned models; None keeps none.

    Raises:
        MSPError: whatever the options, the text or the model show before the first allocation.
    """
    plugins, ranks = Plugins(), context.ranks
    plans = grid.check(plugins)
    source.check()
    text = text.for_model(source.name, trust_remote_code=source.trust_remote_code)
    tokenizer = source.tokenizer()
    asked = [plan.search_text for plan in plans]
    most = SearchText(
        max(a.search for a in asked), max(a.holdout for a in asked), fit=all(a.fit for a in asked)
    )
    samples = load_split(tokenizer, text, most)
    if not samples.test:
        raise DataError("a comparison needs test text", hint="give test samples")
    model = source.load()
    if grid.prune:
        check_room(model, source.cache)
    inputs = PruneInputs(samples, text.batch, tokenizer, source.trust_remote_code)
    for plan in plans:
        check_model(model, plan)
        if grid.prune:
            host_for(plan, plugins).check(model, plan, inputs)
    bench = _Bench(source, model, inputs, samples, grid, plugins, context)
    with freed_memory_kept(), on_best_device(model):
        if ranks.size > 1:
            bench.allocate_together()
            if ranks.rank:
                return None
        dense = perplexity(model, samples.test, progress=partial(context.progress, "perplexity, dense"))
        identity = {
            "model": fingerprint(model), "calibration": samples.pruning.fingerprint, "batch": text.batch,
            "test": samples.test.fingerprint, "holdout": samples.holdout.fingerprint, "prune": grid.prune,
            "device": input_device(model).type,
            "versions": versions(),
        }  # fmt: skip
        with closing(Journal(finals, identity)) as journal:
            rows = [bench.row(*cell, journal) for cell in bench.cells()]
    bounds = plans[0].bounds
    return CompareRecord(
        model=ModelRecord(
            source=str(source.name),
            architecture=type(model).__name__,
            dtype=source.dtype,
            fingerprint=fingerprint(model),
        ),
        levels=tuple(level.name for level in plans[0].menu),
        granularity=plans[0].granularity,
        bounds={pattern: tuple(map(str, shares)) for pattern, shares in bounds.shares.items()},
        protect=bounds.protect,
        texts={
            "calibration": samples.calibration.record(),
            "search": samples.search.record(),
            "holdout": samples.holdout.record(),
            "test": samples.test.record(),
        },
        sources=tuple(r.record() for part in (samples.pruning, samples.test) for r in part.readings),
        units=tuple(map(_unit_record, bench.table)),
        dense=QualityRecord(perplexity=dense),
        sensitivities=bench.sensitivities,
        rows=tuple(rows),
        versions=versions(),
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}"
        + (f", {ranks.size} ranks" if ranks.size > 1 else ""),
    )


def _unit_record(unit: Unit) -> UnitRecord:
    layers = (LayerRecord(name=a.name, shape=(a.out_features, a.in_features)) for a in unit.layers)
    return UnitRecord(name=unit.name, block=unit.block, weights=unit.weights, layers=tuple(layers))


@dataclass
class _Bench:
    """A loaded model with its text, and the results that several rows share."""

    source: ModelSource
    model: PreTrainedModel
    inputs: PruneInputs
    samples: TextSplit
    grid: Grid
    plugins: Plugins
    context: RunContext
    table: Any = None
    sensitivities: dict[str, tuple[float, ...]] = field(default_factory=dict)
    renewed: set[Path] = field(default_factory=set)

    def cells(self) -> Iterator[tuple[Measurements, Plan, str, int]]:
        """Yield measurements, plan, label and seed of each row; a method's database at a sparsity is built once."""
        first_label = next(iter(self.grid.allocators))
        for method in self.grid.methods:
            plans = [self._plan(method, self.grid.sparsities[0], label) for label in self.grid.allocators]
            first = plans[0]
            estimators = {name: built for plan in plans for name, built in plan.estimators.items()}
            self.table = self.table or check_model(self.model, first)
            for sparsity in self.grid.sparsities:
                of = make_problem(self.model, self.table, self._plan(method, sparsity, first_label))
                held = Measurements(
                    self.model, self.table, first.menu, first.pruner, self.samples, estimators, first.cache,
                    fresh=self.context.fresh, ranks=self.context.ranks, sensitivities=self.sensitivities, renewed=self.renewed, prefix=uniform_levels(of),
                )  # fmt: skip
                for label in self.grid.allocators:
                    plan = self._plan(method, sparsity, label)
                    what = f"{plan.pruner.name} {float(plan.sparsity):g} {label}"
                    held.progress = prefixed(f"{what}: ", self.context.progress)
                    seeds = self.grid.seeds if plan.allocator.seeded else self.grid.seeds[:1]
                    for seed in seeds:
                        yield held, plan, label, seed

    def allocate_together(self) -> None:
        """Find all allocations with all ranks, so that they are in the cache; the ranks have parted afterwards.

        Raises:
            LostError: a rank has ended.
            HostError: the ranks hold different models or texts.
        """
        for held, plan, _, seed in self.cells():
            _ = held.model_id
            try:
                self.context.ranks.collective(partial(self._find, held, plan, seed))
            except (LostError, OSError):
                raise
            except Exception as error:  # rank 0 meets it again, for its row
                if is_full(error):
                    raise
                log.info("%s at %s: %s", plan.allocator.name, plan.sparsity, error)
        self.context.ranks.leave()
        self.context = RunContext(progress=self.context.progress)

    def _find(self, held: Measurements, plan: Plan, seed: int) -> None:
        _ = held.database  # each row is measured with its weights, whatever the allocator needs
        held.allocate(plan.allocator, make_problem(self.model, self.table, plan), seed)

    def _plan(self, method: Any, sparsity: str, label: str) -> Plan:
        return self.grid.plan(self.plugins, method, sparsity, self.grid.allocators[label])

    def row(self, held: Measurements, plan: Plan, label: str, seed: int, finals: Journal) -> ComparedRow:
        """Return one row: the allocation, what it cost, and how the pruned model does on the test text."""
        problem = make_problem(self.model, self.table, plan)
        row: dict[str, Any] = {
            "method": plan.pruner.name, "sparsity": str(plan.sparsity), "allocator": label,
            "options": spec_of(plan.allocator), "seed": seed, "seeded": plan.allocator.seeded, "error": None,
        }  # fmt: skip
        began = time.monotonic()
        try:
            result, search = held.allocate(plan.allocator, problem, seed)
            make_allocation(problem, result.choice)  # raises if it is off the budget
            row |= dict(search) | {"allocator": label}
            row["levels"] = [problem.menu[k].name for k in result.choice]
            row["kept"], row["weights"] = problem.total_kept(result.choice), self.table.weights
            units = [[layer.name for layer in unit.layers] for unit in self.table]
            key = f"{held.database.key} {digest(units)[:16]} {','.join(row['levels'])}"
            row |= finals.get(key, partial(self._final, held, plan, problem, result.choice))
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
        log.info("%s %s %s: %.1f s", plan.pruner.name, plan.sparsity, label, time.monotonic() - began)
        return ComparedRow.model_validate(row)

    def _final(
        self, held: Measurements, plan: Plan, problem: AllocationProblem, choice: Choice
    ) -> dict[str, Any]:
        """Return the test perplexity and KL of an allocation, pruned anew and with the database's weights."""
        with CandidateWeights(self.model, held.database, problem) as weights:
            test = CandidateLoss(weights, self.samples.test, reuse=False).prepare()
            stop = None
            if self.samples.holdout:
                stop = CandidateLoss(weights, self.samples.holdout, reuse=False).prepare()(choice)
            weights.set(choice)
            found = {"holdout_loss": finite(stop), "database": _named(test.quality())}
        if not self.grid.prune:
            return {**found, **found["database"]}
        with (
            tempfile.TemporaryDirectory(dir=held.database.path.parent) as folder,
            self._pruned(held, plan, problem, choice, Path(folder)),
        ):
            return {**found, **_named(test.quality())}

    @contextmanager
    def _pruned(
        self, held: Measurements, plan: Plan, problem: AllocationProblem, choice: Choice, folder: Path
    ) -> Iterator[None]:
        """Let the model hold the weights that a run with this allocation gives, block after block, of all samples."""
        allocation = make_allocation(problem, choice)
        if plan.pruner.host == BuiltIn.name:
            database = pruned_weights(
                self.model, allocation, plan.pruner, self.inputs, folder, partial(held.progress, "pruning")
            )
            with CandidateWeights(self.model, database, problem) as weights:
                weights.set(choice)
                yield
            return
        gc.collect()  # the modules of the last model refer to each other
        model, host = self.source.load(), host_for(plan, self.plugins)
        given = replace(plan, given=allocation)
        host.prune(model, given, self.inputs, RunContext(), announce=False)
        host.forget()
        with CandidateWeights(self.model, held.database, problem) as weights:
            weights.put(Weights(model))
            yield


def _named(quality: tuple[float, float]) -> dict[str, float | None]:
    kl, perplexity = quality
    return {"kl": finite(kl), "perplexity": finite(perplexity)}


def cells(rows: Sequence[ComparedRow]) -> dict[tuple[str, Fraction], dict[str, list[ComparedRow]]]:
    """Return the rows that have a result by (method, sparsity) and allocator."""
    found: dict[tuple[str, Fraction], dict[str, list[ComparedRow]]] = {}
    for row in rows:
        if row.error is None:
            found.setdefault((row.method, row.sparsity), {}).setdefault(row.allocator, []).append(row)
    return found
