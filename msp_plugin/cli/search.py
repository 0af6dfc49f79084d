"""``msp allocate`` and ``msp sensitivity``: the steps before pruning."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from msp_plugin.cli.arguments import (
    AllocatorName,
    AsJson,
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
    Method,
    Model,
    Offload,
    Protect,
    Remote,
    SearchData,
    Seed,
    Set,
    Sparsity,
    Targets,
    Verbose,
    component_options,
    layer_options,
    recipe_options,
    resolve_model,
)


def allocate_command(
    model: Model,
    sparsity: Sparsity,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="the allocation file to write")] = Path(
        "allocation.json"
    ),
    method: Method = "sparsegpt",
    levels: Levels = None,
    allocator: AllocatorName = "search",
    options: Set = None,
    target: Targets = None,
    ignore: Ignore = None,
    granularity: Granularity = None,
    bounds: BoundsOf = None,
    protect: Protect = None,
    seed: Seed = 0,
    cache: Cache = None,
    search_data: SearchData = None,
    samples: Count = None,
    length: Length = None,
    text_column: Column = "text",
    bos: Bos = None,
    dtype: Dtype = "auto",
    trust_remote_code: Remote = False,
    offload: Offload = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Search an allocation and write it; `msp prune --allocation` or a recipe uses it later.

    Example: msp allocate Qwen/Qwen2.5-7B -s 0.75 --data c4.jsonl --out allocation.json
    """
    from rich.table import Table

    from msp_plugin.cli import console
    from msp_plugin.runtime.ranks import join

    ranks = join()
    console.set_up_logs(verbose, ranks.rank)
    from msp_plugin.data.samples import Text
    from msp_plugin.plugins.manager import Plugins
    from msp_plugin.runs.prune import search_allocation
    from msp_plugin.runtime.disk import writing
    from msp_plugin.runtime.files import write_text
    from msp_plugin.runtime.locks import sole_output
    from msp_plugin.search.options import Options

    estimators = Plugins().components["estimators"]
    specs = component_options(options, estimators, method=method, allocator=allocator)
    given = recipe_options(sparsity, levels, target, ignore, seed, cache, specs)
    chosen = Options.parse(given | layer_options(granularity, bounds, protect))
    # of a short text as many samples stay unseen as `msp prune` tests with afterwards
    unseen = 0 if samples else Text.test_samples
    text = Text(data, search_data, None, samples, length, unseen, text_column, bos=bos)
    out = out.expanduser()
    with ExitStack() as stack:
        ranks.first(lambda: stack.enter_context(sole_output(out, cache, file=True)) and None)
        progress = stack.enter_context(console.progress_bars(not as_json and not ranks.rank))
        outcome = search_allocation(
            chosen, resolve_model(model), text, dtype=dtype, trust_remote_code=trust_remote_code,
            offload=offload, fresh=fresh, progress=progress, ranks=ranks,
        )  # fmt: skip
        ranks.leave()
        if ranks.rank:
            return
        with writing(out):
            write_text(out, outcome.allocation.to_json())
    if as_json:
        typer.echo(
            json.dumps({"allocation": outcome.allocation.to_dict(), "search": outcome.search}, indent=2)
        )
        return
    table = Table(title=f"{model} at {sparsity}", title_justify="left")
    for heading in ("unit", "level", "weights"):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for unit, level in zip(outcome.allocation.table, outcome.allocation.levels, strict=True):
        table.add_row(unit.name, level.name, f"{unit.weights:,}")
    console.out.print(table)
    if outcome.search.get("loss") is not None:
        loss, uniform = (console.nats(outcome.search[name]) for name in ("loss", "uniform_loss"))
        console.out.print(f"search loss {loss} (uniform {uniform}) nats per token")
    console.out.print(f"Written: {out}")


def sensitivity(
    model: Model,
    data: Data,
    estimator: Annotated[str, typer.Option("--estimator", help="see `msp plugins`")] = "fisher",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="option of the estimator, e.g. estimator.samples=32")
    ] = None,
    target: Targets = None,
    ignore: Ignore = None,
    samples: Count = None,
    length: Length = None,
    text_column: Column = "text",
    bos: Bos = None,
    dtype: Dtype = "auto",
    trust_remote_code: Remote = False,
    offload: Offload = False,
    cache: Cache = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure the sensitivity of every unit; what the cache holds of it is not measured again.

    Example: msp sensitivity Qwen/Qwen2.5-7B --data c4.jsonl --json > fisher.json
    """
    from rich.table import Table

    from msp_plugin.cli import console

    console.set_up_logs(verbose)
    from msp_plugin.checkpoint.load import load
    from msp_plugin.checkpoint.quantized import check_source_unquantized
    from msp_plugin.data.samples import Text, load_split
    from msp_plugin.models.device import on_best_device
    from msp_plugin.models.layers import prunable_layers
    from msp_plugin.models.source import load_tokenizer
    from msp_plugin.plugins.manager import Plugins, spec_of
    from msp_plugin.search.measurements import Measurements

    plugins = Plugins()
    spec = component_options(options, estimator=estimator)["estimator"]
    if samples and "samples" in plugins.options("estimators", estimator):
        spec = {"samples": samples, **spec}
    built = plugins.build("estimators", spec)
    source = resolve_model(model)
    check_source_unquantized(source, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    wanted = Text(data, samples=samples, length=length, test_samples=0, column=text_column, bos=bos)
    text = load_split(tokenizer, wanted.for_model(source, trust_remote_code=trust_remote_code))
    loaded = load(source, dtype, trust_remote_code=trust_remote_code, offload=offload, cache=cache)
    units = prunable_layers(loaded, target or ("Linear",), ignore or ())
    with console.progress_bars(not as_json) as progress, on_best_device(loaded):
        held = Measurements(
            loaded, units, (), None, text, {estimator: built}, cache, progress=progress, fresh=fresh
        )  # fmt: skip
        values = held.sensitivity(estimator)
    rows = [
        {"unit": u.name, "weights": u.weights, "sensitivity": v, "per_weight": v / u.weights}
        for u, v in zip(units, values, strict=True)
    ]
    if as_json:
        typer.echo(json.dumps({"estimator": spec_of(built), "units": rows}, indent=2))
        return
    table = Table(title=f"{estimator}, {model}", title_justify="left")
    table.add_column("unit")
    for heading in ("weights", "sensitivity", "per weight"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["unit"], f"{row['weights']:,}", f"{row['sensitivity']:.4g}", f"{row['per_weight']:.4g}"
        )
    console.out.print(table)
