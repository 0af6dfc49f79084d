"""Evaluate a checkpoint: lm-eval tasks, perplexity, and KL to a reference, in one record."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from msp_plugin.checkpoint.load import check_weights, load
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import Text
from msp_plugin.errors import ModelError, RecipeError
from msp_plugin.evaluation.lm_eval_run import BOOTSTRAP, SEEDS, Answers, Metric, ask, difference
from msp_plugin.evaluation.tasks import Suite, find_tasks, local_tasks
from msp_plugin.models.device import on_best_device
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.source import check_dtype, load_tokenizer, max_length, vocabulary
from msp_plugin.passes.losses import mean_kl, perplexity
from msp_plugin.progress import StepProgress, no_progress, prefixed
from msp_plugin.records.evaluation import EvalRecord, HarnessRecord, MetricScore, TaskScore, TextScore
from msp_plugin.records.parts import ModelRecord
from msp_plugin.runtime.digests import versions
from msp_plugin.runtime.files import expanded, finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A model to evaluate: ``name`` is what the user gave, ``path`` the directory or hub id that it means."""

    name: str
    path: str
    dtype: str = "auto"
    trust_remote_code: bool = False

    def max_length(self) -> int | None:
        """Return the longest sequence, in tokens, that the model takes; None if its config does not say."""
        return max_length(self.path, trust_remote_code=self.trust_remote_code)

    def vocabulary(self) -> int | None:
        """Return the number of tokens that the model has embeddings for; None if its config does not say."""
        return vocabulary(self.path, trust_remote_code=self.trust_remote_code)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer."""
        return load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)

    def load(self) -> PreTrainedModel:
        """Return the model, on the CPU."""
        return load(self.path, self.dtype, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class Request:
    """The models to evaluate, and the tasks and texts to evaluate them on.

    Args:
        reference: a model to compare with; it gets the same tasks and texts.
        tasks, task_dir, limit, num_fewshot, batch: see tasks.find_tasks and tasks.Suite.
        data: sources of text for the perplexity (see data.sources.load_texts).
        samples, length, column, bos: of each text (see data.samples.Text).

    Raises:
        RecipeError: there are neither tasks nor data, a task directory without task names, an unknown dtype, or a
            number out of range.
    """

    model: Source
    reference: Source | None = None
    tasks: tuple[str, ...] = ()
    task_dir: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch: int = 8
    data: tuple[str, ...] = ()
    samples: int = 32
    length: int | None = None
    column: str = "text"
    bos: bool | None = None

    def __post_init__(self) -> None:
        for option, least in (("limit", 1), ("num_fewshot", 0), ("batch", 1), ("samples", 1), ("length", 2)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise RecipeError(f"{option} = {value}", hint=f"give at least {least}")
        check_dtype(self.model.dtype)
        if self.task_dir is not None:
            object.__setattr__(self, "task_dir", expanded(self.task_dir))
        if self.tasks:
            return
        if self.task_dir is not None:
            names = ", ".join(sorted(local_tasks(self.task_dir))[:10])
            raise RecipeError(
                f"{self.task_dir} is given, but no task of it", hint=f"name the tasks; there are {names}"
            )
        if not self.data:
            raise RecipeError(
                "nothing to evaluate on",
                hint="name tasks, or give data: text for the perplexity",
            )

    @property
    def sources(self) -> tuple[Source, ...]:
        """The model, then the reference if there is one."""
        return (self.model,) if self.reference is None else (self.model, self.reference)


@dataclass(frozen=True)
class _Measured:
    """The measurements of one model."""

    about: ModelRecord
    answers: Answers | None
    perplexities: list[float]


def evaluate(
    request: Request,
    *,
    quiet: bool = True,
    progress: StepProgress = no_progress,
    so_far: Callable[[EvalRecord], object] = lambda record: None,
) -> EvalRecord:
    """Return the record of an evaluation.

    On one machine, equal requests give equal records: they hold no times, and only paths that the request names.

    Args:
        so_far: with a reference, gets the record of the model alone, then that of both without KL: what is left if
            the rest fails.

    Raises:
        MSPError: a task, text or model cannot be used; whatever can be checked without weights fails before loading.
    """
    lengths = [length for length in (source.max_length() for source in request.sources) if length]
    suite = None
    if request.tasks:
        suite = find_tasks(
            request.tasks,
            request.task_dir,
            limit=request.limit,
            num_fewshot=request.num_fewshot,
            batch=request.batch,
            quiet=quiet,
        )
    tokenizers = [source.tokenizer() for source in request.sources]
    texts = [_text(request, data, tokenizers, min(lengths, default=None)) for data in request.data]
    measure = partial(_measure, suite=suite, texts=texts, quiet=quiet, progress=progress)
    if request.reference is not None:
        check_weights(request.reference.path)
    model = request.model.load()
    measured, kls = [measure(request.model, model, tokenizers[0])], list[float]()
    if request.reference is not None:
        so_far(_record(request, suite, texts, measured, kls))
        if not texts:  # one model in memory is enough
            del model
            gc.collect()
        other = request.reference.load()
        measured.append(measure(request.reference, other, tokenizers[1]))
        so_far(_record(request, suite, texts, measured, kls))
        kls = [_kl(other, model, text, progress) for text in texts]
    return _record(request, suite, texts, measured, kls)


def _text(
    request: Request, data: str, tokenizers: Sequence[PreTrainedTokenizerBase], most: int | None
) -> CalibrationSet:
    """Return the samples of a text, each of at most ``most`` tokens.

    Raises:
        DataError: it is missing, empty or too short.
        ModelError: the reference tokenizes it differently, so that there is no KL.
    """
    text = Text(
        data, samples=request.samples, length=request.length, column=request.column, bos=request.bos
    ).within(most)

    def read(text: Text) -> list[CalibrationSet]:
        return [
            replace(text, vocabulary=source.vocabulary()).read(tokenizer, data, request.samples, at_least=1)
            for source, tokenizer in zip(request.sources, tokenizers, strict=True)
        ]

    sets = text.fitted(read)
    if len({samples.fingerprint for samples in sets}) > 1:
        names = " and ".join(source.name for source in reversed(request.sources))
        raise ModelError(
            f"{names} read {data} as different tokens",
            hint="the reference of a perplexity and a KL is the model before pruning; tasks compare any two",
        )
    return sets[0]


def _measure(
    source: Source,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    suite: Suite | None,
    texts: Sequence[CalibrationSet],
    quiet: bool,
    progress: StepProgress,
) -> _Measured:
    """Return the perplexities and the scores of one model."""
    step = prefixed(f"{source.name}, ", progress)
    about = ModelRecord(
        source=source.name,
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        fingerprint=fingerprint(model),
    )
    with on_best_device(model):
        values = [
            perplexity(model, text, progress=partial(step, f"perplexity of {text.source}")) for text in texts
        ]
        answers = ask(suite, model, tokenizer, quiet=quiet, progress=step) if suite is not None else None
    if answers is not None and answers.truncated:
        log.warning(
            "%d requests are longer than %s takes; their beginnings were cut off",
            answers.truncated,
            source.name,
        )
    return _Measured(about, answers, values)


def _kl(
    other: PreTrainedModel, model: PreTrainedModel, text: CalibrationSet, progress: StepProgress
) -> float:
    """Return KL(other || model) in nats per token, computed on the best device for ``other``."""
    with on_best_device(other):
        torch.nn.Module.to(model, next(other.parameters()).device)
        return mean_kl(other, model, text, progress=partial(progress, f"KL on {text.source}"))


def _record(
    request: Request,
    suite: Suite | None,
    texts: Sequence[CalibrationSet],
    measured: Sequence[_Measured],
    kls: Sequence[float],
) -> EvalRecord:
    """Return the record of the measurements of the model, and of the reference if there is one."""
    own, other = measured[0], measured[1] if len(measured) > 1 else None
    packages = {**versions(), "python": platform.python_version()}
    harness = None
    if suite is not None:
        packages |= {name: importlib.metadata.version(name) for name in ("lm_eval", "datasets")}
        harness = HarnessRecord(
            names=suite.names,
            limit=suite.limit,
            num_fewshot=suite.num_fewshot,
            batch=suite.batch,
            seeds=SEEDS,
            bootstrap=BOOTSTRAP,
        )
    return EvalRecord(
        model=own.about,
        reference=other.about if other else None,
        perplexity=tuple(_text_score(text, i, own, other, kls) for i, text in enumerate(texts)),
        tasks=_task_scores(own.answers, other.answers if other else None) if own.answers else {},
        harness=harness,
        versions=packages,
    )


def _text_score(
    text: CalibrationSet, i: int, own: _Measured, other: _Measured | None, kls: Sequence[float]
) -> TextScore:
    """Return the perplexities on the text number ``i``, and the KL divergence to the reference."""
    return TextScore(
        source=text.source,
        samples=len(text),
        length=len(text.samples[0]),
        tokens=text.tokens,
        fingerprint=text.fingerprint,
        read=text.readings[0].record(),
        value=finite(own.perplexities[i]),
        reference=finite(other.perplexities[i]) if other else None,
        kl=finite(kls[i]) if kls else None,
    )


def _task_scores(own: Answers, other: Answers | None) -> dict[str, TaskScore]:
    """Return the scores by task, with the differences from the reference if there is one."""
    theirs = {(m.task, m.name, m.filter): m for m in other.metrics} if other else {}
    scores: dict[str, list[MetricScore]] = {task: [] for task in own.tasks}
    for metric in own.metrics:
        reference = theirs.get((metric.task, metric.name, metric.filter))
        scores[metric.task].append(_metric_score(metric, reference))
    return {
        task: TaskScore(**about, metrics=tuple(scores[task]))
        for task, about in own.tasks.items()
        if scores[task]
    }


def _metric_score(metric: Metric, reference: Metric | None) -> MetricScore:
    score = MetricScore(
        name=metric.name,
        filter=metric.filter,
        value=finite(metric.value),
        stderr=finite(metric.stderr),
        higher_is_better=metric.higher_is_better,
    )
    if reference is None:
        return score
    more, stderr, paired = difference(metric, reference)
    return score.model_copy(
        update={
            "reference": finite(reference.value),
            "reference_stderr": finite(reference.stderr),
            "difference": finite(more),
            "difference_stderr": finite(stderr),
            "paired": paired,
        }
    )
