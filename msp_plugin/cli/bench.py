"""``msp bench``: compare a checkpoint's speed and memory with its dense form's, or with another's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msp_plugin.cli.arguments import AsJson, Dtype, Verbose, resolve_model

if TYPE_CHECKING:
    from msp_plugin.serving.bench import BenchRecord


def bench_command(
    source: Annotated[
        Path, typer.Argument(help="checkpoint that `msp export` wrote: packed, or any with --against")
    ],
    against: Annotated[
        str | None,
        typer.Option(
            help="dense model, e.g. the one that a smaller one was cut from; default: its dense form"
        ),
    ] = None,
    dtype: Dtype = "auto",
    batch: Annotated[int, typer.Option(help="sequences at once")] = 1,
    prompt: Annotated[int, typer.Option(help="tokens of each prompt")] = 256,
    tokens: Annotated[int, typer.Option(help="tokens decoded after it")] = 32,
    repeats: Annotated[int, typer.Option(help="measurements of each form; the median is shown")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="default: torch's")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="file for the results, e.g. bench.json")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure how fast a checkpoint generates on this CPU, and in how much memory, beside its dense form or another one.

    A report shows the figures where they lie beside its run as bench.json.

    Example: msp bench llama-75-packed --out llama-75-packed/bench.json
    """
    from msp_plugin.cli.console import deliver, set_up_logs

    set_up_logs(verbose)
    import torch

    from msp_plugin.runtime.disk import check_new
    from msp_plugin.runtime.files import expanded
    from msp_plugin.serving.bench import BenchOptions, bench

    options = BenchOptions(dtype, batch, prompt, tokens, repeats)
    if out is not None:
        out = expanded(out)
        check_new(out)
    if threads is not None:
        torch.set_num_threads(threads)
    record = bench(source, options, against=None if against is None else resolve_model(against))
    deliver(record, out, as_json, _show)


def _show(record: BenchRecord) -> None:
    """Print the table of a measurement."""
    from rich import box
    from rich.table import Table

    from msp_plugin.cli import console

    kernels = (
        ", ".join(f"{n} layers on {kernel}" for kernel, n in record.kernels.items()) or "no packed layers"
    )
    title = f"{record.model}: {kernels}; {record.machine['threads']} threads of {record.machine['processor']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    headings = ("packed", "dense") if record.against is None else ("this", "against")
    for heading in ("", *headings, "ratio"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    rows = {
        "bytes": ("MiB of tensors", 2**20),
        "resident": ("MiB resident", 2**20),
        "prefill": ("prefill, tokens/s", 1),
        "decode": ("decode, tokens/s", 1),
    }
    for name, (label, unit) in rows.items():
        values = (getattr(record.own, name), getattr(record.other, name))
        cells = ["-" if value is None else f"{value / unit:,.1f}" for value in values]
        ratio = record.ratios.get(name)
        table.add_row(label, *cells, "-" if ratio is None else f"{ratio:.2f}")
    console.table.print(table)
