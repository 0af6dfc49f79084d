"""``msp compare``: compare allocators on one level database."""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
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
    recovery_spec,
    with_groups,
)

if TYPE_CHECKING:
    from rich.table import Table

    from msp_plugin.records.comparison import ComparedRow, CompareRecord
    from msp_plugin.runs.grid import Grid

#: The cheapest allocators of each kind; `msp plugins` lists the others.
DEFAULT = "uniform,owl,alphapruning,dlp,lsa,one_shot,knapsack,search"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Options for the cells of a comparison."""

    sparsity: Annotated[str, typer.Option("--sparsity", "-s", help="comma list of shares of zeros")] = "0.75"
    methods: Annotated[str, typer.Option("--methods", "-m", help="comma list")] = "sparsegpt"
    allocators: Annotated[
        str,
        typer.Option(
            "--allocators",
            help="comma list; name@label gives one its own options; with --offload the default leaves out one_shot",
        ),
    ] = DEFAULT
    seeds: Annotated[str, typer.Option("--seeds", help="comma list; for allocators that use a seed")] = "0"
    prune: Annotated[
        bool, typer.Option(help="prune to each allocation, or only measure the level database's weights")
    ] = True
    recover: Annotated[
        str | None,
        typer.Option(
            "--recover", help="recovery of every pruned model; its options: --set NAME.option=value"
        ),
    ] = None
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="option by name or label, e.g. search.tokens=8192, knapsack@kl.surrogate=kl, sparsegpt.block_size=64",
        ),
    ] = None

    def grid(self, keys: dict[str, Any], *, offload: bool) -> Grid:
        """Return the grid of a comparison.

        Args:
            keys: further keys of the recipe line of every cell.
            offload: leave out the default allocator one_shot, whose sensitivity needs the whole model in memory.

        Raises:
            RecipeError: a name is given twice, a seed is not a number, or an option is for a name not compared.
        """
        from msp_plugin.errors import RecipeError
        from msp_plugin.plugins.manager import Plugins
        from msp_plugin.runs.grid import Grid, parse_allocators, parse_sparsities

        allocators = self.allocators
        if offload and allocators == DEFAULT:
            allocators = DEFAULT.replace("one_shot,", "")
        labels = parse_allocators(allocators)
        pruners = [part.strip() for part in self.methods.split(",") if part.strip()]
        roles = labels | {name: name for name in (*labels.values(), *pruners)}
        recover, pairs = recovery_spec(self.recover, self.options)
        specs = component_options(pairs, Plugins().components["estimators"], **roles)
        try:
            numbers = [int(part) for part in self.seeds.split(",") if part.strip()]
        except ValueError:
            raise RecipeError(
                f"seeds {self.seeds!r} are not numbers", hint="write e.g. --seeds 0,1,2"
            ) from None
        estimators = {role: spec for role, spec in specs.items() if role not in roles}
        return Grid(
            parse_sparsities(self.sparsity),
            [specs[name] for name in pruners],
            {label: {**specs[name], **specs[label]} for label, name in labels.items()},
            numbers,
            {**keys, **given(estimators=estimators)},
            self.prune,
            recover,
        )


@with_groups
def compare_command(
    model: Model,
    out: Out,
    text: RunText,
    layers: LayerChoice,
    loading: Loading,
    output: Output,
    compared: Compared,
    cache: Cache = None,
) -> None:
    """Compare allocators on one model: the same text, level database and budget for all of them.

    Writes compare.json and report.html. Example: msp compare Qwen/Qwen2.5-7B -s 0.625,0.75 --methods
    sparsegpt,wanda --allocators uniform,owl,evopress,search --data c4.jsonl --test-data wiki.txt --out cmp
    """
    from msp_plugin.cli import console

    with output.running() as context, ExitStack() as stack:
        from msp_plugin.runs.compare import compare
        from msp_plugin.runtime.locks import sole_run

        grid = compared.grid(given(cache=cache, **layers.recipe()), offload=loading.offload)
        path, finals = context.ranks.on_rank_zero(
            lambda: stack.enter_context(sole_run(out, cache, fresh=context.fresh))
        )
        record = compare(loading.source(model, cache), text.text(), grid, finals=finals, context=context)
        if record is None:
            return
        has_report = all(map(importlib.util.find_spec, ("matplotlib", "jinja2")))
        failure = _write(record, path, with_report=has_report)
    if output.as_json:
        typer.echo(json.dumps(record.to_dict(), indent=2, sort_keys=True))
    else:
        for table in comparison_tables(record, model):
            console.table.print(table)
    _check_written(record, failure, out)
    if output.as_json:
        return
    if errors := [row.error for row in record.rows if row.error]:
        console.err.print(f"{len(errors)} of {len(record.rows)} rows failed; see {out}/compare.json")
    missing = "" if has_report else " (no report: pip install 'msp_plugin[report]')"
    console.out.print(f"Results: {out}{missing}")


def _write(record: CompareRecord, path: Path, *, with_report: bool) -> Exception | None:
    """Write compare.json and the report; return the report's error, which must not cost compare.json.

    Raises:
        OutputError: the directory cannot be written.
    """
    from msp_plugin.runtime.disk import writing
    from msp_plugin.runtime.files import output_directory

    with writing(path), output_directory(path) as temporary:
        record.write(temporary / record.FILE)
        return _write_report(temporary) if with_report else None


def _check_written(record: CompareRecord, failure: Exception | None, out: Path) -> None:
    """Raise MSPError if no row has a result, or if the report has failed."""
    from msp_plugin.errors import MSPError

    errors = [row.error for row in record.rows if row.error]
    if len(errors) == len(record.rows):
        raise MSPError(
            f"no row has a result; the first error: {errors[0]}", hint=f"all are in {out}/compare.json"
        )
    if failure is not None:
        raise MSPError(
            f"{out}/compare.json is complete, but the report failed: {failure}",
            hint=f"repair that, then: msp report {shlex.quote(str(out))}",
        ) from failure


def _write_report(folder: Path) -> Exception | None:
    """Write report.html beside compare.json; return the error if that fails."""
    from msp_plugin.report import write_report

    try:
        write_report(folder, folder / "report.html")
    except Exception as error:  # a plugin's section, or a bug
        return error
    return None


def comparison_tables(record: CompareRecord, title: str) -> list[Table]:
    """Return one table per method and sparsity: the allocators in the order of their KL."""
    from rich.table import Table

    from msp_plugin.records.statistics import deviation
    from msp_plugin.runs.compare import cells

    tables = []
    for (method, sparsity), allocators in cells(record.rows).items():
        table = Table(title=f"{title}, {method}, {float(sparsity):.4g} zeros", title_justify="left")
        table.add_column("allocator", overflow="fold")  # cut labels could look alike
        for heading in ("perplexity", "KL, nats", "+-", "tokens, with sensitivities", "seconds", "seeds"):
            table.add_column(heading, justify="right")
        for label, rows in sorted(allocators.items(), key=lambda item: _mean(item[1], "kl")):
            spread = deviation(row.kl for row in rows)
            tokens = _mean(rows, "forward_tokens") + _mean(rows, "sensitivity_tokens")
            table.add_row(
                label,
                f"{_mean(rows, 'perplexity'):.2f}",
                f"{_mean(rows, 'kl'):.4f}",
                "" if spread is None else f"{spread:.4f}",
                f"{tokens:,.0f}",
                f"{_mean(rows, 'seconds'):.1f}",
                str(len(rows)),
            )
        tables.append(table)
        if (name := f"{method} {sparsity}") in record.rank_correlation:
            tables.append(_recovered_table(allocators, record.rank_correlation[name]))
    return tables


def _recovered_table(allocators: Mapping[str, Sequence[ComparedRow]], rho: float | None) -> Table:
    """Return the table of the models after the recovery, in the order of their KL.

    Args:
        rho: rank correlation of the KL before and after.
    """
    from rich.table import Table

    shown = "unknown" if rho is None else f"{rho:.2f}"
    title = f"After the recovery; rank correlation of the KL before and after it: {shown}"
    table = Table(title=title, title_justify="left")
    table.add_column("allocator", overflow="fold")
    for heading in ("perplexity", "KL, nats"):
        table.add_column(heading, justify="right")
    stages = {label: [row.recovered for row in rows] for label, rows in allocators.items()}
    for label, after in sorted(stages.items(), key=lambda item: _mean(item[1], "kl")):
        table.add_row(label, f"{_mean(after, 'perplexity'):.2f}", f"{_mean(after, 'kl'):.4f}")
    return table


def _mean(parts: Sequence[Any], field: str) -> float:
    """Return the mean of a field over seeds; infinite if one is not finite or there, whose omission would flatter."""
    values = [value for part in parts if (value := getattr(part, field, None)) is not None]
    return float("inf") if len(values) < len(parts) else float(sum(values) / len(values))
