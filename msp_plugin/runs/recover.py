"""Recover a sparse checkpoint: load it, check everything, change its surviving weights, check its zeros, write it."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msp_plugin.checkpoint.run_files import copy_processor
from msp_plugin.checkpoint.saving import generation_config_kept, kept_if_it_fails
from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.data.samples import Text
from msp_plugin.errors import OutputError, RecipeError
from msp_plugin.hosts.base import Pruned
from msp_plugin.hosts.builtin import BuiltIn
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.plugins.manager import Plugins
from msp_plugin.records.parts import ModelRecord
from msp_plugin.records.run import (
    PRUNE,
    RUN_FILE,
    RunRecord,
    SparsityRecord,
    StageRecord,
)
from msp_plugin.recovery.base import Recovery, check_runs_by_block, check_sensitivities
from msp_plugin.recovery.masks import Masks
from msp_plugin.recovery.record import Measured, Recovered, copy_logs, with_recovery
from msp_plugin.recovery.sources import (
    RECORDS,
    Sparse,
    check_denser,
    check_sources,
    load_original,
    load_sparse,
    records_folder,
)
from msp_plugin.recovery.step import RecoveryStep, RecoveryText, recovery_text, sensitivities, states
from msp_plugin.recovery.trained import check_adapter
from msp_plugin.runs.steps import Run
from msp_plugin.runtime.context import RunContext
from msp_plugin.runtime.digests import digest, versions
from msp_plugin.runtime.disk import writing
from msp_plugin.runtime.files import expanded, output_directory
from msp_plugin.runtime.journal import Journal
from msp_plugin.runtime.locks import sole_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
) -> Run | None:
    """Change the surviving weights of a sparse checkpoint so that it comes nearer to the dense model, and write it.

    ``out`` gets the checkpoint in the dtype of ``run``, its allocation.json and recipe.yaml, and run.json. After a
    stop, the same call continues if the method can.

    Args:
        run: directory or hub id of a sparse model, pruned by this package or another, stored dense or packed.
        data: text to recover on: a file, directory or dataset, or a Text with more settings.
        out: a directory that is new or empty.
        original: directory or hub id of the dense model; None if the method needs none.
        method: name of a recovery, or a mapping with ``name`` and options.
        seed: of the method's random choices.
        dtype: ``auto`` (that of the sparse checkpoint), ``float32``, ``bfloat16`` or ``float16``, for both models.
        trust_remote_code: run the model repository's code.
        offload: leave the weights of the original on disk, and those of the sparse model if the method can.
        cache: directory for the state of a stopped recovery; None is the default cache.
        context: progress, and whether to use cached measurements.

    Returns:
        The run; None on all ranks but the first.

    Raises:
        MSPError: an option, model or text cannot be used; raised before the method starts.
        VerificationError: the method filled a zero in; nothing is written.
    """
    recovery: Recovery = Plugins().build("recoveries", method)
    if original is None and recovery.needs_original:
        raise RecipeError(
            f"recovery {recovery.name!r} needs the dense model",
            hint="name the dense model as its original",
        )
    sparse = ModelSource(run, dtype, trust_remote_code, offload and recovery.offloads, cache)
    dense = None if original is None else ModelSource(original, dtype, trust_remote_code, offload, cache)
    check_beside(recovery, Path(out), cache, fresh=context.fresh)
    ranks = context.ranks
    with ExitStack() as stack:
        path, journal_file = ranks.on_rank_zero(
            lambda: stack.enter_context(sole_run(out, cache, fresh=context.fresh))
        )
        sources = check_sources(sparse, dense, recovery)
        tokenizer, smaller = sources.tokenizer, sources.smaller
        text = data if isinstance(data, Text) else Text(data)
        text = text.for_model(sparse.name, trust_remote_code=trust_remote_code)
        samples = recovery_text(tokenizer, text)
        step = RecoveryStep(recovery, samples, seed, cache, context)
        subject = load_sparse(sparse, tokenizer, path, smaller=smaller)
        recovery.check(subject.model, subject.masks)
        check_runs_by_block(recovery, subject.model, samples.data.samples[0])
        check_sensitivities(recovery, any(sensitivities(subject.allocation).values()))
        reference = None
        if dense is not None:
            if dense.dtype == "auto":
                dense = replace(dense, dtype=_dtype(subject.model))
            reference = load_original(dense, subject.model, smaller=smaller)
        if dense is not None and reference is not None and not smaller:
            check_denser(dense.name, reference, subject.masks)
        identity = step.identity(subject.model, None if reference is None else fingerprint(reference))
        with closing(Journal(journal_file, identity, ranks)) as journal:
            before = step.references(subject.model, reference, journal)
        key = digest({**identity, "out": str(path)})
        stage = step.run(subject.model, reference, subject.masks, subject.allocation, key, stack)
        if ranks.size > 1:
            ranks.leave()
        if ranks.rank:
            return None
        record = _record(sparse, dense, subject, samples, before, stage)
        _write(subject.model, tokenizer, sparse, record, path, step.folder(key))
    Plugins().tell("msp_run_finished", record=record.to_dict())
    return Run(path, record)


def check_beside(recovery: Recovery, out: Path, cache: str | None, *, fresh: bool) -> None:
    """Raise unless a recovery can write what it writes beside its result.

    Args:
        fresh: the states of stopped recoveries do not count.

    Raises:
        OutputError: it would write into the directory of the result, which has to be empty at the end; or into one that
            cannot be written, or holds something that no stopped recovery has written.
    """
    whole = expanded(out).resolve()
    for directory in recovery.writes:
        if directory.resolve().is_relative_to(whole):
            raise OutputError(
                f"{recovery.name} would write {directory} into {out}, which gets the result",
                hint="write it to a directory beside that",
            )
        check_adapter(directory, () if fresh else states(cache).glob("*"))


def recover_pruned(
    step: RecoveryStep,
    source: ModelSource,
    model: PreTrainedModel,
    pruned: Pruned,
    out: Path,
    until: ExitStack,
) -> Recovered:
    """Recover, in place, a model that was just pruned; all ranks do it together.

    Args:
        source: of the dense model.
        until: see RecoveryStep.run.

    Raises:
        MSPError: see RecoveryStep.run.
    """
    assert pruned.outcome is not None, "a recovery follows options, not recipes"
    allocation = pruned.outcome.allocation
    masks = Masks.of(model, list(allocation.by_layer))
    step.recovery.check(model, masks)
    original = source.load()
    before = {PRUNE: Measured(kl=step.divergence("mixed", model, original))}
    key = digest({**step.identity(model, fingerprint(original)), "out": str(out)})
    stage = step.run(model, original, masks, allocation, key, until)
    return Recovered(stage, before, state=step.folder(key))


def _dtype(model: PreTrainedModel) -> str:
    """Return the dtype of a model's weights, e.g. ``bfloat16``."""
    return str(model.dtype).removeprefix("torch.")


