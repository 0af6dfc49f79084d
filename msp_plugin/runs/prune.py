"""Whole runs: from a recipe, a model and text to a directory with checkpoint, allocation and record."""

from __future__ import annotations

import copy
import gc
import json
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from msp_plugin.checkpoint.load import is_packed, load
from msp_plugin.checkpoint.quantized import check_source_unquantized
from msp_plugin.checkpoint.run_files import RUN_FILE, write_files
from msp_plugin.checkpoint.saving import SHARD_BYTES, check_savable, generation_config_kept, kept_if_it_fails
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import SearchText, Text, TextSplit, load_split
from msp_plugin.errors import ModelError, NumericsError, RecipeError
from msp_plugin.models.device import on_best_device
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.offload import named_parameters
from msp_plugin.models.offloaded_runs import check_room, quantized_forward
from msp_plugin.models.source import load_tokenizer
from msp_plugin.passes.losses import perplexity
from msp_plugin.plugins.manager import Plugins
from msp_plugin.progress import StepProgress, no_progress, prefixed
from msp_plugin.records.run import Outcome
from msp_plugin.runtime.digests import versions
from msp_plugin.runtime.disk import check_free, writing
from msp_plugin.runtime.files import finite, output_directory, write_json
from msp_plugin.runtime.journal import Journal
from msp_plugin.runtime.locks import sole_run
from msp_plugin.runtime.memory import freed_memory_kept
from msp_plugin.runtime.ranks import ALONE, Ranks
from msp_plugin.search.allocate import allocate, check_model
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import Plan, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A finished run: its directory and the contents of run.json."""

    path: Path
    record: dict[str, Any]


@dataclass(frozen=True)
class _Source:
    """Where a run's model comes from; every step of a run starts from a fresh copy."""

    name: str | Path
    dtype: str
    trust_remote_code: bool
    offload: bool
    cache: str | None

    def load(self) -> PreTrainedModel:
        return load(
            self.name, self.dtype, trust_remote_code=self.trust_remote_code, offload=self.offload, cache=self.cache
        )  # fmt: skip


