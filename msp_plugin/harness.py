"""lm-eval: find tasks, ask a loaded model, and compare what two models scored."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import io
import logging
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import yaml

from msp_plugin.allocate import StepProgress, no_progress
from msp_plugin.errors import DataError, HostError, NumericsError, RecipeError

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

#: lm-eval's own defaults (lm_eval/defaults.py), said here so that the record holds what was used.
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
#: Draws for the standard error of a metric that is no mean; it is within 1/sqrt(2 * 1000) = 2 % of itself then
#: (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 6). lm-eval's 100,000 take minutes a task.
BOOTSTRAP = 1000
_LOGGERS = ("lm_eval", "datasets", "evaluate")
_IGNORED = {"__pycache__", ".ipynb_checkpoints"}  # by lm-eval too


@dataclass(frozen=True)
class Suite:
    """Tasks that were found and could be built, with their data at hand.

    Args:
        limit: documents of each task; None: all.
        num_fewshot: worked examples before each document; None: what each task says.
        batch: requests per forward pass.
    """

    names: tuple[str, ...]
    manager: TaskManager
    limit: int | None = None
    num_fewshot: int | None = None
    batch: int = 8


@dataclass(frozen=True)
class Metric:
    """One number of one task. ``by_document`` holds what it is the mean of, where it is a mean."""

    task: str
    name: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    by_document: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Answers:
    """What a model scored.

    Args:
        tasks: by name: version, num_fewshot, samples (documents asked), available (documents there are),
            fingerprint of the prompts and targets; of groups as far as lm-eval says it.
        truncated: requests that were longer than the model takes and lost their beginning.
    """

    metrics: tuple[Metric, ...]
    tasks: dict[str, dict[str, Any]]
    truncated: int = 0


def require_lm_eval() -> None:
    """Raise unless an lm-eval is installed that can be used.

    Raises:
        HostError: it is not; the extra that brings it is named.
    """
    hint = "pip install 'msp_plugin[eval]'; perplexity and KL (--data) need no tasks"
    if importlib.util.find_spec("lm_eval") is None:
        raise HostError("tasks need lm-eval, which is not installed", hint=hint)
    try:
        import lm_eval.models.huggingface
        from lm_eval.tasks import TaskManager
    except ImportError as error:  # accelerate is not among lm-eval's own requirements
        raise HostError(f"lm-eval cannot be imported: {error}", hint=hint) from error
    if not hasattr(TaskManager, "load"):
        raise HostError(f"lm-eval {lm_eval.__version__} is too old, 0.4.12 is the oldest", hint=hint)


def local_tasks(directory: Path) -> dict[str, str]:
    """Return what the YAML files of a directory define, by name: ``task``, ``group`` or ``tag``.

    Raises:
        DataError: there is no such directory, it holds no YAML file, one cannot be read, or none defines a task.
    """
    if not directory.is_dir():
        raise DataError(
            f"there is no directory of tasks at {directory}", hint="give one with lm-eval's YAML files"
        )
    files = sorted(p for p in directory.rglob("*.yaml") if not _IGNORED & set(p.parts))
    if not files:
        raise DataError(f"{directory} holds no .yaml file", hint="lm-eval defines a task by a file NAME.yaml")
    found: dict[str, str] = {}
    for file in files:
        config = _read_task(file)
        kind = "group" if "group" in config else "task"
        if isinstance(config.get(kind), str):
            found[config[kind]] = kind
            tags = config.get("tag") or []
            found |= dict.fromkeys([tags] if isinstance(tags, str) else tags, "tag")
    if not found:
        raise DataError(f"no .yaml file of {directory} defines a task", hint="a task's file says task: NAME")
    return found


def _read_task(file: Path) -> dict[str, Any]:
    """Return a task's YAML with the names of functions in place of the functions."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    try:
        config = yaml.load(file.read_text(encoding="utf-8"), Loader=Loader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{file} is no YAML that lm-eval reads: {error}") from None
    if not isinstance(config, dict):
        raise DataError(
            f"{file} holds no mapping", hint="a task's file says task: NAME, output_type: ... and so on"
        )
    return config


def find_tasks(
    names: Sequence[str], directory: Path | None = None, *, limit: int | None = None, num_fewshot: int | None = None,
    batch: int = 8, quiet: bool = True,
) -> Suite:  # fmt: skip
    """Return the tasks after each was built once, so that a model is loaded for tasks that can be asked.

    Args:
        names: of tasks, groups and tags, of lm-eval or of ``directory``, which goes first.

    Raises:
        HostError: lm-eval is missing.
        RecipeError: a name that is not there, or two that ask for the same task.
        DataError: a directory or file that is no task's, a task that cannot be built, or its dataset not loaded.
    """
    local = local_tasks(directory) if directory is not None else {}
    require_lm_eval()
    names = tuple(dict.fromkeys(names))
    alone = all(local.get(name) == "task" for name in names)  # lm-eval's own 14,000 files take ten seconds
    with _console(quiet):
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=directory, include_defaults=not alone)
        for name in names:
            if name not in manager.all_tasks:
                raise RecipeError(f"there is no task {name!r}", hint=_near(name, manager, local, directory))
        built = {name: _build(manager, name) for name in names}
    for leaf, task in _leaves(built).items():
        _check_askable(leaf, task)
        if num_fewshot and task.get_config("num_fewshot") == 0:  # lm-eval never overrides that
            log.warning("task %s takes no examples; --num-fewshot is ignored there", leaf)
    return Suite(names, manager, limit, num_fewshot, batch)


