"""Recovery of a sparse checkpoint: load it, check everything, change its surviving weights, prove the zeros, write it."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.quantized import check_source_unquantized
from msp_plugin.checkpoint.recount import recount_model
from msp_plugin.checkpoint.run_files import copy_processor
from msp_plugin.checkpoint.saving import SHARD_BYTES, check_savable, generation_config_kept, kept_if_it_fails
from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import Text, load_split
from msp_plugin.errors import DataError, ModelError, NumericsError, RecipeError
from msp_plugin.hosts.base import Pruned
from msp_plugin.models.device import on_best_device
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.layers import check_finite_weights, prunable_layers
from msp_plugin.models.offload import input_embeddings, named_parameters, onloaded
from msp_plugin.passes.losses import mean_kl, perplexity
from msp_plugin.plan.allocation import ALLOCATION_FILE, Allocation
from msp_plugin.plugins.manager import Plugins, spec_of
from msp_plugin.records.parts import ModelRecord
from msp_plugin.records.run import (
    DENSE,
    PRUNE,
    RECOVER,
    RECOVERED,
    RUN_FILE,
    UNIFORM,
    RecoveryRecord,
    RunRecord,
    SparsityRecord,
    StageRecord,
)
from msp_plugin.recovery.base import Recovery, RecoveryInputs
from msp_plugin.recovery.masks import Masks
from msp_plugin.runs.steps import RECIPE_FILE, Run
from msp_plugin.runtime.context import RunContext
from msp_plugin.runtime.digests import component_digest, digest, versions
from msp_plugin.runtime.disk import check_free, writing
from msp_plugin.runtime.files import cache_directory, finite, output_directory
from msp_plugin.runtime.journal import Journal
from msp_plugin.runtime.locks import sole_run
from msp_plugin.runtime.memory import freed_memory_kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

#: One sample in so many judges the recovery and is not recovered on.
HOLDOUT_SHARE = 8
#: Entries of a config that two models of one architecture share.
_SAME = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def recover(
    run: str | Path,
    data: str | Text,
    out: str | Path,
    *,
    original: str | Path | None = None,
    method: str | Mapping[str, Any] = "blockwise",
    seed: int = 0,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    offload: bool = False,
    cache: str | None = None,
    context: RunContext = RunContext(),
) -> Run:
    """Change the surviving weights of a sparse checkpoint so that it comes nearer to the dense model, and write it.

    ``out`` gets the checkpoint, in the dtype of ``run``, with its allocation.json and recipe.yaml, and run.json.
    After a stop, the same call goes on where the method can.

    Args:
        run: directory or hub id of a sparse model, of this package or not, dense or packed.
        data: text to recover on: a file, directory or dataset, or a Text with more settings.
        out: a directory that is new or empty.
        original: directory or hub id of the dense model; None where the method needs none.
        method: name of a recovery, or a mapping with ``name`` and options.
        seed: of the method's random choices.
        offload: leave the weights of the original on disk.
        cache: where the state of a stopped recovery lies; None is the default cache.

    Raises:
        MSPError: what can be refused is refused before the method starts; afterwards a VerificationError says that a
            zero was filled in, and nothing is written.
    """
    recovery: Recovery = Plugins().build("recoveries", method)
    if original is None and recovery.needs_original:
        raise RecipeError(
            f"recovery {recovery.name!r} needs the dense model",
            hint="name it with --original (in Python original=)",
        )
    sparse = ModelSource(run, dtype, trust_remote_code, False, cache)
    dense = None if original is None else ModelSource(original, dtype, trust_remote_code, offload, cache)
    with ExitStack() as stack:
        path, journal_file = stack.enter_context(sole_run(out, cache, fresh=context.fresh))
        tokenizer = _check_sources(sparse, dense)
        text = data if isinstance(data, Text) else Text(data)
        text = text.for_model(run, trust_remote_code=trust_remote_code)
        samples = recovery_text(tokenizer, text)
        step = RecoveryStep(recovery, samples, seed, cache, context)
        subject = load_sparse(sparse, tokenizer, path)
        recovery.check(subject.model, subject.masks)
        reference = None if dense is None else load_original(dense, subject.model)
        identity = step.identity(subject.model, reference)
        with closing(Journal(journal_file, identity)) as journal:
            before = step.references(subject.model, reference, journal)
        key = digest({**identity, "out": str(path)})
        stage = step.run(subject.model, reference, subject.masks, subject.allocation, key)
        record = _record(sparse, dense, subject, text, samples, before, stage)
        _write(subject.model, tokenizer, sparse, record, path)
    Plugins().tell("msp_run_finished", record=record.to_dict())
    return Run(path, record)


@dataclass(frozen=True)
class RecoveryText:
    """The samples of a recovery, no two of which share a token's place in the text.

    Args:
        data: to recover on.
        holdout: judges the recovery meanwhile.
        test: measures the models; empty where nothing is measured.
    """

    data: CalibrationSet
    holdout: CalibrationSet
    test: CalibrationSet

    @classmethod
    def of(cls, samples: CalibrationSet, test: CalibrationSet) -> RecoveryText:
        """Return the samples with the last ones as hold-out.

        Raises:
            DataError: there are fewer than two samples.
        """
        if len(samples) < 2:
            raise DataError(
                f"{samples.source} gives {len(samples)} sample, and a recovery needs one to learn from and another to judge it",
                hint="give more text, or shorter samples (--length)",
            )
        data, holdout = samples.cut(max(1, samples.tokens // HOLDOUT_SHARE))
        return cls(data, holdout, test)


def recovery_text(tokenizer: PreTrainedTokenizerBase, text: Text) -> RecoveryText:
    """Return the samples of a text for a recovery.

    Raises:
        DataError: see load_split and RecoveryText.of.
    """
    split = load_split(tokenizer, text)
    return RecoveryText.of(split.pruning, split.test)


@dataclass(frozen=True)
class Sparse:
    """A sparse checkpoint that is loaded: its model, its zeros, and the allocation beside it, if any."""

    model: PreTrainedModel
    masks: Masks
    allocation: Allocation | None
    record: RunRecord | None


def load_sparse(source: ModelSource, tokenizer: PreTrainedTokenizerBase, out: Path) -> Sparse:
    """Return a sparse checkpoint, checked.

    Raises:
        ModelError: it is dense, or cannot be saved again.
        VerificationError: its allocation.json is of another model.
        OutputError: the disk of ``out`` has too little room.
    """
    folder = Path(source.name).expanduser()
    allocation = None
    if (folder / ALLOCATION_FILE).is_file():
        assert Checkpoint.open(folder).allocation is not None  # compares it with the tensors
        allocation = Allocation.read(folder / ALLOCATION_FILE)
    model = source.load()
    table = prunable_layers(model)
    check_finite_weights(model, table)
    masks = Masks.of(model, [layer.name for layer in table.layers])
    if allocation is not None:
        recount_model(model, allocation, exact=False, after="loading")
    check_savable(model, tokenizer)
    size = sum(p.numel() * p.element_size() for _, _, p in named_parameters(model))
    check_free(out, size, "the recovered model takes", "give an output directory on another disk")
    return Sparse(model, masks, allocation, RunRecord.beside(folder))


def load_original(source: ModelSource, model: PreTrainedModel) -> PreTrainedModel:
    """Return the dense model of a sparse one.

    Raises:
        ModelError: it has other parameters or other shapes.
    """
    original = source.load()
    shapes, expected = (
        {name: tuple(p.shape) for name, _, p in named_parameters(m)} for m in (original, model)
    )
    if shapes != expected:
        names = sorted({*shapes, *expected}, key=lambda name: (shapes.get(name) == expected.get(name), name))
        raise ModelError(
            f"{source.name} is not the original of this model: {names[0]} is "
            f"{shapes.get(names[0], 'missing')}, expected {expected.get(names[0], 'no such parameter')}",
            hint="give the dense model that was pruned",
        )
    embeddings = []
    for module in map(input_embeddings, (original, model)):
        with onloaded(module):
            embeddings.append(module.get_parameter("weight").detach().float().cpu().clone())
    if not torch.equal(*embeddings):
        log.warning(
            "%s has other embeddings than the sparse model: is it the model that was pruned?", source.name
        )
    return original


def _check_sources(sparse: ModelSource, dense: ModelSource | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a sparse model, after the checks that need no weights.

    Raises:
        ModelError: a source is missing or quantized, or the original's config or tokenizer is another one.
    """
    hint = "recover the sparse model from before its quantization, and quantize the result"
    check_source_unquantized(sparse.name, trust_remote_code=sparse.trust_remote_code, hint=hint)
    tokenizer = sparse.tokenizer()
    if dense is None:
        return tokenizer
    dense.check()
    own, other = (_config(source) for source in (sparse, dense))
    for key in _SAME:
        if own.get(key) != other.get(key):
            raise ModelError(
                f"{dense.name} is not the original of {sparse.name}: {key} is {other.get(key)}, expected {own.get(key)}",
                hint="give the dense model that was pruned",
            )
    if dense.tokenizer().get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"{dense.name} has another tokenizer than {sparse.name}",
            hint="give the dense model that was pruned",
        )
    return tokenizer


