"""``msp allocate`` and ``msp sensitivity``: search and measure without pruning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msp_plugin.cli.arguments import (
    AllocatorName,
    Cache,
    CalibrationText,
    LayerChoice,
    Loading,
    Method,
    Model,
    Output,
    SearchText,
    Seed,
    Set,
    Sparsity,
    component_options,
    recipe_line,
    with_groups,
)

if TYPE_CHECKING:
    from msp_plugin.plan.units import UnitTable
    from msp_plugin.records.run import Outcome


@with_groups
def allocate_command(
    model: Model,
    sparsity: Sparsity,
    text: SearchText,
    layers: LayerChoice,
    loading: Loading,
    output: Output,
    out: Annotated[Path, typer.Option("--out", "-o", help="the allocation file to write")] = Path(
        "allocation.json"
    ),
    method: Method = "sparsegpt",
    allocator: AllocatorName = "search",
    options: Set = None,
    seed: Seed = 0,
    cache: Cache = None,
) -> None:
    """Search an allocation and write it; `msp prune --allocation` or a recipe uses it later.

    Example: msp allocate Qwen/Qwen2.5-7B -s 0.75 --data c4.jsonl --out allocation.json
    """
    from msp_plugin.cli.console import out as terminal

    with output.running() as context, ExitStack() as stack:
        from msp_plugin.plugins.manager import Plugins
        from msp_plugin.runs.prune import search
        from msp_plugin.runtime.disk import writing
        from msp_plugin.runtime.files import expanded, write_text
        from msp_plugin.runtime.locks import sole_output
        from msp_plugin.search.options import Options
        from msp_plugin.search.resolve import resolve

        keys = {"sparsity": sparsity, "seed": seed, "cache": cache}
        line = recipe_line(method, allocator, options, **keys, **layers.recipe())
        # From a short text, set aside the samples that `msp prune` will test with.
        unseen = 0 if text.samples else None
        out, ranks = expanded(out), context.ranks
        resolved = resolve(Options.parse(line), Plugins())
        ranks.on_rank_zero(lambda: stack.enter_context(sole_output(out, cache, file=True)) and None)
        outcome = search(loading.source(model, cache), text.text(test_samples=unseen), resolved, context)
        ranks.leave()
        if ranks.rank:
            return
        with writing(out):
            write_text(out, outcome.allocation.to_json())
    if output.as_json:
        parts = {"allocation": outcome.allocation.to_dict(), "search": outcome.search.to_dict()}
        typer.echo(json.dumps(parts, indent=2))
        return
    _show_allocation(outcome, f"{model} at {sparsity}")
    terminal.print(f"Written: {out}")


def _show_allocation(outcome: Outcome, title: str) -> None:
    """Print the level of each unit, and the loss of the allocation."""
    from rich.table import Table

    from msp_plugin.cli import console

    table = Table(title=title, title_justify="left")
    for heading in ("unit", "level", "weights"):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for unit, level in zip(outcome.allocation.table, outcome.allocation.levels, strict=True):
        table.add_row(unit.name, level.name, f"{unit.weights:,}")
    console.out.print(table)
    if outcome.search.loss is not None:
        loss, uniform = map(console.nats, (outcome.search.loss, outcome.search.uniform_loss))
        console.out.print(f"search loss {loss} (uniform {uniform}) nats per token")


@with_groups
def sensitivity(
    model: Model,
    text: CalibrationText,
    loading: Loading,
    output: Output,
    estimator: Annotated[str, typer.Option("--estimator", help="see `msp plugins`")] = "fisher",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="option of the estimator, e.g. estimator.samples=32")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option("--target", help="layers to measure (repeatable)")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="layers to leave alone (repeatable)")
    ] = None,
    cache: Cache = None,
) -> None:
    """Measure the sensitivity of every unit; values in the cache are not measured again.

    Example: msp sensitivity Qwen/Qwen2.5-7B --data c4.jsonl --json > fisher.json
    """
    with output.running() as context:
        from msp_plugin.plugins.manager import Plugins, spec_of
        from msp_plugin.runs.sensitivity import measure_sensitivity

        plugins = Plugins()
        spec = component_options(options, estimator=estimator)["estimator"]
        if text.samples and "samples" in plugins.options("estimators", estimator):
            spec = {"samples": text.samples, **spec}
        built = plugins.build("estimators", spec)
        units, values = measure_sensitivity(
            loading.source(model, cache),
            text.text(test_samples=0),
            built,
            targets=target or ("Linear",),
            ignore=ignore or (),
            context=context,
        )
    if output.as_json:
        rows = [
            {"unit": unit.name, "weights": unit.weights, "sensitivity": v, "per_weight": v / unit.weights}
            for unit, v in zip(units, values, strict=True)
        ]
        typer.echo(json.dumps({"estimator": spec_of(built), "units": rows}, indent=2))
    else:
        _show_sensitivities(units, values, f"{estimator}, {model}")


def _show_sensitivities(units: UnitTable, values: Sequence[float], title: str) -> None:
    """Print the sensitivity of each unit, and its sensitivity per weight."""
    from rich.table import Table

    from msp_plugin.cli import console

    table = Table(title=title, title_justify="left")
    table.add_column("unit")
    for heading in ("weights", "sensitivity", "per weight"):
        table.add_column(heading, justify="right")
    for unit, value in zip(units, values, strict=True):
        table.add_row(unit.name, f"{unit.weights:,}", f"{value:.4g}", f"{value / unit.weights:.4g}")
    console.out.print(table)
