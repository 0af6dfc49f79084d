"""``msp compare``: allocators side by side on one level database."""

from __future__ import annotations

import importlib.util
import json
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from msp_plugin.cli.arguments import (
    AsJson,
    Batch,
    Bos,
    BoundsOf,
    Cache,
    Column,
    Count,
    Data,
    Dtype,
    Fresh,
    Granularity,
    Ignore,
    Length,
    Levels,
    Model,
    Offload,
    Out,
    Protect,
    Remote,
    SearchData,
    Targets,
    TestCount,
    TestData,
    Verbose,
    component_options,
    layer_options,
    resolve_model,
)

#: One of each kind that is cheap enough for a first look; `msp plugins` lists the others.
DEFAULT = "uniform,owl,alphapruning,dlp,lsa,one_shot,knapsack,search"


def compare_command(
    model: Model,
    data: Data,
    out: Out,
    sparsity: Annotated[str, typer.Option("--sparsity", "-s", help="comma list of shares of zeros")] = "0.75",
    methods: Annotated[str, typer.Option("--methods", "-m", help="comma list")] = "sparsegpt",
    allocators: Annotated[
        str,
        typer.Option(
            "--allocators",
            help="comma list; options in brackets: knapsack[surrogate=kl]; the default has no one_shot with --offload",
        ),
    ] = DEFAULT,
    seeds: Annotated[str, typer.Option("--seeds", help="comma list; of allocators that use one")] = "0",
    prune: Annotated[
        bool, typer.Option(help="prune to each allocation, or measure the level database's weights only")
    ] = True,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="option by component name, e.g. search.tokens=8192 or sparsegpt.block_size=64"
        ),
    ] = None,
    levels: Levels = None,
    target: Targets = None,
    ignore: Ignore = None,
    granularity: Granularity = None,
    bounds: BoundsOf = None,
    protect: Protect = None,
    cache: Cache = None,
    search_data: SearchData = None,
    test_data: TestData = None,
    samples: Count = None,
    length: Length = None,
    test_samples: TestCount = 32,
    text_column: Column = "text",
    bos: Bos = None,
    batch: Batch = 1,
    dtype: Dtype = "auto",
    trust_remote_code: Remote = False,
    offload: Offload = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Compare allocators on one model: the same text, level database and budget for all of them.

    Leaves compare.json and report.html. Example: msp compare Qwen/Qwen2.5-7B -s 0.625,0.75 --methods
    sparsegpt,wanda --allocators uniform,owl,evopress,search --data c4.jsonl --test-data wiki.txt --out cmp
    """
    from msp_plugin.cli import console
    from msp_plugin.runtime.ranks import join

    ranks = join()
    console.set_up_logs(verbose, ranks.rank)
    from msp_plugin.data.samples import Text
    from msp_plugin.errors import MSPError, RecipeError
    from msp_plugin.plugins.manager import Plugins
    from msp_plugin.runs.compare import compare
    from msp_plugin.runs.grid import Matrix, parse_allocators, parse_sparsities
    from msp_plugin.runtime.disk import writing
    from msp_plugin.runtime.files import output_directory, write_json
    from msp_plugin.runtime.locks import sole_run

    if offload and allocators == DEFAULT:  # its sensitivity needs the whole model in memory
        allocators = DEFAULT.replace("one_shot,", "")
    names = parse_allocators(allocators)
    roles = {spec if isinstance(spec, str) else spec["name"] for spec in names.values()}
    pruners = [part.strip() for part in methods.split(",") if part.strip()]
    roles |= set(pruners)
    given = component_options(options, Plugins().components["estimators"], **{role: role for role in roles})
    try:
        numbers = [int(part) for part in seeds.split(",") if part.strip()]
    except ValueError:
        raise RecipeError(f"seeds {seeds!r} are no numbers", hint="write e.g. --seeds 0,1,2") from None
    estimators = {role: spec for role, spec in given.items() if role not in roles} or None
    shared = {
        "levels": levels, "targets": target, "ignore": ignore, "cache": cache, "estimators": estimators,
    }  # fmt: skip
    matrix = Matrix(
        parse_sparsities(sparsity),
        [given[name] for name in pruners],
        {label: _spec(spec, given) for label, spec in names.items()},
        numbers,
        {key: value for key, value in shared.items() if value is not None}
        | layer_options(granularity, bounds, protect),
        prune,
    )
    text = Text(data, search_data, test_data, samples, length, test_samples, text_column, batch, bos=bos)
    with ExitStack() as stack:
        path = finals = None

        def begin() -> None:
            nonlocal path, finals
            path, finals = stack.enter_context(sole_run(out, cache, fresh=fresh))

        ranks.on_rank_zero(begin)
        with console.progress_bars(not as_json and not ranks.rank) as progress:
            record = compare(
                resolve_model(model), text, matrix, dtype=dtype, trust_remote_code=trust_remote_code,
                offload=offload, fresh=fresh, finals=finals, progress=progress, ranks=ranks,
            )  # fmt: skip
        if record is None:
            return
        with writing(path), output_directory(path) as temporary:
            write_json(temporary / "compare.json", record)
            has_report = all(map(importlib.util.find_spec, ("matplotlib", "jinja2")))
            failure = _write_report(temporary) if has_report else None
    if as_json:
        typer.echo(json.dumps(record, indent=2, sort_keys=True))
    else:
        for table in comparison_tables(record, model):
            console.table.print(table)
    errors = [row["error"] for row in record["rows"] if row["error"]]
    if len(errors) == len(record["rows"]):
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
        console.err.print(f"{len(errors)} of {len(record['rows'])} rows failed; see {out}/compare.json")
    missing = "" if has_report else " (no report: pip install 'msp_plugin[report]')"
    console.out.print(f"Results: {out}{missing}")


def _spec(spec: str | dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    return given[spec] if isinstance(spec, str) else {**given[spec["name"]], **spec}


def _write_report(folder: Path) -> Exception | None:
    """Write report.html beside compare.json, which must not be lost: return the error if that fails."""
    from msp_plugin.report import write_report

    try:
        write_report(folder, folder / "report.html")
    except Exception as error:  # a plugin's section, or a bug
        return error
    return None


def comparison_tables(record: dict[str, Any], title: str) -> list[Any]:
    """Return one table per method and sparsity: the allocators in the order of their KL."""
    from rich.table import Table

    from msp_plugin.report.statistics import deviation
    from msp_plugin.runs.compare import cells

    tables = []
    for (method, sparsity), allocators in cells(record["rows"]).items():
        table = Table(title=f"{title}, {method}, {float(sparsity):.4g} zeros", title_justify="left")
        table.add_column("allocator", overflow="fold")  # a label that is cut could be another's
        for heading in ("perplexity", "KL, nats", "+-", "tokens, with sensitivities", "seconds", "seeds"):
            table.add_column(heading, justify="right")

        def mean(rows: Any, key: str) -> float:
            found = [row[key] for row in rows]  # a mean without the seeds that are not finite would flatter
            return float("inf") if None in found else sum(found) / len(found)

        for label, rows in sorted(allocators.items(), key=lambda item: mean(item[1], "kl")):
            kl = [row["kl"] for row in rows if row["kl"] is not None]
            table.add_row(
                label, f"{mean(rows, 'perplexity'):.2f}", f"{mean(rows, 'kl'):.4f}",
                "" if deviation(kl) is None else f"{deviation(kl):.4f}",
                f"{mean(rows, 'forward_tokens') + mean(rows, 'sensitivity_tokens'):,.0f}",
                f"{mean(rows, 'seconds'):.1f}", str(len(rows)),
            )  # fmt: skip
        tables.append(table)
    return tables