def _config(source: ModelSource) -> dict[str, Any]:
    """Return the entries of a model's config for text."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.name, trust_remote_code=source.trust_remote_code)
    return dict(config.get_text_config(decoder=True).to_dict())


@dataclass(frozen=True)
class Measured:
    """The perplexity and the KL divergence from the dense model of one model on the test text; None where unmeasured."""

    perplexity: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class RecoveryStep:
    """A recovery method, its samples, and the way that it runs."""

    recovery: Recovery
    samples: RecoveryText
    seed: int
    cache: str | None
    context: RunContext

    def identity(self, model: PreTrainedModel, original: PreTrainedModel | None) -> dict[str, Any]:
        """Return the values that the state of a stopped recovery depends on, by names that a user can read."""
        return {
            "model": fingerprint(model),
            "original": None if original is None else fingerprint(original),
            "recovery": spec_of(self.recovery),
            "code": component_digest(self.recovery),
            "text": [self.samples.data.fingerprint, self.samples.holdout.fingerprint],
            "test": self.samples.test.fingerprint,
            "seed": self.seed,
            "versions": versions(),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        }

    def references(
        self, model: PreTrainedModel, original: PreTrainedModel | None, journal: Journal
    ) -> dict[str, Measured]:
        """Return the measurements of the dense and the sparse model by stage, from the journal if there."""
        measured = {}
        if original is not None:
            measured[DENSE] = Measured(
                **journal.get(DENSE, lambda: vars(self.measure(DENSE, original, None)))
            )
        measured[PRUNE] = Measured(
            **journal.get("sparse", lambda: vars(self.measure("sparse", model, original)))
        )
        return measured

    def measure(self, name: str, model: PreTrainedModel, original: PreTrainedModel | None) -> Measured:
        """Return the measurements of a model on the test text."""
        test = self.samples.test
        if not test:
            return Measured()
        with freed_memory_kept(), on_best_device(model):
            progress = partial(self.context.progress, f"perplexity, {name}")
            value = self._finite(name, lambda: perplexity(model, test, progress=progress))
        return Measured(value, self.divergence(name, model, original))

    def divergence(self, name: str, model: PreTrainedModel, original: PreTrainedModel | None) -> float | None:
        """Return the KL divergence of a model from the original on the test text, None without either."""
        test = self.samples.test
        if not test or original is None:
            return None
        progress = partial(self.context.progress, f"KL, {name}")
        with freed_memory_kept(), on_best_device(model), on_best_device(original):
            return self._finite(name, lambda: mean_kl(original, model, test, progress=progress))

    def _finite(self, name: str, measure: Callable[[], float]) -> float | None:
        """Return what is measured, None for a sparse model's loss that is not a number."""
        try:
            return finite(measure())
        except NumericsError:
            if name == DENSE:
                raise
            log.warning("the %s model's test loss is not a number", name)
            return None

    def run(
        self,
        model: PreTrainedModel,
        original: PreTrainedModel | None,
        masks: Masks,
        allocation: Allocation | None,
        key: str,
    ) -> StageRecord:
        """Change the surviving weights of a model in place, prove its zeros, and return the stage with its measurements.

        Args:
            key: of everything that the state of a stopped recovery depends on.

        Raises:
            VerificationError: a zero was filled in, or a layer does not have its level any more.
            MSPError: see the method.
        """
        recovery, start = self.recovery, time.monotonic()
        with self._folder(key) as folder, ExitStack() as stack:
            stack.enter_context(freed_memory_kept())
            for each in (model, original):
                if each is not None:
                    stack.enter_context(on_best_device(each))
            result = recovery.recover(
                RecoveryInputs(
                    model,
                    masks,
                    self.samples.data,
                    self.samples.holdout,
                    original,
                    folder,
                    _sensitivities(allocation),
                    self.seed,
                    progress=self.context.progress,
                    ranks=self.context.ranks,
                )
            )
        seconds = round(time.monotonic() - start, 3)
        rounded = masks.check(model, f"recovery {recovery.name!r}")
        if rounded:
            log.warning(
                "%d weights of %d layers became zero by rounding, most in %s",
                sum(rounded.values()),
                len(rounded),
                max(rounded, key=lambda name: rounded[name]),
            )
        if allocation is not None:
            recount_model(model, allocation, exact=False, after=f"recovery {recovery.name!r}")
        zeros = sum(masks.zeros(layer) for layer in masks) + sum(rounded.values())
        measured = self.measure("recovered", model, original)
        return StageRecord(
            name=RECOVER,
            perplexity=measured.perplexity,
            kl=measured.kl,
            seconds=seconds,
            sparsity=zeros / sum(out * width for out, width in masks.shapes.values()),
            recovery=RecoveryRecord(
                method=spec_of(recovery),
                seed=self.seed,
                tokens=result.tokens,
                data=self.samples.data.record(),
                holdout=self.samples.holdout.record(),
                curve=result.curve,
                rounded=rounded,
                notes=result.notes,
            ),
        )

    @contextmanager
    def _folder(self, key: str) -> Iterator[Path]:
        """Yield the directory for the state of this recovery, which is removed if the block succeeds."""
        folder = cache_directory(self.cache) / "recovery" / key[:24]
        if self.context.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


