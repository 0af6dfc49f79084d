"""The command line's consoles, log, progress and tables."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from msp_plugin.progress import ProgressLines, StepProgress, no_progress
from msp_plugin.runtime.disk import writing
from msp_plugin.runtime.files import write_json

if TYPE_CHECKING:
    from msp_plugin.records.run import RunRecord


def _console(*, soft_wrap: bool, stderr: bool = False) -> Console:
    """Return a console that reads no text as markup, because paths and names may have brackets."""
    return Console(stderr=stderr, soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False)


#: For results, on stdout.
out = _console(soft_wrap=True)
#: For tables with long cells, which wrap at the terminal's width.
table = _console(soft_wrap=False)
#: For progress, logs and errors, on stderr.
err = _console(soft_wrap=True, stderr=True)


class _LogLines(logging.Handler):
    """Writes each message on one line; RichHandler breaks and pads lines, so that paths cannot be copied from a file."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(self.format(record))


def set_up_logs(verbose: bool, rank: int = 0) -> None:
    """Send our log to stderr: one line per step if ``verbose``, else warnings; ranks after the first log only errors."""
    least, form = logging.ERROR if rank else logging.WARNING, "%(message)s"
    handler: logging.Handler = RichHandler(console=err, show_path=False, show_time=verbose)
    if not err.is_terminal:
        handler, form = _LogLines(), f"{'%(asctime)s ' if verbose else ''}%(levelname)s: {form}"
    logging.basicConfig(level=least, format=form, handlers=[handler], force=True)
    logging.getLogger("msp_plugin").setLevel(logging.INFO if verbose and not rank else least)
    # A download from the hub, whose own bars are off, must not look like a standstill.
    for name in ("msp_plugin.checkpoint.load", "msp_plugin.data.sources"):
        logging.getLogger(name).setLevel(least if rank else logging.INFO)
    if not verbose:
        warnings.filterwarnings("ignore", module="transformers")
        logging.getLogger("torch").setLevel(logging.ERROR)


class _Record(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


_R = TypeVar("_R", bound=_Record)


def deliver(record: _R, out: Path | None, as_json: bool, show: Callable[[_R], None]) -> None:
    """Print a record, as JSON or as the table that ``show`` prints, then write it to ``out``, if that is given.

    Raises:
        OutputError: the file cannot be written; the record is printed nevertheless.
    """
    if as_json:
        typer.echo(json.dumps(record.to_dict(), indent=2, sort_keys=True))
    else:
        show(record)
    if out is None:
        return
    with writing(out):
        write_json(out, record.to_dict())
    if not as_json:
        typer.echo(f"Written: {out}")


@contextmanager
def progress_bars(show: bool = True) -> Iterator[StepProgress]:
    """Yield a StepProgress: a bar per step on a terminal, else lines (see ProgressLines)."""
    if not show:
        yield no_progress
        return
    if not err.is_terminal:
        yield ProgressLines(err.print)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, Any] = {}

        def report(step: str, done: int, total: int, note: str = "") -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total, note=note)
            bars.update(tasks[step], completed=done, total=total, note=note)

        yield report


def number(value: float | None) -> str:
    """Return a perplexity as text: three decimals below 1,000 and none above; - for None."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "inf"
    return f"{value:,.3f}" if value < 1000 else f"{value:,.0f}"


def nats(value: float | None) -> str:
    """Return a loss as text; records hold None for a loss that is not finite."""
    return "not finite" if value is None else f"{value:.4f}"


def quality_table(record: RunRecord, title: str) -> Table:
    """Return the table of a run: zeros and test perplexity of each model that was measured."""
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    table.add_column("zeros", justify="right")
    table.add_column("test perplexity", justify="right")
    table.add_column("loss over dense", justify="right")
    dense = record.perplexity.get("dense")
    sparsities = {stage.name: stage.sparsity for stage in record.stages}
    for name, value in record.perplexity.items():
        if value is None:
            continue
        stage = {"mixed": "prune", "result": "prune", "recovered": "recover"}.get(name, name)
        zeros = sparsities.get(stage, None if name == "dense" else record.sparsity.achieved)
        more = math.log(value / dense) if dense and math.isfinite(value) and name != "dense" else None
        table.add_row(
            name,
            "-" if zeros is None else f"{100 * zeros:.2f} %",
            number(value),
            "-" if more is None else f"{more:+.3f} nats",
        )
    return table
