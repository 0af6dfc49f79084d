"""Whole runs: from a recipe, a model and text to a directory with checkpoint, allocation and record."""

from __future__ import annotations

import copy
import gc
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msp_plugin.allocate import Outcome, StepProgress, allocate, check_model, no_progress, versions
from msp_plugin.calibration import CalibrationSet, join, load_texts, tokenize
from msp_plugin.device import on_best_device
from msp_plugin.errors import DataError, MSPError
from msp_plugin.evaluation import perplexity
from msp_plugin.files import check_output, finite, output_directory, write_json
from msp_plugin.models import load_model, load_tokenizer
from msp_plugin.options import Options, Plan, resolve
from msp_plugin.plugins import Plugins

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """Which text a run uses.

    Args:
        data: source of the calibration samples (see calibration.load_texts).
        search: source of the samples that measure candidates; None takes them from the end of ``data``.
        test: source of the perplexity's samples; None sets samples of ``data`` aside for it.
        samples, length: calibration samples and their tokens.
        test_samples: samples of the perplexity; 0 measures none.
        column: of the text in jsonl files and datasets.
        batch: samples per forward pass of the host's calibration.
        seed: of the choice of calibration and search samples; 0 spaces them evenly.
    """

    data: str
    search: str | None = None
    test: str | None = None
    samples: int = 128
    length: int = 2048
    test_samples: int = 32
    column: str = "text"
    batch: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Samples:
    """Tokenized text: what calibrates and searches, and what tests. They share no sample."""

    calibration: CalibrationSet
    test: CalibrationSet | None


def load_samples(tokenizer: PreTrainedTokenizerBase, text: Text, search_tokens: int = 0) -> Samples:
    """Return the tokenized samples of a run.

    The search's samples are the last ones of ``calibration``, where the modifier looks for them.

    Raises:
        DataError: a source is missing, empty or too short.
    """
    held_out = -(-search_tokens // text.length) if text.search else 0
    reserved = 0 if text.test else text.test_samples
    documents = load_texts(text.data, text.column)
    found = tokenize(
        tokenizer, documents, samples=text.samples + reserved, length=text.length, source=text.data,
        seed=text.seed,
    )  # fmt: skip
    cut = len(found) - reserved
    parts = [CalibrationSet(found.samples[:cut], text.data)]
    test = CalibrationSet(found.samples[cut:], f"{text.data} [{cut}:]") if reserved else None
    if text.search:
        parts.append(
            tokenize(
                tokenizer, load_texts(text.search, text.column), samples=held_out, length=text.length,
                source=text.search, seed=text.seed,
            )
        )  # fmt: skip
    if text.test and text.test_samples:
        test = tokenize(
            tokenizer, load_texts(text.test, text.column), samples=text.test_samples,
            length=text.length, source=text.test, at_least=1,
        )  # fmt: skip
    if test is not None:
        known = {tuple(s.tolist()) for part in parts for s in part.samples}
        shared = sum(tuple(s.tolist()) in known for s in test.samples)
        if shared:
            raise DataError(
                f"{shared} of {len(test)} test samples are calibration samples too",
                hint="give another text with --test-data",
            )
    return Samples(join(parts), test)


@dataclass(frozen=True)
class Run:
    """A finished run: its directory and the contents of run.json."""

    path: Path
    record: dict[str, Any]


def run_recipe(
    recipe: str | Path | Mapping[str, Any],
    model: str | Path,
    text: Text,
    out: str | Path,
    *,
    dtype: str = "auto",
    baseline: bool = True,
    trust_remote_code: bool = False,
    progress: StepProgress = no_progress,
) -> Run:
    """Run a recipe of llm-compressor and leave checkpoint, recipe.yaml, allocation.json and run.json.

    With a MixedSparsityModifier in the recipe and ``baseline``, the same recipe is run first with the
    uniform allocation, in memory only, so that run.json can compare the two. The directory appears
    whole at the end; a run that fails or is interrupted leaves none.

    Raises:
        MSPError: see the steps; whatever the options alone show fails before the model is loaded.
    """
    from msp_plugin.hosts.llm_compressor.recipe import build_recipe, our_lines, read_recipe

    path = check_output(out)
    steps = copy.deepcopy(dict(recipe)) if isinstance(recipe, Mapping) else read_recipe(recipe)
    build_recipe(steps)
    plugins = Plugins()
    plans = [resolve(Options(**_ours(line)), plugins) for line in our_lines(steps)]
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    tokens = max((getattr(plan.allocator, "tokens", 0) for plan in plans), default=0)
    samples = load_samples(tokenizer, text, tokens)

    def fresh() -> PreTrainedModel:
        return load_model(model, dtype, trust_remote_code=trust_remote_code)

    def measure(name: str, loaded: PreTrainedModel) -> float | None:
        if samples.test is None:
            return None
        return perplexity(
            loaded, samples.test, progress=lambda done, total: progress(f"perplexity, {name}", done, total)
        )

    loaded = fresh()
    for plan in plans:
        check_model(loaded, plan)
        if plan.given is None and plan.allocator.needs_database:
            samples.calibration.split(plan.allocator.tokens)
    quality: dict[str, float | None] = {"dense": measure("dense", loaded), "uniform": None}
    if plans and baseline and samples.test is not None:
        plain = copy.deepcopy(steps)
        for line in our_lines(plain):
            if line.pop("allocation", None) is not None:
                line["sparsity"] = str(plans[0].sparsity)
            line["allocator"] = "uniform"
        del loaded
        loaded = fresh()
        _oneshot(loaded, plain, samples.calibration, text.batch, progress, "uniform, ")
        quality["uniform"] = measure("uniform", loaded)
    del loaded
    gc.collect()
    start = time.monotonic()
    loaded = fresh()
    record = _oneshot(loaded, steps, samples.calibration, text.batch, progress)
    record["seconds"] = round(time.monotonic() - start, 3)
    quality["mixed" if plans else "result"] = measure("mixed" if plans else "result", loaded)
    record["perplexity"] = {name: finite(value) for name, value in quality.items()}
    record["test"] = None if samples.test is None else _describe(samples.test)
    with output_directory(path) as temporary:
        loaded.save_pretrained(temporary, save_compressed=True)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "run.json", record)
    plugins.hook.msp_run_finished(record=record)
    return Run(path, record)