def _record(
    sparse: ModelSource,
    dense: ModelSource | None,
    subject: Sparse,
    samples: RecoveryText,
    before: Mapping[str, Measured],
    stage: StageRecord,
) -> RunRecord:
    """Return the record of the sparse model's run with the recovery added; perplexities on another text are dropped."""
    test = samples.test
    record = subject.record or RunRecord(
        stages=(StageRecord(name=PRUNE, sparsity=stage.sparsity),),
        sparsity=SparsityRecord(achieved=stage.sparsity),
        model=ModelRecord(source=sparse.spelled),
        perplexity={"result": None},
    )
    if not test:  # nothing was measured: what is known stays
        before = {PRUNE: Measured(record.stages[-1].perplexity, record.stages[-1].kl)}
    elif record.test is None or record.test.fingerprint != test.fingerprint:
        record = record.model_copy(
            update={
                "stages": tuple(s.model_copy(update={"perplexity": None, "kl": None}) for s in record.stages),
                "perplexity": dict.fromkeys(record.perplexity),
                "kl": {},
            }
        )
    source = record.model.source if dense is None else dense.spelled
    changes = {
        "model": record.model.model_copy(update={"source": source, "dtype": _dtype(subject.model)}),
        "test": test.record(length=len(test.samples[0])) if test else record.test,
        "versions": versions(),
        "python": platform.python_version(),
    }
    return with_recovery(record.model_copy(update=changes), Recovered(stage, before))


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelSource,
    record: RunRecord,
    path: Path,
    state: Path,
) -> None:
    """Write the recovered checkpoint with its records and the logs in the recovery's state; all files appear, or none.

    Raises:
        OutputError: the directory cannot be written; the error names where the recovered model is kept.
    """

    def records(folder: Path) -> None:
        before = records_folder(source.name)
        for name in RECORDS:
            if (before / name).is_file():
                shutil.copyfile(before / name, folder / name)
        record.write(folder / RUN_FILE)
        copy_logs(state, folder)

    kept = partial(kept_if_it_fails, model, path, records, source.cache)
    with writing(path), output_directory(path) as temporary, kept():
        with generation_config_kept(model, temporary):
            BuiltIn(Plugins()).save(model, temporary)
        tokenizer.save_pretrained(temporary)
        copy_processor(model, temporary)
        records(temporary)