def _near(name: str, manager: TaskManager, local: dict[str, str], directory: Path | None) -> str:
    close = difflib.get_close_matches(name, [*local, *manager.all_tasks], n=5, cutoff=0.6)
    near = f"near it: {', '.join(dict.fromkeys(close))}; " if close else ""
    if directory is None:
        return f"{near}--task-dir DIR adds tasks of your own"
    return f"{near}{directory} defines {', '.join(sorted(local)[:10])}"


def _build(manager: TaskManager, name: str) -> dict[str, Any]:
    """Return the tasks of a name, by their own names; their datasets are loaded by that.

    Raises:
        DataError: that failed.
    """
    try:
        return manager.load([name])["tasks"]
    except Exception as error:  # tasks run code of their own, and datasets raises many types
        what = f"{type(error).__name__}: {error}"
        if _came_from_data(error):
            raise DataError(
                f"the dataset of task {name!r} could not be loaded: {what}",
                hint="it comes from the hub unless the task says otherwise: go online once, or give a task with "
                "local data by --task-dir (relative data_files start at the working directory)",
            ) from error
        raise DataError(f"lm-eval cannot build task {name!r}: {what}", hint="see its YAML file") from error


def _leaves(built: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the tasks of all names.

    Raises:
        RecipeError: two names ask for the same task.
    """
    leaves: dict[str, Any] = {}
    asked_by: dict[str, str] = {}
    for name, tasks in built.items():
        for leaf, task in tasks.items():
            if leaf in leaves:
                raise RecipeError(
                    f"{name!r} and {asked_by[leaf]!r} both ask for {leaf!r}", hint="name one of them"
                )
            leaves[leaf], asked_by[leaf] = task, name
    return leaves


def _came_from_data(error: BaseException) -> bool:
    """Return True if it was raised while a task fetched its documents."""
    trace = error.__traceback__
    while trace is not None:
        code, module = trace.tb_frame.f_code, trace.tb_frame.f_globals.get("__name__", "")
        if module.partition(".")[0] == "datasets" or (
            module == "lm_eval.api.task" and code.co_name == "download"
        ):
            return True
        trace = trace.tb_next
    return False


def _check_askable(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise RecipeError(
            f"task {name!r} runs code that the model writes", hint="run it with lm-eval, in a sandbox"
        )
    if getattr(task, "MULTIMODAL", False):
        raise RecipeError(f"task {name!r} shows images or sound", hint="name tasks of text alone")


def ask(
    suite: Suite, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, quiet: bool = True,
    progress: StepProgress = no_progress,
) -> Answers:  # fmt: skip
    """Return what a model scores on the tasks, where the model is.

    In 16 bits lm-eval sums log-probabilities in 16 bits, as its own command does; load the model in float32
    for numbers that do not depend on the batch.

    Raises:
        NumericsError: a log-likelihood is not a number.
        HostError: lm-eval failed.
    """
    with _console(quiet) as stderr:
        import lm_eval

        asked = _reporting(model, tokenizer, suite.batch, stderr, progress)
        try:
            results = lm_eval.simple_evaluate(
                model=asked, tasks=list(suite.names), task_manager=suite.manager, limit=suite.limit,
                num_fewshot=suite.num_fewshot, batch_size=suite.batch, random_seed=SEEDS["random"],
                numpy_random_seed=SEEDS["numpy"], torch_random_seed=SEEDS["torch"],
                fewshot_random_seed=SEEDS["fewshot"], bootstrap_iters=BOOTSTRAP,
            )  # fmt: skip
        except NumericsError:
            raise
        except Exception as error:  # tasks score by code of their own
            raise HostError(
                f"lm-eval failed on {', '.join(suite.names)}: {type(error).__name__}: {error}"
            ) from error
    if results is None:
        raise HostError("lm-eval gives its results to the first process alone", hint="leave out torchrun")
    return Answers(tuple(_metrics(results)), _tasks(results), asked.truncated)


def _reporting(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: int,
    stderr: TextIO,
    progress: StepProgress,
) -> HFLM:
    """Return lm-eval's view of a model, which reports progress, counts what it cuts and refuses NaN."""
    from lm_eval.models.huggingface import HFLM

    class Reporting(HFLM):
        truncated = 0

        def add_partial(self, kind: str, request: Any, answer: Any) -> None:  # called for each answer
            value = answer[0] if isinstance(answer, tuple) else answer
            if isinstance(value, float) and math.isnan(value):
                raise NumericsError("a log-likelihood is not a number", hint="try --dtype float32")
            self.done += 1
            progress(kind, self.done, self.total)

        def _answer(self, way: Any, requests: list[Any]) -> list[Any]:
            self.done, self.total, self.cache_hook = 0, len(requests), self
            with redirect_stderr(stderr):
                return way(requests, disable_tqdm=True)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._answer(super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._answer(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return self._answer(super().generate_until, requests)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **more: Any) -> list[Any]:
            room = self.max_length + 1  # the last token is scored, not read
            self.truncated += sum(len(context) + len(text) > room for _, context, text in requests)
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, **more)

    return Reporting(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def _metrics(results: dict[str, Any]) -> Iterator[Metric]:
    """Yield the metrics of lm-eval's results: keys are ``metric,filter`` and ``metric_stderr,filter``."""
    for task, found in results["results"].items():
        better = results["higher_is_better"].get(task) or {}
        for key, value in found.items():
            name, comma, way = key.partition(",")
            if not comma or name.endswith("_stderr") or isinstance(value, str):
                continue
            stderr = found.get(f"{name}_stderr,{way}")
            rows = [row for row in results["samples"].get(task, ()) if row["filter"] == way]
            yield Metric(
                task, name, way, float(value), None if stderr is None or isinstance(stderr, str) else float(stderr),
                better.get(name), _documents(rows, name, float(value)),
            )  # fmt: skip


def _documents(rows: Sequence[dict[str, Any]], name: str, value: float) -> tuple[float, ...] | None:
    """Return a metric's numbers by document if the metric is their mean, else None."""
    try:
        numbers = tuple(float(row[name]) for row in sorted(rows, key=lambda row: row["doc_id"]))
    except (KeyError, TypeError, ValueError):  # pairs for an F1, or a document without it
        return None
    mean = numbers and math.isclose(math.fsum(numbers) / len(numbers), value, rel_tol=1e-9, abs_tol=1e-12)
    return numbers if mean else None


def _tasks(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    about = {}
    for task, found in results["results"].items():
        count = results["n-samples"].get(task, {})
        rows = results["samples"].get(task)
        about[task] = {
            "version": results["versions"].get(task), "num_fewshot": results["n-shot"].get(task),
            "samples": count.get("effective", found.get("sample_len")), "available": count.get("original"),
            "fingerprint": _digest(rows) if rows else None,
        }  # fmt: skip
    return about


def _digest(rows: Sequence[dict[str, Any]]) -> str:
    """Return a hex digest of which documents were asked, with which prompts and targets."""
    asked = {f"{row['doc_id']} {row['doc_hash']} {row['prompt_hash']} {row['target_hash']}" for row in rows}
    return hashlib.sha256("\n".join(sorted(asked)).encode()).hexdigest()


def difference(metric: Metric, reference: Metric) -> tuple[float, float | None, bool]:
    """Return metric - reference, its standard error, and True if that is of pairs.

    Both models answered the same documents. Where both numbers are means over documents, the standard error is
    that of the mean of the differences; else it is that of independent numbers, which is larger for models that
    fail on the same documents.
    """
    more = metric.value - reference.value
    ours, theirs = metric.by_document, reference.by_document
    if ours is not None and theirs is not None and len(ours) == len(theirs) > 1:
        pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
        return more, statistics.stdev(pairs) / math.sqrt(len(pairs)), True
    if metric.stderr is None or reference.stderr is None:
        return more, None, False
    return more, math.hypot(metric.stderr, reference.stderr), False


@contextmanager
def _console(quiet: bool) -> Iterator[TextIO]:
    """Keep what lm-eval and datasets print, log and draw off the console, stdout in any case; yield the stderr."""
    stderr = sys.stderr
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR if quiet else logging.INFO)
    sink = io.StringIO() if quiet else stderr
    try:
        with redirect_stdout(sink), redirect_stderr(sink):
            yield stderr
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