def _ours(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key in Options.model_fields}


def _describe(data: CalibrationSet) -> dict[str, Any]:
    return {
        "source": data.source,
        "samples": len(data),
        "tokens": data.tokens,
        "fingerprint": data.fingerprint,
    }


def _oneshot(
    model: PreTrainedModel,
    steps: dict[str, Any],
    data: CalibrationSet,
    batch: int,
    progress: StepProgress,
    prefix: str = "",
) -> dict[str, Any]:
    """Run llm-compressor's oneshot on a loaded model and return the record of our line, if there is one."""
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    from msp_plugin.checkpoint.sidecar import run_record
    from msp_plugin.hosts.llm_compressor.modifier import MixedSparsityModifier
    from msp_plugin.hosts.llm_compressor.recipe import build_recipe

    recipe = build_recipe(copy.deepcopy(steps))
    ours = [m for m in recipe.modifiers if isinstance(m, MixedSparsityModifier)]
    for modifier in ours:
        modifier.report_to(lambda step, done, total: progress(prefix + step, done, total))
    loader = DataLoader([{"input_ids": sample} for sample in data.samples], batch_size=batch)
    with _cleaned_up(recipe.modifiers):
        oneshot(model=model, recipe=recipe, dataset=loader)
    if not ours:
        return {"schema": "msp_plugin/run", "version": 1, "versions": versions()}
    modifier = ours[-1]
    return run_record(modifier.outcome, modifier.stats, modifier.seed)


@contextmanager
def _cleaned_up(modifiers: list[Any]) -> Iterator[None]:
    """Leave no hook in the model and no half-run session behind if the block fails."""
    try:
        yield
    except BaseException as error:
        for modifier in modifiers:
            if hasattr(modifier, "abort"):
                modifier.abort()
            modifier.remove_hooks()
            modifier.finalized_ = True  # the session's reset would otherwise finalize it again
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, MSPError):
            cause = cause.__cause__
        if cause is not None and cause is not error:
            raise cause from error
        raise


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
    progress: StepProgress = no_progress,
) -> Outcome:
    """Return the allocation for a model without pruning it; needs the host only if the method does.

    Raises:
        MSPError: see ``allocate``.
    """
    plan: Plan = resolve(options, Plugins())
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    samples = load_samples(tokenizer, text, getattr(plan.allocator, "tokens", 0))
    loaded = load_model(model, dtype, trust_remote_code=trust_remote_code)
    with on_best_device(loaded):
        return allocate(loaded, samples.calibration, plan, progress=progress)
