"""``msp eval``: what a checkpoint can do, beside its perplexity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msp_plugin.cli.arguments import AsJson, Bos, Column, Dtype, Length, Model, Remote, Verbose, resolve_model

if TYPE_CHECKING:
    from msp_plugin.records.evaluation import EvalRecord


def evaluate_command(
    model: Model,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", "-t", help="comma list of lm-eval's tasks and groups, and of your own"),
    ] = None,
    task_dir: Annotated[
        Path | None, typer.Option("--task-dir", help="directory with YAML files of your own tasks")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", "-d", help="text for perplexity and KL (repeatable)")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="model that is asked the same, e.g. the one before pruning"),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="documents of each task; default: all")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", help="worked examples; default: what each task says")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="requests per forward pass")] = 8,
    samples: Annotated[int, typer.Option("--samples", help="samples of each text")] = 32,
    length: Length = None,
    text_column: Column = "text",
    bos: Bos = None,
    dtype: Dtype = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="file for the results, e.g. eval.json")
    ] = None,
    trust_remote_code: Remote = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Evaluate a checkpoint of any form: lm-eval's tasks, perplexity, and what pruning cost.

    Example: msp eval llama-75 --reference meta-llama/Llama-3.1-8B --tasks arc_easy,hellaswag --data wiki.txt
    """
    from msp_plugin.cli.console import progress_bars, set_up_logs

    set_up_logs(verbose)
    from msp_plugin.evaluation.evaluate import Request, Source, evaluate
    from msp_plugin.runtime.disk import check_new, writing

    models = [
        Source(name, resolve_model(name), dtype, trust_remote_code)
        for name in (model, reference)
        if name is not None
    ]
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    request = Request(
        *models, tasks=names, task_dir=task_dir, limit=limit, num_fewshot=num_fewshot, batch=batch,
        data=tuple(data or ()), samples=samples, length=length, column=text_column, bos=bos,
    )  # fmt: skip
    if out is not None:
        out = out.expanduser()
        check_new(out)
    with progress_bars(not as_json) as progress:
        record = evaluate(request, quiet=not verbose, progress=progress)
    if out is not None:
        with writing(out):
            record.write(out)
    if as_json:
        typer.echo(json.dumps(record.to_dict(), indent=2, sort_keys=True))
    else:
        _show(record)
        if out is not None:
            typer.echo(f"Written: {out}")


def _show(record: EvalRecord) -> None:
    from rich import box
    from rich.table import Table

    from msp_plugin.cli import console

    compared = record.reference is not None
    title = f"Evaluation of {record.model.source}"
    if record.reference is not None:
        title += f" against {record.reference.source}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("task and metric", overflow="fold", min_width=20)
    for heading in (
        "value",
        "stderr",
        *(("reference", "difference", "stderr") if compared else ()),
        "samples",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, metric, *numbers in [*_task_rows(record), *_text_rows(record)]:
        cells = numbers if compared else [*numbers[:2], numbers[-1]]
        table.add_row(f"{name}\n  {metric}", *(f"\n{cell}" for cell in cells))
    console.table.print(table)


def _task_rows(record: EvalRecord) -> list[list[str]]:
    rows = []
    for task, score in record.tasks.items():
        for metric in score.metrics:
            name = metric.name if metric.filter == "none" else f"{metric.name} ({metric.filter})"
            rows.append([
                task, name, _number(metric.value), _number(metric.stderr), _number(metric.reference),
                _number(metric.difference, "+"), _number(metric.difference_stderr), str(score.samples),
            ])  # fmt: skip
    return rows


def _text_rows(record: EvalRecord) -> list[list[str]]:
    """Return a row of the perplexity and, where there is a reference, one of the KL, for each text."""
    rows = []
    for text in record.perplexity:
        value, other, count = text.value, text.reference, str(text.samples)
        more = None if value is None or other is None else value - other
        rows.append([
            str(text.source), "perplexity", _number(value), "-", _number(other), _number(more, "+"), "-", count,
        ])  # fmt: skip
        if record.reference is not None:
            rows.append([str(text.source), "KL in nats", _number(text.kl), "-", "-", "-", "-", count])
    return rows


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"