def recover_pruned(
    step: RecoveryStep,
    source: ModelSource,
    model: PreTrainedModel,
    pruned: Pruned,
    out: Path,
    record: RunRecord,
) -> RunRecord:
    """Recover, in place, a model that was just pruned, and return its record with that stage.

    Args:
        source: of the dense model.
        record: of the pruning, measured.

    Raises:
        MSPError: see RecoveryStep.run.
    """
    assert pruned.outcome is not None, "a recovery follows options, not recipes"
    allocation = pruned.outcome.allocation
    masks = Masks.of(model, list(allocation.by_layer))
    step.recovery.check(model, masks)
    original = source.load()
    before = {
        DENSE: Measured(record.perplexity.get(DENSE)),
        PRUNE: Measured(record.stages[-1].perplexity, step.divergence("mixed", model, original)),
    }
    key = digest({**step.identity(model, original), "out": str(out)})
    stage = step.run(model, original, masks, allocation, key)
    return with_recovery(record, before, stage)


def _sensitivities(allocation: Allocation | None) -> dict[str, float]:
    """Return the sensitivity of each layer's unit, by Fisher's trace if the run has it, else by its first estimator."""
    if allocation is None or not allocation.sensitivities:
        return {}
    known = allocation.sensitivities
    values = known["fisher"] if "fisher" in known else known[min(known)]
    pairs = zip(allocation.table, values, strict=True)
    return {layer.name: value for unit, value in pairs for layer in unit.layers}


