"""``msp eval``: scores of a checkpoint on tasks and texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msp_plugin.cli.arguments import (
    AsJson,
    Bos,
    Column,
    Dtype,
    Length,
    Model,
    Remote,
    Verbose,
    resolve_model,
    with_groups,
)

if TYPE_CHECKING:
    from msp_plugin.evaluation.evaluate import Request, Source
    from msp_plugin.records.evaluation import EvalRecord


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Options for the tasks and texts of an evaluation."""

    tasks: Annotated[
        str | None,
        typer.Option("--tasks", "-t", help="comma list of tasks and groups, of lm-eval or your own"),
    ] = None
    task_dir: Annotated[
        Path | None, typer.Option("--task-dir", help="directory with YAML files of your own tasks")
    ] = None
    data: Annotated[
        list[str] | None, typer.Option("--data", "-d", help="text for perplexity and KL (repeatable)")
    ] = None
    limit: Annotated[int | None, typer.Option("--limit", help="documents of each task; default: all")] = None
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", help="worked examples; default: each task's own")
    ] = None
    batch: Annotated[int, typer.Option("--batch", help="requests per forward pass")] = 8
    samples: Annotated[int, typer.Option("--samples", help="samples of each text")] = 32
    length: Length = None
    text_column: Column = "text"
    bos: Bos = None

    def request(self, model: Source, reference: Source | None) -> Request:
        """Return the request of an evaluation."""
        from msp_plugin.evaluation.evaluate import Request

        return Request(
            model,
            reference,
            tasks=tuple(name.strip() for name in (self.tasks or "").split(",") if name.strip()),
            task_dir=self.task_dir,
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            batch=self.batch,
            data=tuple(self.data or ()),
            samples=self.samples,
            length=self.length,
            column=self.text_column,
            bos=self.bos,
        )


@with_groups
def evaluate_command(
    model: Model,
    questions: Questions,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="model to compare with, e.g. the one before pruning"),
    ] = None,
    dtype: Dtype = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="file for the results, e.g. eval.json")
    ] = None,
    trust_remote_code: Remote = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Evaluate a checkpoint in any form: lm-eval tasks, perplexity, and the difference from a reference.

    Example: msp eval llama-75 --reference meta-llama/Llama-3.1-8B --tasks arc_easy,hellaswag --data wiki.txt
    """
    from msp_plugin.cli.console import deliver, progress_bars, set_up_logs

    set_up_logs(verbose)
    from msp_plugin.evaluation.evaluate import Source, evaluate
    from msp_plugin.runtime.disk import check_new
    from msp_plugin.runtime.files import expanded

    def source(name: str) -> Source:
        return Source(name, resolve_model(name), dtype, trust_remote_code)

    request = questions.request(source(model), None if reference is None else source(reference))
    if out is not None:
        out = expanded(out)
        check_new(out)
    done: list[EvalRecord] = []
    try:
        with progress_bars(not as_json) as progress:
            done.append(evaluate(request, quiet=not verbose, progress=progress, so_far=done.append))
    except Exception:  # what was measured before an error is delivered too, but not before a stop
        if done:
            deliver(done[-1], out, as_json, _show)
        raise
    deliver(done[-1], out, as_json, _show)


def _show(record: EvalRecord) -> None:
    """Print the table of an evaluation."""
    from rich import box
    from rich.table import Table

    from msp_plugin.cli import console

    compared = record.reference is not None
    title = f"Evaluation of {record.model.source}"
    if record.reference is not None:
        title += f" against {record.reference.source}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("task and metric", overflow="fold", min_width=20)
    difference = ("reference", "difference", "stderr") if compared else ()
    for heading in ("value", "stderr", *difference, "samples"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, metric, *numbers in [*_task_rows(record), *_text_rows(record)]:
        cells = numbers if compared else [*numbers[:2], numbers[-1]]
        table.add_row(f"{name}\n  {metric}", *(f"\n{cell}" for cell in cells))
    console.table.print(table)


def _task_rows(record: EvalRecord) -> list[list[str]]:
    """Return a row for each task and metric."""
    rows = []
    for task, score in record.tasks.items():
        for metric in score.metrics:
            name = metric.name if metric.filter == "none" else f"{metric.name} ({metric.filter})"
            value, stderr, reference = map(_number, (metric.value, metric.stderr, metric.reference))
            difference = [_number(metric.difference, "+"), _number(metric.difference_stderr)]
            rows.append([task, name, value, stderr, reference, *difference, str(score.samples)])
    return rows


def _text_rows(record: EvalRecord) -> list[list[str]]:
    """Return, for each text, a row of its perplexity and, with a reference, a row of its KL."""
    rows = []
    for text in record.perplexity:
        name, value, reference, count = str(text.source), text.value, text.reference, str(text.samples)
        difference = None if value is None or reference is None else value - reference
        numbers = [_number(value), "-", _number(reference), _number(difference, "+"), "-"]
        rows.append([name, "perplexity", *numbers, count])
        if record.reference is not None:
            rows.append([name, "KL in nats", _number(text.kl), "-", "-", "-", "-", count])
    return rows


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"
