"""``msp demo``, ``msp run`` and ``msp prune``: whole runs."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msp_plugin.cli.arguments import (
    AllocatorName,
    Baseline,
    Cache,
    LayerChoice,
    Levels,
    Loading,
    Method,
    Model,
    Out,
    Output,
    RunText,
    Seed,
    Set,
    recipe_line,
    recovery_spec,
    resolve_model,
    with_groups,
)

if TYPE_CHECKING:
    from msp_plugin.runs.steps import Run


def show_run(run: Run | None, as_json: bool, title: str) -> None:
    """Print the table of a run, or with ``as_json`` its record; nothing on ranks after the first."""
    from msp_plugin.cli.console import out, quality_table
    from msp_plugin.records.statistics import taken_back

    if run is None:  # rank 0 prints it
        return
    if as_json:
        typer.echo(json.dumps(run.record.to_dict(), indent=2, sort_keys=True))
        return
    perplexity = run.record.perplexity
    if any(value is not None for value in perplexity.values()):
        out.print(quality_table(run.record, title))
    share = taken_back(*(perplexity.get(name) for name in ("dense", "uniform", "mixed")))
    if share:  # zero for the uniform allocation itself
        out.print(f"Mixed takes back {100 * share:.0f} % of the loss that uniform adds.")
    sparse = "result" if "result" in perplexity else "mixed"
    share = taken_back(*(perplexity.get(name) for name in ("dense", sparse, "recovered")))
    recoveries = [stage for stage in run.record.stages if stage.recovery is not None]
    if share is not None:
        what = "The recovery takes" if len(recoveries) == 1 else f"The {len(recoveries)} recoveries take"
        out.print(f"{what} back {100 * share:.0f} % of the loss that the sparse model had.")
    for note in recoveries[-1].recovery.notes if recoveries and recoveries[-1].recovery else ():
        out.print(f"Note: {note}.")
    out.print(f"Results: {run.path}")


@with_groups
def demo(
    output: Output,
    out: Out = Path("msp-demo"),
    model: Annotated[str, typer.Option("--model", help="qwen2 or llama")] = "qwen2",
    method: Method = "sparsegpt",
    levels: Levels = None,
    seed: Seed = 0,
) -> None:
    """Prune the embedded demo model to 75 %, uniform and mixed, and compare them.

    Needs no download. Example: msp demo --out demo-run
    """
    with output.running() as context:
        from msp_plugin.demo import demo_text
        from msp_plugin.runs.prune import prune as prune_model
        from msp_plugin.runtime.documents import parse_yaml

        recipe = parse_yaml((files("msp_plugin.demo") / "recipe.yaml").read_text(encoding="utf-8"))
        line = recipe["sparsity_stage"]["sparsity_modifiers"]["MixedSparsityModifier"]
        line |= {"method": method, "seed": seed} | ({"levels": levels.split(",")} if levels else {})
        source = resolve_model(f"demo:{model}")
        run = prune_model(source, demo_text(), out, dtype="float32", context=context, **line)
    show_run(run, output.as_json, f"Demo {model} at 75 %, method {method}")


@with_groups
def run_command(
    recipe: Annotated[Path, typer.Argument(help="recipe of llm-compressor, YAML or JSON")],
    model: Annotated[str, typer.Option("--model", help="model directory, hub id, or demo:llama")],
    out: Out,
    text: RunText,
    loading: Loading,
    output: Output,
    baseline: Baseline = True,
) -> None:
    """Run any recipe of llm-compressor, ours included.

    Example: msp run recipes/llama-3.1-8b-75.yaml --model meta-llama/Llama-3.1-8B --data c4.jsonl --out out
    """
    with output.running() as context:
        from msp_plugin.runs.prune import run_recipe

        run = run_recipe(
            recipe,
            resolve_model(model),
            text.text(),
            out,
            baseline=baseline,
            context=context,
            **vars(loading),
        )
    show_run(run, output.as_json, f"{recipe.name} on {model}")


@with_groups
def prune(
    model: Model,
    out: Out,
    text: RunText,
    layers: LayerChoice,
    loading: Loading,
    output: Output,
    sparsity: Annotated[
        str | None,
        typer.Option("--sparsity", "-s", help="share of zeros, e.g. 0.75; not needed with --allocation"),
    ] = None,
    allocation: Annotated[
        str | None, typer.Option("--allocation", help="prune to this allocation.json, without a search")
    ] = None,
    method: Method = "sparsegpt",
    allocator: AllocatorName = "search",
    options: Set = None,
    seed: Seed = 0,
    cache: Cache = None,
    baseline: Baseline = True,
    recover: Annotated[
        str | None,
        typer.Option("--recover", help="recovery to run afterwards; its options: --set NAME.option=value"),
    ] = None,
) -> None:
    """Prune a model to a searched (or given) allocation; needs no recipe and no other framework.

    Example: msp prune Qwen/Qwen2.5-7B -s 0.75 --data c4.jsonl --test-data wiki.txt --out qwen-75
    """
    with output.running() as context:
        from msp_plugin.runs.prune import prune as prune_model

        keys = {"sparsity": sparsity, "allocation": allocation, "seed": seed, "cache": cache}
        spec, others = recovery_spec(recover, options)
        line = recipe_line(method, allocator, others, **keys, **layers.recipe())
        run = prune_model(
            resolve_model(model),
            text.text(),
            out,
            baseline=baseline,
            recover=spec,
            context=context,
            **vars(loading),
            **line,
        )
    show_run(run, output.as_json, f"{model}, method {method}")
