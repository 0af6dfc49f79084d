"""``msp demo``, ``msp run`` and ``msp prune``: whole runs."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from msp_plugin.cli.arguments import (
    AllocatorName,
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
    Method,
    Model,
    Offload,
    Out,
    Protect,
    Remote,
    SearchData,
    Seed,
    Set,
    Targets,
    TestCount,
    TestData,
    Verbose,
    component_options,
    layer_options,
    recipe_options,
    resolve_model,
)


def _show_run(run: Any, as_json: bool, title: str) -> None:
    from msp_plugin.cli.console import out, quality_table
    from msp_plugin.report.statistics import taken_back

    if run is None:  # another rank has it
        return
    if as_json:
        typer.echo(json.dumps(run.record, indent=2, sort_keys=True))
        return
    out.print(quality_table(run.record, title))
    back = taken_back(*(run.record["perplexity"].get(name) for name in ("dense", "uniform", "mixed")))
    if back is not None:
        out.print(f"Mixed takes back {100 * back:.0f} % of the loss that uniform adds.")
    out.print(f"Results: {run.path}")


def demo(
    out: Out = Path("msp-demo"),
    model: Annotated[str, typer.Option("--model", help="qwen2 or llama")] = "qwen2",
    method: Method = "sparsegpt",
    levels: Levels = None,
    seed: Seed = 0,
    fresh: Fresh = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Prune the embedded demo model to 75 %, uniform and mixed, and compare them.

    Needs no download. Example: msp demo --out demo-run
    """
    from msp_plugin.cli.console import progress_bars, set_up_logs
    from msp_plugin.runtime.ranks import join

    ranks = join()
    set_up_logs(verbose, ranks.rank)
    from msp_plugin.demo import demo_text
    from msp_plugin.hosts.llm_compressor.recipe import our_line, read_recipe
    from msp_plugin.runs.prune import run_recipe

    recipe = read_recipe(files("msp_plugin.demo") / "recipe.yaml")
    our_line(recipe).update(method=method, seed=seed)
    if levels:
        our_line(recipe)["levels"] = levels.split(",")
    with progress_bars(not as_json and not ranks.rank) as progress:
        run = run_recipe(
            recipe, resolve_model(f"demo:{model}"), demo_text(), out, dtype="float32", fresh=fresh,
            progress=progress, ranks=ranks,
        )  # fmt: skip
    _show_run(run, as_json, f"Demo {model} at 75 %, method {method}")


def run_command(
    recipe: Annotated[Path, typer.Argument(help="recipe of llm-compressor, YAML or JSON")],
    model: Annotated[str, typer.Option("--model", help="model directory, hub id, or demo:llama")],
    data: Data,
    out: Out,
    search_data: SearchData = None,
    test_data: TestData = None,
    samples: Count = None,
    length: Length = None,
    test_samples: TestCount = 32,
    text_column: Column = "text",
    bos: Bos = None,
    batch: Batch = 1,
    dtype: Dtype = "auto",
    baseline: Annotated[bool, typer.Option(help="also prune uniformly, to compare")] = True,
    trust_remote_code: Remote = False,
    offload: Offload = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run any recipe of llm-compressor, ours included.

    Example: msp run recipes/llama-3.1-8b-75.yaml --model meta-llama/Llama-3.1-8B --data c4.jsonl --out out
    """
    from msp_plugin.cli.console import progress_bars, set_up_logs
    from msp_plugin.runtime.ranks import join

    ranks = join()
    set_up_logs(verbose, ranks.rank)
    from msp_plugin.data.samples import Text
    from msp_plugin.runs.prune import run_recipe

    text = Text(data, search_data, test_data, samples, length, test_samples, text_column, batch, bos=bos)
    with progress_bars(not as_json and not ranks.rank) as progress:
        run = run_recipe(
            recipe, resolve_model(model), text, out, dtype=dtype, baseline=baseline,
            trust_remote_code=trust_remote_code, offload=offload, fresh=fresh, progress=progress, ranks=ranks,
        )  # fmt: skip
    _show_run(run, as_json, f"{recipe.name} on {model}")


def prune(
    model: Model,
    data: Data,
    out: Out,
    sparsity: Annotated[
        str | None, typer.Option("--sparsity", "-s", help="share of zeros, e.g. 0.75")
    ] = None,
    method: Method = "sparsegpt",
    allocation: Annotated[str | None, typer.Option("--allocation", help="finished allocation.json")] = None,
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
    test_data: TestData = None,
    samples: Count = None,
    length: Length = None,
    test_samples: TestCount = 32,
    text_column: Column = "text",
    bos: Bos = None,
    batch: Batch = 1,
    dtype: Dtype = "auto",
    baseline: Annotated[bool, typer.Option(help="also prune uniformly, to compare")] = True,
    trust_remote_code: Remote = False,
    offload: Offload = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Prune a model to a searched (or given) allocation, without writing a recipe.

    Example: msp prune Qwen/Qwen2.5-7B -s 0.75 --data c4.jsonl --test-data wiki.txt --out qwen-75
    """
    from msp_plugin.cli.console import progress_bars, set_up_logs
    from msp_plugin.runtime.ranks import join

    ranks = join()
    set_up_logs(verbose, ranks.rank)
    from msp_plugin.data.samples import Text
    from msp_plugin.plugins.manager import Plugins
    from msp_plugin.runs.prune import prune_recipe, run_recipe

    estimators = Plugins().components["estimators"]
    specs = component_options(options, estimators, method=method, allocator=allocator)
    given = recipe_options(sparsity, levels, target, ignore, seed, cache, specs)
    given |= layer_options(granularity, bounds, protect)
    recipe = prune_recipe({**given, "allocation": allocation})
    text = Text(data, search_data, test_data, samples, length, test_samples, text_column, batch, bos=bos)
    with progress_bars(not as_json and not ranks.rank) as progress:
        run = run_recipe(
            recipe, resolve_model(model), text, out, dtype=dtype, baseline=baseline,
            trust_remote_code=trust_remote_code, offload=offload, fresh=fresh, progress=progress, ranks=ranks,
        )  # fmt: skip
    _show_run(run, as_json, f"{model}, method {method}")
