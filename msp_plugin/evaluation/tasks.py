"""Find lm-eval's tasks, and build each of them before a model is loaded."""

from __future__ import annotations

import difflib
import importlib.util
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import yaml

from msp_plugin.errors import DataError, HostError, RecipeError, shown
from msp_plugin.runtime.documents import parse_yaml

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

log = logging.getLogger(__name__)

_LOGGERS = ("lm_eval", "datasets", "evaluate")
_IGNORED = {"__pycache__", ".ipynb_checkpoints"}  # by lm-eval too


@dataclass(frozen=True)
class Suite:
    """Tasks of lm-eval that can be run: they were built once, so their data is available.

    Args:
        limit: most documents of each task; None for all.
        num_fewshot: worked examples before each document; None for each task's own number.
        batch: requests per forward pass.
    """

    names: tuple[str, ...]
    manager: TaskManager
    limit: int | None = None
    num_fewshot: int | None = None
    batch: int = 8


def require_lm_eval() -> None:
    """Raise unless lm-eval is installed and recent enough.

    Raises:
        HostError: it is missing, too old or cannot be imported; the hint names the extra to install.
    """
    hint = "pip install 'msp_plugin[eval]'; perplexity and KL, on data, need no tasks"
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
    """Return ``task``, ``group`` or ``tag`` by each name that the YAML files of a directory define.

    Raises:
        DataError: there is no such directory, it holds no YAML file, one cannot be read, or none defines a
            task.
    """
    if not directory.is_dir():
        raise DataError(
            f"there is no directory of tasks at {directory}", hint="give one with lm-eval's YAML files"
        )
    files = sorted(p for p in directory.rglob("*.yaml") if not _IGNORED & set(p.parts))
    if not files:
        raise DataError(f"{directory} holds no .yaml file", hint="lm-eval defines a task by a file NAME.yaml")
    kinds: dict[str, str] = {}
    for file in files:
        config = _read_task(file)
        kind = "group" if "group" in config else "task"
        if isinstance(config.get(kind), str):
            kinds[config[kind]] = kind
            tags = config.get("tag") or []
            tags = [tags] if isinstance(tags, str) else tags
            if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
                raise DataError(f"{file}: tag is {shown(tags)}", hint="write one name, or a list of names")
            kinds |= dict.fromkeys(tags, "tag")
    if not kinds:
        raise DataError(f"no .yaml file of {directory} defines a task", hint="a task's file says task: NAME")
    return kinds


def _read_task(file: Path) -> dict[str, Any]:
    """Return the mapping in a task's YAML file, without importing the functions that it names."""

    class Loader(yaml.SafeLoader):
        pass

    def function_name(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
        return loader.construct_scalar(node)

    Loader.add_constructor("!function", function_name)
    try:
        config = parse_yaml(file.read_text(encoding="utf-8"), Loader)
    except (ValueError, OSError) as error:
        raise DataError(f"{file} is not YAML that lm-eval reads: {error}") from None
    if not isinstance(config, dict):
        raise DataError(
            f"{file} holds no mapping", hint="a task's file says task: NAME, output_type: ... and so on"
        )
    return config


def find_tasks(
    names: Sequence[str],
    directory: Path | None = None,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch: int = 8,
    quiet: bool = True,
) -> Suite:
    """Return the tasks of some names, after building each once, so that no model is loaded for broken ones.

    Args:
        names: of tasks, groups and tags of lm-eval or of ``directory``; the latter take precedence.
        directory: YAML files of the user's own tasks.
        limit, num_fewshot, batch: see Suite.
        quiet: keep the output of lm-eval off the console.

    Raises:
        HostError: lm-eval is missing.
        RecipeError: there is no task of a name, or two names ask for the same task.
        DataError: the directory holds no tasks, or a task cannot be built, or its dataset cannot be loaded.
    """
    local = local_tasks(directory) if directory is not None else {}
    require_lm_eval()
    names = tuple(dict.fromkeys(names))
    local_only = all(local.get(name) == "task" for name in names)
    with off_console(quiet):
        from lm_eval.tasks import TaskManager

        # Reading lm-eval's own 14,000 files takes ten seconds.
        manager = TaskManager(include_path=directory, include_defaults=not local_only)
        for name in names:
            if name not in manager.all_tasks:
                raise RecipeError(f"there is no task {name!r}", hint=_near(name, manager, local, directory))
        built = {name: _build(manager, name) for name in names}
    for leaf, task in _leaves(built).items():
        _check_askable(leaf, task)
        if num_fewshot and task.get_config("num_fewshot") == 0:  # lm-eval does not change such a task
            log.warning("task %s takes no examples; num_fewshot is ignored there", leaf)
    return Suite(names, manager, limit, num_fewshot, batch)


def _near(name: str, manager: TaskManager, local: dict[str, str], directory: Path | None) -> str:
    """Return a hint with known names that are close to an unknown one."""
    close = difflib.get_close_matches(name, [*local, *manager.all_tasks], n=5, cutoff=0.6)
    near = f"near it: {', '.join(dict.fromkeys(close))}; " if close else ""
    if directory is None:
        return f"{near}a task directory adds tasks of your own"
    return f"{near}{directory} defines {', '.join(sorted(local)[:10])}"


def _build(manager: TaskManager, name: str) -> dict[str, Any]:
    """Return the tasks of a name, by their own names; building them loads their datasets.

    Raises:
        DataError: a task cannot be built, or its dataset cannot be loaded.
    """
    try:
        tasks: dict[str, Any] = manager.load([name])["tasks"]
        return tasks
    except Exception as error:  # tasks run code of their own, and datasets raises many types
        cause = f"{type(error).__name__}: {error}"
        if _came_from_data(error):
            raise DataError(
                f"the dataset of task {name!r} could not be loaded: {cause}",
                hint="it comes from the hub unless the task says otherwise: go online once, or give a task "
                "with local data in a task directory (relative data_files start at the working directory)",
            ) from error
        raise DataError(f"lm-eval cannot build task {name!r}: {cause}", hint="see its YAML file") from error


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
    """Return True if an error was raised while a task fetched its documents."""
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
    """Raise if a task runs code of the model, or shows more than text."""
    if getattr(task, "UNSAFE_CODE", False):
        raise RecipeError(
            f"task {name!r} runs code that the model writes", hint="run it with lm-eval, in a sandbox"
        )
    if getattr(task, "MULTIMODAL", False):
        raise RecipeError(f"task {name!r} shows images or sound", hint="name tasks of text alone")


@contextmanager
def off_console(quiet: bool) -> Iterator[TextIO]:
    """Keep the output of lm-eval and datasets off the console, and yield the console's stderr.

    Args:
        quiet: False to let them write to stderr; never to stdout.
    """
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
