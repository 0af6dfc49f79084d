"""``msp compare``: allocators side by side on one level database."""

from __future__ import annotations

import importlib.util
import json
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msp_plugin.cli.arguments import (
    Cache,
    LayerChoice,
    Loading,
    Model,
    Out,
    Output,
    RunText,
    component_options,
    given,
    with_groups,
)

if TYPE_CHECKING:
    from msp_plugin.records.comparison import CompareRecord
    from msp_plugin.runs.grid import Grid

#: One of each kind that is cheap enough for a first look; `msp plugins` lists the others.
DEFAULT = "uniform,owl,alphapruning,dlp,lsa,one_shot,knapsack,search"


@with_groups
def compare_command(
    model: Model,
    out: Out,
    text: RunText,
    layers: LayerChoice,
    loading: Loading,
    output: Output,
    sparsity: Annotated[str, typer.Option("--sparsity", "-s", help="comma list of shares of zeros")] = "0.75",
    methods: Annotated[str, typer.Option("--methods", "-m", help="comma list")] = "sparsegpt",
    allocators: Annotated[
        str,
        typer.Option(
            "--allocators",
            help="comma list; name@label for one with options of its own; the default has no one_shot with --offload",
        ),
    ] = DEFAULT,
    seeds: Annotated[str, typer.Option("--seeds", help="comma list; of allocators that use one")] = "0",
    prune: Annotated[
        bool, typer.Option(help="prune to each allocation, or measure the level database's weights only")
    ] = True,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="option by name or label, e.g. search.tokens=8192, knapsack@kl.surrogate=kl, sparsegpt.block_size=64",
        ),
    ] = None,
    cache: Cache = None,
) -> None:
    """Compare allocators on one model: the same text, level database and budget for all of them.

    Leaves compare.json and report.html. Example: msp compare Qwen/Qwen2.5-7B -s 0.625,0.75 --methods
    sparsegpt,wanda --allocators uniform,owl,evopress,search --data c4.jsonl --test-data wiki.txt --out cmp
    """
    from msp_plugin.cli import console

    with output.running() as context, ExitStack() as stack:
        from msp_plugin.errors import MSPError
        from msp_plugin.runs.compare import compare
        from msp_plugin.runtime.disk import writing
        from msp_plugin.runtime.files import output_directory
        from msp_plugin.runtime.locks import sole_run

        if loading.offload and allocators == DEFAULT:  # its sensitivity needs the whole model in memory
            allocators = DEFAULT.replace("one_shot,", "")
        keys = given(cache=cache, **layers.recipe())
        grid = _grid(sparsity, methods, allocators, seeds, options, keys, prune)
        path, finals = context.ranks.on_rank_zero(
            lambda: stack.enter_context(sole_run(out, cache, fresh=context.fresh))
        )
        record = compare(loading.source(model, cache), text.text(), grid, finals=finals, context=context)
        if record is None:
            return
        with writing(path), output_directory(path) as temporary:
            record.write(temporary / record.FILE)
            has_report = all(map(importlib.util.find_spec, ("matplotlib", "jinja2")))
            failure = _write_report(temporary) if has_report else None
    as_json = output.as_json
    if as_json:
        typer.echo(json.dumps(record.to_dict(), indent=2, sort_keys=True))
    else:
        for table in comparison_tables(record, model):
            console.table.print(table)
    errors = [row.error for row in record.rows if row.error]
    if len(errors) == len(record.rows):
        raise MSPError(
            f"no row has a result; the first error: {errors[0]}", hint=f"all are in {out}/compare.json"
        )
    if failure is not None:
        raise MSPError(
            f"{out}/compare.json is whole, but no report could be drawn: {failure}",
            hint=f"once that is mended: msp report {shlex.quote(str(out))}",
        ) from failure
    if as_json:
        return
    if errors:
        console.err.print(f"{len(errors)} of {len(record.rows)} rows failed; see {out}/compare.json")
    missing = "" if has_report else " (no report: pip install 'msp_plugin[report]')"
    console.out.print(f"Results: {out}{missing}")


def _grid(
    sparsities: str,
    methods: str,
    allocators: str,
    seeds: str,
    options: list[str] | None,
    keys: dict[str, Any],
    prune: bool,
) -> Grid:
    """Return the comparison that the command line asks for.

    Raises:
        RecipeError: a name twice, seeds that are no numbers, or an option of nothing that is compared.
    """
    from msp_plugin.errors import RecipeError
    from msp_plugin.plugins.manager import Plugins
    from msp_plugin.runs.grid import Grid, parse_allocators, parse_sparsities

    labels = parse_allocators(allocators)
    pruners = [part.strip() for part in methods.split(",") if part.strip()]
    roles = labels | {name: name for name in (*labels.values(), *pruners)}
    specs = component_options(options, Plugins().components["estimators"], **roles)
    try:
        numbers = [int(part) for part in seeds.split(",") if part.strip()]
    except ValueError:
        raise RecipeError(f"seeds {seeds!r} are no numbers", hint="write e.g. --seeds 0,1,2") from None
    estimators = {role: spec for role, spec in specs.items() if role not in roles}
    return Grid(
        parse_sparsities(sparsities),
        [specs[name] for name in pruners],
        {label: {**specs[name], **specs[label]} for label, name in labels.items()},
        numbers,
        {**keys, **given(estimators=estimators)},
        prune,
    )


def _write_report(folder: Path) -> Exception | None:
    """Write report.html beside compare.json, which must not be lost: return the error if that fails."""
    from msp_plugin.report import write_report

    try:
        write_report(folder, folder / "report.html")
    except Exception as error:  # a plugin's section, or a bug
        return error
    return None


def comparison_tables(record: CompareRecord, title: str) -> list[Any]:
    """Return one table per method and sparsity: the allocators in the order of their KL."""
    from rich.table import Table

    from msp_plugin.report.statistics import deviation
    from msp_plugin.runs.compare import cells

    tables = []
    for (method, sparsity), allocators in cells(record.rows).items():
        table = Table(title=f"{title}, {method}, {float(sparsity):.4g} zeros", title_justify="left")
        table.add_column("allocator", overflow="fold")  # a label that is cut could be another's
        for heading in ("perplexity", "KL, nats", "+-", "tokens, with sensitivities", "seconds", "seeds"):
            table.add_column(heading, justify="right")

        def mean(rows: Any, key: str) -> float:
            found = [getattr(row, key) for row in rows]
            # a mean without the seeds that are not finite would flatter
            return float("inf") if None in found else sum(found) / len(found)

        for label, rows in sorted(allocators.items(), key=lambda item: mean(item[1], "kl")):
            kl = [row.kl for row in rows if row.kl is not None]
            table.add_row(
                label, f"{mean(rows, 'perplexity'):.2f}", f"{mean(rows, 'kl'):.4f}",
                "" if deviation(kl) is None else f"{deviation(kl):.4f}",
                f"{mean(rows, 'forward_tokens') + mean(rows, 'sensitivity_tokens'):,.0f}",
                f"{mean(rows, 'seconds'):.1f}", str(len(rows)),
            )  # fmt: skip
        tables.append(table)
    return tables