def run_recipe(
    recipe: str | Path | Mapping[str, Any],
    model: str | Path,
    text: Text,
    out: str | Path,
    *,
    dtype: str = "auto",
    baseline: bool = True,
    trust_remote_code: bool = False,
    offload: bool = False,
    fresh: bool = False,
    progress: StepProgress = no_progress,
    ranks: Ranks = ALONE,
) -> Run | None:
    """Run a recipe of llm-compressor and leave checkpoint, recipe.yaml, allocation.json and run.json.

    With a MixedSparsityModifier in the recipe and ``baseline``, the same recipe is run first with the
    uniform allocation, in memory only, so that run.json can compare the two. The files appear at the
    end, all of them; a run that fails or is interrupted leaves none. The same call goes on where such a run
    stopped, with what lies in the cache: sensitivities, level database, the search's measurements and the
    perplexities of the dense and uniform models. ``fresh`` measures all of it anew. ``offload`` leaves the
    weights on disk, for models larger than memory (see load_model).

    Several ranks share the search, of a recipe whose only modifier is ours; then rank 0 goes on alone, finds
    the search's measurements in the cache and prunes as llm-compressor does. The others return None.

    Raises:
        MSPError: see the steps; whatever the options alone show fails before the model is loaded.
    """
    from msp_plugin.hosts.llm_compressor import require_host
    from msp_plugin.hosts.llm_compressor.recipe import build_recipe, our_line, read_recipe
    from msp_plugin.hosts.llm_compressor.run import run_oneshot

    require_host()
    if is_packed(model):  # the host reads the source's config.json again and would copy it to the result
        raise ModelError(
            f"{model} is packed; llm-compressor takes dense models", hint="msp export it --to dense first"
        )
    check_source_unquantized(model, trust_remote_code=trust_remote_code)
    steps = copy.deepcopy(dict(recipe)) if isinstance(recipe, Mapping) else read_recipe(recipe)
    plugins, line = Plugins(), our_line(steps)
    plan = None if line is None else resolve(Options.parse(_ours(line)), plugins)
    modifiers = build_recipe(steps).modifiers
    if ranks.size > 1:
        _search_together(
            modifiers, plan, model, text, out, dtype, trust_remote_code, offload, fresh, progress, ranks
        )
        if ranks.rank:
            return None
        fresh = False  # what the ranks have measured just now is used
    with sole_run(out, plan and plan.cache, fresh=fresh) as (path, journal):
        text = text.for_model(model, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        samples = load_split(tokenizer, text, plan.search_text if plan else SearchText())
        source = _Source(model, dtype, trust_remote_code, offload, plan and plan.cache)
        prune = partial(
            run_oneshot, data=samples.pruning, batch=text.batch, tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        alone = plan is not None and len(modifiers) == 1  # others may quantize: the model is smaller then
        check = partial(_check_output, tokenizer=tokenizer, out=path if alone else None)
        quality = _reference(source, check, steps, plan, samples, text, prune, baseline, journal, progress)
        gc.collect()
        start = time.monotonic()
        loaded = source.load()
        record, outcome = prune(loaded, steps, progress=progress, fresh=fresh)
        record["seconds"] = round(time.monotonic() - start, 3)
        name = "mixed" if plan is not None else "result"
        kept = partial(
            kept_if_it_fails, loaded, path, lambda folder: write_files(folder, outcome, record), source.cache
        )
        with kept():
            quality[name] = _measure(name, loaded, samples, progress)
        if plan is not None and plan.is_uniform:
            quality["uniform"] = quality[name]
        record |= _provenance(source, text, samples, quality)
        with writing(path), output_directory(path) as temporary, kept():
            with warnings.catch_warnings(), generation_config_kept(loaded, temporary):
                warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
                loaded.save_pretrained(temporary, save_compressed=True, max_shard_size=SHARD_BYTES)
            tokenizer.save_pretrained(temporary)
            write_json(temporary / RUN_FILE, record)
    plugins.tell("msp_run_finished", record=record)
    return Run(path, record)


def _search_together(
    modifiers: Sequence[Any], plan: Plan | None, model: str | Path, text: Text, out: str | Path, dtype: str,
    trust_remote_code: bool, offload: bool, fresh: bool, progress: StepProgress, ranks: Ranks,
) -> None:  # fmt: skip
    """Search with all ranks, so that everything is in the cache; the ranks have parted afterwards.

    Raises:
        RecipeError: there is no search in the recipe, or something runs before it.
        MSPError: see allocate.
    """
    if plan is None or plan.given is not None or len(modifiers) != 1:
        raise RecipeError(
            f"{ranks.size} ranks share a search, and this recipe is not one of MixedSparsityModifier alone",
            hint="start it without torchrun",
        )
    with ExitStack() as stack:
        ranks.first(lambda: stack.enter_context(sole_run(out, plan.cache, fresh=fresh, keep=True)) and None)
        search(model, text, plan, dtype=dtype, trust_remote_code=trust_remote_code, offload=offload, fresh=fresh,
               progress=progress, ranks=ranks)  # fmt: skip
        ranks.leave()


def _reference(
    source: _Source, check: Callable[[PreTrainedModel], None], steps: dict[str, Any], plan: Plan | None,
    samples: TextSplit, text: Text, prune: Callable[..., Any], baseline: bool, path: Path, progress: StepProgress,
) -> dict[str, float | None]:  # fmt: skip
    """Return the perplexities of the dense model and of uniform pruning, those in the journal without work.

    Raises:
        MSPError: what the model shows before anything is pruned, or the uniform pruning.
    """
    from msp_plugin.hosts.llm_compressor.run import forget

    loaded = source.load()
    check_room(loaded, source.cache)
    check(loaded)
    if plan is not None:
        check_model(loaded, plan)

    def uniform() -> float | None:
        model = source.load()
        prune(model, _uniform(steps, plan), progress=prefixed("uniform, ", progress), announce=False)
        measured = _measure("uniform", model, samples, progress)
        forget()
        return measured

    with closing(Journal(path, _identity(loaded, samples, text, steps, plan))) as journal:
        quality = {"dense": journal.get("dense", partial(_measure, "dense", loaded, samples, progress))}
        del loaded
        gc.collect()
        if plan is not None:
            wanted = baseline and samples.test and not plan.is_uniform
            quality["uniform"] = journal.get("uniform", uniform) if wanted else None
    return quality


def _check_output(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path | None) -> None:
    """Raise if the model, once it is pruned, could not be saved, or not to ``out`` for want of room.

    Raises:
        ModelError, OutputError: see check_savable and check_free.
    """
    check_savable(model, tokenizer)
    if out is not None:
        need = sum(p.numel() * p.element_size() for _, _, p in named_parameters(model))
        check_free(out, need, "the pruned model takes", "give an output directory on another disk")


def _identity(
    model: PreTrainedModel, samples: TextSplit, text: Text, steps: Mapping[str, Any], plan: Plan | None
) -> dict[str, Any]:
    """Return what the measurements of an unfinished run depend on, by words that a user can read."""
    return {
        "model": fingerprint(model), "recipe": json.loads(json.dumps(steps, default=str)),
        "calibration": samples.pruning.fingerprint, "batch": text.batch,
        "test": samples.test.fingerprint if samples.test else None, "versions": versions(),
        "method": plan and plan.pruner.code(),
        "allocation": plan and plan.given and plan.given.to_dict(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }  # fmt: skip


def _measure(name: str, model: PreTrainedModel, samples: TextSplit, progress: StepProgress) -> float | None:
    """Return the test perplexity; None without test text, or, after pruning, if it is not a number."""
    if not samples.test:
        return None
    try:
        with freed_memory_kept(), on_best_device(model), quantized_forward(model):
            return perplexity(model, samples.test, progress=partial(progress, f"perplexity, {name}"))
    except NumericsError:
        if name == "dense":
            raise
        log.warning("the %s model's test loss is not a number", name)
        return None


def _uniform(steps: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the recipe with our line at uniform sparsity, over the same layers and levels."""
    from msp_plugin.hosts.llm_compressor.recipe import our_line

    plain = copy.deepcopy(steps)
    line = our_line(plain)
    if plan.given is not None:
        del line["allocation"]
        menu = plan.given.provenance.get("levels") or [level.name for level in plan.menu]
        line |= {
            "sparsity": str(plan.given.budget.sparsity), "levels": list(menu), "ignore": [],
            "targets": [layer.name for layer in plan.given.table.layers],
        }  # fmt: skip
    line["allocator"] = "uniform"
    line.pop("estimators", None)  # it reads none
    return plain


def _provenance(
    source: _Source, text: Text, samples: TextSplit, quality: dict[str, float | None]
) -> dict[str, Any]:
    """Return the parts of run.json that say what was measured, on what."""
    return {
        "perplexity": {name: finite(value) for name, value in quality.items()},
        "model": {"source": str(source.name), "dtype": source.dtype},
        "calibration": {**describe_text(samples.pruning), "length": text.length, "seed": text.seed},
        "test": {**describe_text(samples.test), "length": text.length} if samples.test else None,
    }


def _ours(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return our options of a recipe line, and what nobody knows, so that it is refused."""
    from msp_plugin.hosts.llm_compressor.modifier import HOST_KEYS

    return {key: value for key, value in line.items() if key not in HOST_KEYS}


def describe_text(data: CalibrationSet) -> dict[str, Any]:
    """Return what run.json says of a set of samples: ``sources`` has a Reading for each source, none for parts."""
    return {
        "source": data.source,
        "samples": len(data),
        "tokens": data.tokens,
        "fingerprint": data.fingerprint,
        "sources": [reading.to_dict() for reading in data.readings],
    }


def prune_recipe(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of one MixedSparsityModifier with the given options."""
    given = {key: value for key, value in options.items() if value is not None}
    return {"sparsity_stage": {"sparsity_modifiers": {"MixedSparsityModifier": given}}}


def search_allocation(
    options: Options,
    model: str | Path,
    text: Text,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    offload: bool = False,
    fresh: bool = False,
    progress: StepProgress = no_progress,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Return the allocation for a model without pruning it; needs the host only if the method does.

    Raises:
        MSPError: see ``allocate``.
    """
    return search(
        model, text, resolve(options, Plugins()), dtype=dtype, trust_remote_code=trust_remote_code,
        offload=offload, fresh=fresh, progress=progress, ranks=ranks,
    )  # fmt: skip


def search(
    model: str | Path, text: Text, plan: Plan, *, dtype: str, trust_remote_code: bool, offload: bool,
    fresh: bool, progress: StepProgress, ranks: Ranks,
) -> Outcome:  # fmt: skip
    """Return the allocation that a plan asks for; see search_allocation."""
    check_source_unquantized(model, trust_remote_code=trust_remote_code)
    text = text.for_model(model, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    samples = load_split(tokenizer, text, plan.search_text)
    loaded = load(model, dtype, trust_remote_code=trust_remote_code, offload=offload, cache=plan.cache)
    with on_best_device(loaded):
        return allocate(
            loaded, samples, plan, fresh=fresh, progress=progress, ranks=ranks
        )  # fmt: skip