def _record(
    sparse: ModelSource,
    dense: ModelSource | None,
    subject: Sparse,
    text: Text,
    samples: RecoveryText,
    before: Mapping[str, Measured],
    stage: StageRecord,
) -> RunRecord:
    """Return the record of the sparse model's run with the recovery added; all of its perplexities are of one text."""
    test = samples.test
    record = subject.record or RunRecord(
        stages=(StageRecord(name=PRUNE, sparsity=stage.sparsity),),
        sparsity=SparsityRecord(achieved=stage.sparsity),
        model=ModelRecord(source=str(sparse.name)),
        perplexity={"result": None},
    )
    if record.test is None or record.test.fingerprint != test.fingerprint:
        record = record.model_copy(
            update={
                "stages": tuple(s.model_copy(update={"perplexity": None, "kl": None}) for s in record.stages),
                "perplexity": dict.fromkeys(record.perplexity),
                "kl": {},
            }
        )
    source = record.model.source if dense is None else str(dense.name)
    changes = {
        "model": record.model.model_copy(update={"source": source, "dtype": sparse.dtype}),
        "test": test.record(length=text.length) if test else None,
        "versions": versions(),
    }
    return with_recovery(record.model_copy(update=changes), before, stage)


def with_recovery(record: RunRecord, before: Mapping[str, Measured], stage: StageRecord) -> RunRecord:
    """Return the record of a run with a stage of recovery and with the measurements of the models before it."""
    *earlier, last = record.stages
    earlier = [s for s in earlier if s.name != DENSE or DENSE not in before]
    if DENSE in before:
        earlier.insert(0, StageRecord(name=DENSE, perplexity=before[DENSE].perplexity))
    last = last.model_copy(update=vars(before[PRUNE]))
    name = RECOVERED if last.name == RECOVER else "result" if "result" in record.perplexity else "mixed"
    values = {name: before[PRUNE].perplexity}
    if record.perplexity.get(UNIFORM) is not None and UNIFORM not in {s.name for s in earlier}:
        values[UNIFORM] = before[PRUNE].perplexity  # the uniform allocation is the result
    if DENSE in before:
        values[DENSE] = before[DENSE].perplexity
    perplexities = {**record.perplexity, **values, RECOVERED: stage.perplexity}
    order = [key for key in (DENSE, UNIFORM) if key in perplexities]
    order += [key for key in perplexities if key not in order]
    divergences = {**record.kl, name: before[PRUNE].kl, RECOVERED: stage.kl}
    return record.model_copy(
        update={
            "stages": (*earlier, last, stage),
            "perplexity": {key: perplexities[key] for key in order},
            "kl": {key: value for key, value in divergences.items() if value is not None},
        }
    )


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelSource,
    record: RunRecord,
    path: Path,
) -> None:
    """Write the recovered checkpoint with its records; all files appear, or none.

    Raises:
        OutputError: the directory cannot be written; the error names where the recovered model is kept.
    """

    def records(folder: Path) -> None:
        record.write(folder / RUN_FILE)
        for name in (ALLOCATION_FILE, RECIPE_FILE):
            if (Path(source.name).expanduser() / name).is_file():
                shutil.copyfile(Path(source.name).expanduser() / name, folder / name)

    kept = partial(kept_if_it_fails, model, path, records, source.cache)
    with writing(path), output_directory(path) as temporary, kept():
        with generation_config_kept(model, temporary):
            model.save_pretrained(temporary, max_shard_size=SHARD_BYTES)
        tokenizer.save_pretrained(temporary)
        copy_processor(model, temporary)
        records(temporary)
