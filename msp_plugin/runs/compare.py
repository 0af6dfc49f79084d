"""Compare allocators: the same model, method, budget, text and level database for all of them."""

from __future__ import annotations

import gc
import logging
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from msp_plugin.allocators.base import Choice
from msp_plugin.checkpoint.load import is_packed, load
from msp_plugin.checkpoint.quantized import check_source_unquantized
from msp_plugin.data.samples import SearchText, Text, TextSplit, load_split
from msp_plugin.database.build import CHECKED_TOKENS, build_database
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import DataError, ModelError, MSPError
from msp_plugin.models.device import on_best_device
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.offload import input_device
from msp_plugin.models.offloaded_runs import check_room
from msp_plugin.models.source import load_tokenizer
from msp_plugin.models.weights import Weights
from msp_plugin.passes.by_block import runs_by_block
from msp_plugin.passes.losses import perplexity
from msp_plugin.plan.allocation import make_allocation
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plugins.manager import Plugins, spec_of
from msp_plugin.progress import StepProgress, no_progress, prefixed
from msp_plugin.runs.grid import Matrix
from msp_plugin.runs.prune import describe_text, prune_recipe
from msp_plugin.runtime.digests import digest, versions
from msp_plugin.runtime.disk import is_full
from msp_plugin.runtime.files import finite, write_text
from msp_plugin.runtime.journal import Journal
from msp_plugin.runtime.memory import freed_memory_kept
from msp_plugin.runtime.ranks import ALONE, LostError, Ranks
from msp_plugin.search.allocate import check_model, make_problem, uniform_levels
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.candidate_weights import CandidateWeights
from msp_plugin.search.measurements import Measurements
from msp_plugin.search.resolve import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SCHEMA = "msp_plugin/compare"
VERSION = 1


def compare(
    source: str | Path,
    text: Text,
    matrix: Matrix,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    offload: bool = False,
    fresh: bool = False,
    finals: Path | None = None,
    progress: StepProgress = no_progress,
    ranks: Ranks = ALONE,
) -> dict[str, Any] | None:
    """Return the record of a comparison, the contents of compare.json.

    All allocators get the same calibration, search, stopping and test samples. A cell that fails is a
    row with its error; the others go on. A comparison that was stopped goes on with what lies in the cache.

    Several ranks find the allocations together; then rank 0 goes on alone, finds them in the cache, prunes to
    each of them and measures the result. The others return None.

    Args:
        offload: leave the weights on disk, also those of the pruned models (see load_model).
        fresh: measure anew what lies in the cache.
        finals: journal of what the pruned models gave; None keeps none.

    Raises:
        MSPError: whatever the options, the text or the model show before the first allocation.
    """
    plugins = Plugins()
    plans = matrix.check(plugins)
    if matrix.prune:
        from msp_plugin.hosts.llm_compressor import require_host

        require_host()
        if is_packed(source):  # the host reads the source's config.json again
            raise ModelError(
                f"{source} is packed; llm-compressor takes dense models",
                hint="msp export it --to dense first, or compare without pruning",
            )
    check_source_unquantized(source, trust_remote_code=trust_remote_code)
    text = text.for_model(source, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    asked = [plan.search_text for plan in plans]
    samples = load_split(
        tokenizer, text,
        SearchText(max(a.search for a in asked), max(a.holdout for a in asked), all(a.fit for a in asked)),
    )  # fmt: skip
    if not samples.test:
        raise DataError("a comparison needs test text", hint="give test samples")
    reload = partial(
        load, source, dtype, trust_remote_code=trust_remote_code, offload=offload, cache=plans[0].cache
    )  # fmt: skip
    model = reload()
    if matrix.prune:
        check_room(model, plans[0].cache)
    for plan in plans:
        check_model(model, plan)
    bench = _Bench(
        reload, trust_remote_code, model, tokenizer, text, samples, matrix, plugins, fresh, progress, ranks
    )  # fmt: skip
    with freed_memory_kept(), on_best_device(model):
        if ranks.size > 1:
            bench.allocate_together()
            if ranks.rank:
                return None
        dense = perplexity(model, samples.test, progress=partial(progress, "perplexity, dense"))
        identity = {
            "model": fingerprint(model), "calibration": samples.pruning.fingerprint, "batch": text.batch,
            "test": samples.test.fingerprint, "holdout": samples.holdout.fingerprint, "prune": matrix.prune,
            "device": input_device(model).type,
            "versions": versions(),
        }  # fmt: skip
        with closing(Journal(finals, identity)) as journal:
            rows = [bench.row(*cell, journal) for cell in bench.cells()]
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "model": {
            "source": str(source), "architecture": type(model).__name__, "dtype": dtype,
            "fingerprint": fingerprint(model),
        },
        "levels": [level.name for level in plans[0].menu],
        "granularity": plans[0].granularity,
        **plans[0].bounds.to_dict(),
        "texts": {
            name: {key: value for key, value in describe_text(part).items() if key != "sources"}
            for name, part in (
                ("calibration", samples.calibration), ("search", samples.search), ("holdout", samples.holdout),
                ("test", samples.test),
            )
        },
        "sources": [
            reading.to_dict() for part in (samples.pruning, samples.test) for reading in part.readings
        ],
        "units": [
            {
                "name": unit.name, "block": unit.block, "weights": unit.weights,
                "layers": [{"name": a.name, "shape": [a.out_features, a.in_features]} for a in unit.layers],
            }
            for unit in bench.table
        ],
        "dense": {"perplexity": finite(dense)},
        "sensitivities": {name: list(values) for name, values in bench.sensitivities.items()},
        "rows": rows,
        "versions": versions(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}"
        + (f", {ranks.size} ranks" if ranks.size > 1 else ""),
    }  # fmt: skip


