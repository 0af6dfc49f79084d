"""Run lm-eval's tasks on a loaded model, and compare the scores of two models."""

from __future__ import annotations

import hashlib
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from msp_plugin.errors import HostError, NumericsError
from msp_plugin.evaluation.tasks import Suite, off_console
from msp_plugin.progress import StepProgress, no_progress

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: lm-eval's own defaults (lm_eval/defaults.py), passed explicitly so that the record can name them.
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
#: Bootstrap resamples for the standard error of a metric that is not a mean. 1,000 give it a relative error of
#: 1/sqrt(2 * 1000) = 2 % (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 6); lm-eval's default of
#: 100,000 takes minutes per task.
BOOTSTRAP = 1000


@dataclass(frozen=True)
class Metric:
    """One number of one task. If it is a mean of finite numbers, ``by_document`` holds that of each document."""

    task: str
    name: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    by_document: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Answers:
    """The scores of a model.

    Args:
        tasks: by name: version, num_fewshot, samples (documents used), available (documents of the task), fingerprint
            of the prompts and targets; for groups None where lm-eval gives nothing.
        truncated: number of requests that were longer than the model takes and lost their beginning.
    """

    metrics: tuple[Metric, ...]
    tasks: dict[str, dict[str, Any]]
    truncated: int = 0


def ask(
    suite: Suite,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    quiet: bool = True,
    progress: StepProgress = no_progress,
) -> Answers:
    """Return the scores of a model on the tasks, computed on the model's device.

    With a 16-bit model lm-eval sums log-probabilities in 16 bits, as its own command does; load the model in float32
    for numbers that do not depend on the batch.

    Raises:
        NumericsError: a log-likelihood is not a number.
        HostError: lm-eval failed.
    """
    # lm-eval's resampling would fork a process with threads, and such a fork may hang.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with off_console(quiet) as stderr:
        import lm_eval

        adapter = _reporting(model, tokenizer, suite.batch, stderr, progress)
        try:
            results = lm_eval.simple_evaluate(
                model=adapter,
                tasks=list(suite.names),
                task_manager=suite.manager,
                limit=suite.limit,
                num_fewshot=suite.num_fewshot,
                batch_size=suite.batch,
                random_seed=SEEDS["random"],
                numpy_random_seed=SEEDS["numpy"],
                torch_random_seed=SEEDS["torch"],
                fewshot_random_seed=SEEDS["fewshot"],
                bootstrap_iters=BOOTSTRAP,
            )
        except NumericsError:
            raise
        except Exception as error:  # tasks score with code of their own
            raise HostError(
                f"lm-eval failed on {', '.join(suite.names)}: {type(error).__name__}: {error}"
            ) from error
    if results is None:
        raise HostError("lm-eval gives results only to the first process", hint="start it without torchrun")
    return Answers(tuple(_metrics(results)), _tasks(results), adapter.truncated)


def _reporting(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: int,
    stderr: TextIO,
    progress: StepProgress,
) -> HFLM:
    """Return lm-eval's adapter of a model, which also reports progress, counts cut requests and refuses NaN."""
    from lm_eval.models.huggingface import HFLM

    class Reporting(HFLM):
        truncated = 0

        def add_partial(self, kind: str, request: Any, answer: Any) -> None:  # called for each answer
            value = answer[0] if isinstance(answer, tuple) else answer
            if isinstance(value, float) and math.isnan(value):
                raise NumericsError("a log-likelihood is not a number", hint="try dtype float32")
            self.done += 1
            progress(kind, self.done, self.total)

        def _answer(self, method: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
            self.done, self.total, self.cache_hook = 0, len(requests), self
            with redirect_stderr(stderr):
                return method(requests, disable_tqdm=True)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._answer(super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._answer(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._answer(super().generate_until, requests)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **more: Any) -> list[Any]:
            room = self.max_length + 1  # the last token is scored, not read
            self.truncated += sum(len(context) + len(text) > room for _, context, text in requests)
            answers: list[Any] = super()._loglikelihood_tokens(requests, disable_tqdm=True, **more)
            return answers

    return Reporting(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def _metrics(results: dict[str, Any]) -> Iterator[Metric]:
    """Yield the metrics in lm-eval's results, whose keys are ``metric,filter`` and ``metric_stderr,filter``."""
    for task, scores in results["results"].items():
        better = results["higher_is_better"].get(task) or {}
        for key, value in scores.items():
            name, comma, filter_name = key.partition(",")
            if not comma or name.endswith("_stderr") or isinstance(value, str):
                continue
            stderr = scores.get(f"{name}_stderr,{filter_name}")
            rows = [row for row in results["samples"].get(task, ()) if row["filter"] == filter_name]
            yield Metric(
                task,
                name,
                filter_name,
                float(value),
                None if stderr is None or isinstance(stderr, str) else float(stderr),
                better.get(name),
                _documents(rows, name, float(value)),
            )


def _documents(rows: Sequence[dict[str, Any]], name: str, value: float) -> tuple[float, ...] | None:
    """Return a metric's numbers by document; None if the metric is not their mean, or one is not finite."""
    try:
        numbers = tuple(float(row[name]) for row in sorted(rows, key=lambda row: row["doc_id"]))
    except (KeyError, TypeError, ValueError):  # pairs for an F1, or a document without it
        return None
    if not numbers or not all(map(math.isfinite, numbers)):
        return None
    mean = math.isclose(math.fsum(numbers) / len(numbers), value, rel_tol=1e-9, abs_tol=1e-12)
    return numbers if mean else None


def _tasks(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the facts on each task beside its metrics (see Answers.tasks)."""
    tasks = {}
    for task, scores in results["results"].items():
        count = results["n-samples"].get(task, {})
        rows = results["samples"].get(task)
        tasks[task] = {
            "version": results["versions"].get(task),
            "num_fewshot": results["n-shot"].get(task),
            "samples": count.get("effective", scores.get("sample_len")),
            "available": count.get("original"),
            "fingerprint": _digest(rows) if rows else None,
        }
    return tasks


def _digest(rows: Sequence[dict[str, Any]]) -> str:
    """Return a hex SHA-256 of the documents that were used, their prompts and their targets."""
    used = {f"{row['doc_id']} {row['doc_hash']} {row['prompt_hash']} {row['target_hash']}" for row in rows}
    return hashlib.sha256("\n".join(sorted(used)).encode()).hexdigest()


def difference(metric: Metric, reference: Metric) -> tuple[float, float | None, bool]:
    """Return (metric - reference, its standard error, True if that error is paired by document).

    Both models answered the same documents. If both numbers are means over documents, the standard error is that of
    the mean difference; otherwise it assumes independent numbers, and is too large for models that fail on the same
    documents.
    """
    more = metric.value - reference.value
    ours, theirs = metric.by_document, reference.by_document
    if ours is not None and theirs is not None and len(ours) == len(theirs) > 1:
        pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
        return more, statistics.stdev(pairs) / math.sqrt(len(pairs)), True
    if metric.stderr is None or reference.stderr is None:
        return more, None, False
    return more, math.hypot(metric.stderr, reference.stderr), False
