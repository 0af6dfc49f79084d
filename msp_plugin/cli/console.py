"""What the command line shows: progress, tables, errors."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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

from msp_plugin.allocate import StepProgress

#: Results go to stdout, everything about the way there to stderr.
out = Console(highlight=False, soft_wrap=True)
#: For tables with long cells: these are folded at the terminal's width.
table = Console(highlight=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def set_up_logs(verbose: bool, rank: int = 0) -> None:
    """Send our log to stderr: one line per step if asked for, else warnings; of other ranks, errors."""
    handler = RichHandler(console=err, show_path=False, show_time=verbose)
    least = logging.ERROR if rank else logging.WARNING
    logging.basicConfig(level=least, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("msp_plugin").setLevel(logging.INFO if verbose and not rank else least)
    if not verbose:
        warnings.filterwarnings("ignore", module="transformers")
        logging.getLogger("torch").setLevel(logging.ERROR)


@contextmanager
def progress_bars(show: bool = True) -> Iterator[StepProgress]:
    """Yield a StepProgress: a bar per step on a terminal, else a line when a step is done."""
    if not show:
        yield lambda step, done, total: None
        return
    if not err.is_terminal:
        yield lambda step, done, total: err.print(f"{step}: {total}") if done == total else None
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, Any] = {}

        def report(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield report


def number(value: float | None) -> str:
    """Return a perplexity as people read it."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "inf"
    return f"{value:,.3f}" if value < 1000 else f"{value:,.0f}"


def nats(value: float | None) -> str:
    """Return a loss as people read it; None is one that is not finite."""
    return "not finite" if value is None else f"{value:.4f}"


def quality_table(record: dict[str, Any], title: str) -> Table:
    """Return the table of a run: zeros and test perplexity of dense, uniform and mixed."""
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    table.add_column("zeros", justify="right")
    table.add_column("test perplexity", justify="right")
    table.add_column("loss over dense", justify="right")
    quality, dense = record["perplexity"], record["perplexity"].get("dense")
    for name, value in quality.items():
        if value is None:
            continue
        zeros = 0.0 if name == "dense" else record.get("sparsity", {}).get("achieved")
        more = math.log(value / dense) if dense and math.isfinite(value) and name != "dense" else None
        table.add_row(
            name,
            "-" if zeros is None else f"{100 * zeros:.2f} %",
            number(value),
            "-" if more is None else f"{more:+.3f} nats",
        )
    return table