@dataclass
class _Bench:
    """A loaded model with its text, and the results that several rows share."""

    reload: Callable[[], PreTrainedModel]
    trust_remote_code: bool
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: Text
    samples: TextSplit
    matrix: Matrix
    plugins: Plugins
    fresh: bool
    progress: StepProgress
    ranks: Ranks
    table: Any = None
    sensitivities: dict[str, tuple[float, ...]] = field(default_factory=dict)
    renewed: set[Path] = field(default_factory=set)

    def cells(self) -> Iterator[tuple[Measurements, Plan, str, int]]:
        """Yield measurements, plan, label and seed of each row; a method's database at a sparsity is built once."""
        first_label = next(iter(self.matrix.allocators))
        for method in self.matrix.methods:
            plans = [self._plan(method, self.matrix.sparsities[0], label) for label in self.matrix.allocators]
            first = plans[0]
            estimators = {name: built for plan in plans for name, built in plan.estimators.items()}
            self.table = self.table or check_model(self.model, first)
            for sparsity in self.matrix.sparsities:
                of = make_problem(self.model, self.table, self._plan(method, sparsity, first_label))
                held = Measurements(
                    self.model, self.table, first.menu, first.pruner, self.samples, estimators, first.cache,
                    fresh=self.fresh, ranks=self.ranks, sensitivities=self.sensitivities, renewed=self.renewed, prefix=uniform_levels(of),
                )  # fmt: skip
                for label in self.matrix.allocators:
                    plan = self._plan(method, sparsity, label)
                    what = f"{plan.pruner.name} {float(plan.sparsity):g} {label}"
                    held.progress = prefixed(f"{what}: ", self.progress)
                    seeds = self.matrix.seeds if plan.allocator.seeded else self.matrix.seeds[:1]
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
                self.ranks.together(partial(self._find, held, plan, seed))
            except (LostError, OSError):
                raise
            except Exception as error:  # rank 0 meets it again, for its row
                if is_full(error):
                    raise
                log.info("%s at %s: %s", plan.allocator.name, plan.sparsity, error)
        self.ranks.leave()
        self.ranks, self.fresh = ALONE, False

    def _find(self, held: Measurements, plan: Plan, seed: int) -> None:
        _ = held.database  # each row is measured with its weights, whatever the allocator needs
        held.allocate(plan.allocator, make_problem(self.model, self.table, plan), seed)

    def _plan(self, method: Any, sparsity: str, label: str) -> Plan:
        return self.matrix.plan(self.plugins, method, sparsity, self.matrix.allocators[label])

    def row(self, held: Measurements, plan: Plan, label: str, seed: int, finals: Journal) -> dict[str, Any]:
        """Return one row: the allocation, what it cost, and how the pruned model does on the test text."""
        problem = make_problem(self.model, self.table, plan)
        row: dict[str, Any] = {
            "method": plan.pruner.name, "sparsity": str(plan.sparsity), "allocator": label,
            "options": spec_of(plan.allocator), "seed": seed, "seeded": plan.allocator.seeded, "error": None,
        }  # fmt: skip
        began = time.monotonic()
        try:
            result, record = held.allocate(plan.allocator, problem, seed)
            make_allocation(problem, result.choice)  # raises if it is off the budget
            del record["allocator"]
            row |= record
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
        return row

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
        if not self.matrix.prune:
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
        """Let the model hold the weights that a run with this allocation gives, block after block, of all samples.

        Our own pass makes them, or llm-compressor where the model does not run block by block.
        """
        data = self.samples.pruning
        if not runs_by_block(self.model, data.samples[0][:CHECKED_TOKENS]):
            with CandidateWeights(self.model, held.database, problem) as weights:
                weights.put(self._pruned_by_host(plan, problem, choice))
                yield
            return
        levels = {
            a.name: problem.menu[k].name
            for unit, k in zip(self.table, choice, strict=True)
            for a in unit.layers
        }
        final = LevelDatabase(folder, {"levels": levels}, problem.menu)
        build_database(
            final, self.model, self.table, plan.pruner, data, prefix=levels, only_prefix=True,
            progress=partial(held.progress, "pruning"),
        )  # fmt: skip
        with CandidateWeights(self.model, final, problem) as weights:
            weights.set(choice)
            yield

    def _pruned_by_host(self, plan: Plan, problem: AllocationProblem, choice: Choice) -> Weights:
        """Return the weights by layer that llm-compressor gives."""
        from msp_plugin.hosts.llm_compressor.run import forget, run_oneshot

        gc.collect()  # the last one's modules refer to each other
        model = self.reload()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "allocation.json"
            write_text(path, make_allocation(problem, choice).to_json())
            recipe = prune_recipe({"allocation": str(path), "method": spec_of(plan.pruner)})
            run_oneshot(
                model, recipe, data=self.samples.pruning, batch=self.text.batch, tokenizer=self.tokenizer,
                trust_remote_code=self.trust_remote_code, announce=False,
            )  # fmt: skip
        forget()
        return Weights(model)


def _named(quality: tuple[float, float]) -> dict[str, float | None]:
    kl, perplexity = quality
    return {"kl": finite(kl), "perplexity": finite(perplexity)}


def cells(
    rows: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, Fraction], dict[str, list[Mapping[str, Any]]]]:
    """Return the rows that have a result by (method, sparsity) and allocator."""
    found: dict[tuple[str, Fraction], dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if row.get("error") is None:
            cell = found.setdefault((row["method"], Fraction(row["sparsity"])), {})
            cell.setdefault(row["allocator"], []).append(row)
    return found
