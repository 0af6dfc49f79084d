"""The commands of ``msp``."""

from __future__ import annotations

import json
import os
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from msp_plugin import __version__
from msp_plugin.errors import MSPError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Mixed sparsity for LLMs: search how sparse each layer may be, prune it so, prove it.",
)

Model = Annotated[str, typer.Argument(help="model directory, hub id, or demo:llama / demo:qwen2")]
Data = Annotated[str, typer.Option("--data", "-d", help="calibration text: file, jsonl, directory or dataset")]
Out = Annotated[Path, typer.Option("--out", "-o", help="directory for the results; must be empty or new")]
Sparsity = Annotated[str, typer.Option("--sparsity", "-s", help="share of zeros among prunable weights")]
Method = Annotated[str, typer.Option("--method", "-m", help="pruning method; see `msp plugins`")]
Levels = Annotated[str | None, typer.Option("--levels", help='comma list, e.g. "dense,4:8,2:8,1:8"')]
AllocatorName = Annotated[str, typer.Option("--allocator", help="allocator; see `msp plugins`")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="component option, e.g. allocator.generations=20 or method.block_size=64"),
]
Targets = Annotated[list[str] | None, typer.Option("--target", help="layers to prune (repeatable)")]
Ignore = Annotated[list[str] | None, typer.Option("--ignore", help="layers to leave alone (repeatable)")]
Seed = Annotated[int, typer.Option("--seed")]
Cache = Annotated[str | None, typer.Option("--cache", help="where the level database lives")]
SearchData = Annotated[str | None, typer.Option("--search-data", help="text that measures candidates")]
TestData = Annotated[str | None, typer.Option("--test-data", help="text of the perplexity")]
Count = Annotated[int, typer.Option("--samples", help="calibration samples")]
Length = Annotated[int, typer.Option("--length", help="tokens per sample")]
TestCount = Annotated[int, typer.Option("--test-samples", help="samples of the perplexity; 0: none")]
Column = Annotated[str, typer.Option("--text-column", help="of jsonl files and datasets")]
Batch = Annotated[int, typer.Option("--batch", help="samples per forward pass of the host")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="run the model repository's code")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON on stdout, no bars")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="show the hosts' logs")]


def resolve_model(model: str) -> str:
    """Return the directory of ``demo:NAME``, anything else as it is."""
    from msp_plugin.demo import demo_model_path

    return str(demo_model_path(model[5:])) if model.startswith("demo:") else model


def component_options(pairs: list[str] | None, **names: str) -> dict[str, Any]:
    """Return components by role, with the options of ``--set role.option=value`` merged in.

    Raises:
        RecipeError: a pair that is not of this form, or another role.
    """
    import yaml

    from msp_plugin.errors import RecipeError, nearest

    specs: dict[str, dict[str, Any]] = {role: {"name": name} for role, name in names.items()}
    for pair in pairs or ():
        left, equals, value = pair.partition("=")
        role, dot, option = left.partition(".")
        if not (equals and dot and option):
            raise RecipeError(f"--set {pair!r} is not ROLE.OPTION=VALUE")
        if role not in (*specs, "fisher"):
            raise RecipeError(f"--set {pair!r}: no such role {role!r}", hint=nearest(role, specs))
        specs.setdefault(role, {})[option] = yaml.safe_load(value)
    return specs


def _options(
    sparsity: str | None, levels: str | None, targets: list[str] | None, ignore: list[str] | None,
    seed: int, cache: str | None, specs: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    estimators = {role: spec for role, spec in specs.items() if role not in ("method", "allocator")}
    given = {
        "sparsity": sparsity, "method": specs.get("method"), "allocator": specs.get("allocator"),
        "levels": levels.split(",") if levels else None, "targets": targets or None,
        "ignore": ignore or None, "seed": seed, "cache": cache, "estimators": estimators or None,
    }  # fmt: skip
    return {key: value for key, value in given.items() if value is not None}


def _show_run(run: Any, as_json: bool, title: str) -> None:
    from msp_plugin.cli.console import out, quality_table, taken_back

    if as_json:
        typer.echo(json.dumps(run.record, indent=2, sort_keys=True))
        return
    out.print(quality_table(run.record, title))
    back = taken_back(run.record["perplexity"])
    if back is not None:
        out.print(f"Mixed takes back {100 * back:.0f} % of the loss that uniform adds.")
    out.print(f"Results: {run.path}")


@app.command()
def demo(
    out: Out = Path("msp-demo"),
    model: Annotated[str, typer.Option("--model", help="llama or qwen2")] = "llama",
    method: Method = "sparsegpt",
    seed: Seed = 0,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Prune the embedded demo model to 75 %, uniform and mixed, and compare them.

    Needs no download. Example: msp demo --out demo-run
    """
    from msp_plugin.cli.console import progress_bars, set_up_logs

    set_up_logs(verbose)
    from msp_plugin.demo import demo_text
    from msp_plugin.hosts.llm_compressor.recipe import our_lines, read_recipe
    from msp_plugin.pipeline import run_recipe

    recipe = read_recipe(files("msp_plugin.demo") / "recipe.yaml")
    for line in our_lines(recipe):
        line.update(method=method, seed=seed)
    with progress_bars(not as_json) as progress:
        run = run_recipe(
            recipe, resolve_model(f"demo:{model}"), demo_text(), out, dtype="float32", progress=progress
        )
    _show_run(run, as_json, f"Demo {model} at 75 %, method {method}")


@app.command(name="run")
def run_command(
    recipe: Annotated[Path, typer.Argument(help="recipe of llm-compressor, YAML or JSON")],
    model: Annotated[str, typer.Option("--model", help="model directory, hub id, or demo:llama")],
    data: Data,
    out: Out,
    search_data: SearchData = None,
    test_data: TestData = None,
    samples: Count = 128,
    length: Length = 2048,
    test_samples: TestCount = 32,
    text_column: Column = "text",
    batch: Batch = 1,
    dtype: Dtype = "auto",
    baseline: Annotated[bool, typer.Option(help="also prune uniformly, to compare")] = True,
    trust_remote_code: Remote = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run any recipe of llm-compressor, ours included.

    Example: msp run recipes/llama-3.1-8b-75.yaml --model meta-llama/Llama-3.1-8B --data c4.jsonl --out out
    """
    from msp_plugin.cli.console import progress_bars, set_up_logs

    set_up_logs(verbose)
    from msp_plugin.pipeline import Text, run_recipe

    text = Text(
        data, search_data, test_data, samples, length, test_samples, text_column, batch
    )
    with progress_bars(not as_json) as progress:
        run = run_recipe(
            recipe, resolve_model(model), text, out, dtype=dtype, baseline=baseline,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    _show_run(run, as_json, f"{recipe.name} on {model}")


@app.command()
def prune(
    model: Model,
    data: Data,
    out: Out,
    sparsity: Annotated[str | None, typer.Option("--sparsity", "-s", help="share of zeros, e.g. 0.75")] = None,
    method: Method = "sparsegpt",
    allocation: Annotated[str | None, typer.Option("--allocation", help="finished allocation.json")] = None,
    levels: Levels = None,
    allocator: AllocatorName = "msp",
    options: Set = None,
    target: Targets = None,
    ignore: Ignore = None,
    seed: Seed = 0,
    cache: Cache = None,
    search_data: SearchData = None,
    test_data: TestData = None,
    samples: Count = 128,
    length: Length = 2048,
    test_samples: TestCount = 32,
    text_column: Column = "text",
    batch: Batch = 1,
    dtype: Dtype = "auto",
    baseline: Annotated[bool, typer.Option(help="also prune uniformly, to compare")] = True,
    trust_remote_code: Remote = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Prune a model to a searched (or given) allocation, without writing a recipe.

    Example: msp prune Qwen/Qwen2.5-7B -s 0.75 --data c4.jsonl --test-data wiki.txt --out qwen-75
    """
    from msp_plugin.cli.console import progress_bars, set_up_logs

    set_up_logs(verbose)
    from msp_plugin.pipeline import Text, prune_recipe, run_recipe

    specs = component_options(options, method=method, allocator=allocator)
    given = _options(sparsity, levels, target, ignore, seed, cache, specs)
    recipe = prune_recipe({**given, "allocation": allocation})
    text = Text(
        data, search_data, test_data, samples, length, test_samples, text_column, batch
    )
    with progress_bars(not as_json) as progress:
        run = run_recipe(
            recipe, resolve_model(model), text, out, dtype=dtype, baseline=baseline,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    _show_run(run, as_json, f"{model}, method {method}")


@app.command(name="allocate")
def allocate_command(
    model: Model,
    sparsity: Sparsity,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="the allocation file to write")] = Path(
        "allocation.json"
    ),
    method: Method = "sparsegpt",
    levels: Levels = None,
    allocator: AllocatorName = "msp",
    options: Set = None,
    target: Targets = None,
    ignore: Ignore = None,
    seed: Seed = 0,
    cache: Cache = None,
    search_data: SearchData = None,
    samples: Count = 128,
    length: Length = 2048,
    text_column: Column = "text",
    dtype: Dtype = "auto",
    trust_remote_code: Remote = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Search an allocation and write it; `msp prune --allocation` or a recipe uses it later.

    Example: msp allocate Qwen/Qwen2.5-7B -s 0.75 --data c4.jsonl --out allocation.json
    """
    from rich.table import Table

    from msp_plugin.cli import console
    from msp_plugin.errors import OutputError

    console.set_up_logs(verbose)
    from msp_plugin.files import write_text
    from msp_plugin.options import Options
    from msp_plugin.pipeline import Text, search_allocation

    if out.exists():
        raise OutputError(f"{out} exists", hint="give another --out, or remove it")
    specs = component_options(options, method=method, allocator=allocator)
    chosen = Options(**_options(sparsity, levels, target, ignore, seed, cache, specs))
    text = Text(data, search_data, None, samples, length, 0, text_column)
    with console.progress_bars(not as_json) as progress:
        outcome = search_allocation(
            chosen, resolve_model(model), text, dtype=dtype, trust_remote_code=trust_remote_code,
            progress=progress,
        )  # fmt: skip
    write_text(out, outcome.allocation.to_json())
    if as_json:
        typer.echo(json.dumps({"allocation": outcome.allocation.to_dict(), "search": outcome.search}, indent=2))
        return
    table = Table(title=f"{model} at {sparsity}", title_justify="left")
    for heading in ("unit", "level", "weights"):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for unit, level in zip(outcome.allocation.table, outcome.allocation.levels, strict=True):
        table.add_row(unit.name, level.name, f"{unit.weights:,}")
    console.out.print(table)
    loss, uniform = outcome.search.get("loss"), outcome.search.get("uniform_loss")
    if loss is not None:
        console.out.print(f"search loss {loss:.4f} (uniform {uniform:.4f}) nats per token")
    console.out.print(f"Written: {out}")


@app.command()
def sensitivity(
    model: Model,
    data: Data,
    estimator: Annotated[str, typer.Option("--estimator", help="see `msp plugins`")] = "fisher",
    options: Set = None,
    target: Targets = None,
    ignore: Ignore = None,
    samples: Count = 128,
    length: Length = 512,
    text_column: Column = "text",
    dtype: Dtype = "auto",
    trust_remote_code: Remote = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure the sensitivity of every unit.

    Example: msp sensitivity Qwen/Qwen2.5-7B --data c4.jsonl --json > fisher.json
    """
    from rich.table import Table

    from msp_plugin.cli import console

    console.set_up_logs(verbose)
    from msp_plugin.device import on_best_device
    from msp_plugin.models import load_model, load_tokenizer, prunable_layers
    from msp_plugin.pipeline import Text, load_samples
    from msp_plugin.plugins import Plugins
    from msp_plugin.sensitivity.base import unit_sensitivities

    spec = component_options(options, estimator=estimator)["estimator"]
    built = Plugins().build("estimators", spec)
    source = resolve_model(model)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    text = load_samples(tokenizer, Text(data, samples=samples, length=length, test_samples=0, column=text_column))
    loaded = load_model(source, dtype, trust_remote_code=trust_remote_code)
    units = prunable_layers(loaded, target or ("Linear",), ignore or ())
    with console.progress_bars(not as_json) as progress, on_best_device(loaded):
        values = unit_sensitivities(
            built, loaded, text.calibration, units, lambda d, t: progress("sensitivity", d, t)
        )
    rows = [
        {"unit": u.name, "weights": u.weights, "sensitivity": v, "per_weight": v / u.weights}
        for u, v in zip(units, values, strict=True)
    ]
    if as_json:
        typer.echo(json.dumps({"estimator": spec, "units": rows}, indent=2))
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


@app.command()
def plugins(as_json: AsJson = False) -> None:
    """List estimators, allocators and pruning methods with their options and owners.

    Example: msp plugins --json
    """
    from rich.table import Table

    from msp_plugin.cli import console
    from msp_plugin.plugins import Plugins

    found = Plugins()
    rows = [
        {
            "kind": kind[:-1], "name": c.name, "owner": c.owner, "options": c.options, "summary": c.summary,
        }
        for kind, components in found.components.items()
        for c in sorted(components.values(), key=lambda c: c.name)
    ]  # fmt: skip
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table()
    for heading in ("kind", "name", "what it does", "options", "from"):
        table.add_column(heading)
    for row in rows:
        options = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        table.add_row(row["kind"], row["name"], row["summary"], options, row["owner"])
    console.out.print(table)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this environment: versions, host, devices, plugins, cache.

    Example: msp doctor
    """
    from msp_plugin.cli import console
    from msp_plugin.cli.doctor import examine

    checks = examine()
    if as_json:
        typer.echo(json.dumps([vars(check) for check in checks], indent=2))
    else:
        for check in checks:
            mark = {"ok": "[green]ok[/]  ", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}[check.state]
            console.out.print(f"{mark} {check.name}: {check.found}", highlight=False)
            if check.advice:
                console.out.print(f"     -> {check.advice}", markup=False)
    raise typer.Exit(1 if any(check.state == "fail" for check in checks) else 0)


@app.command()
def enable() -> None:
    """Make MixedSparsityModifier known to unchanged llm-compressor scripts of this environment.

    Example: msp enable
    """
    from msp_plugin.enable import enable as write

    typer.echo(f"enabled: {write()}\nundo it with: msp disable")


@app.command()
def disable() -> None:
    """Undo `msp enable`.

    Example: msp disable
    """
    from msp_plugin.enable import disable as remove

    typer.echo(f"disabled: {remove()} is gone")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"msp {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    pass


def run() -> None:
    """Run the command line with the commands that plugins add."""
    debug = bool(os.environ.get("MSP_DEBUG"))
    try:
        if not {"plugins", "doctor", "disable", "--version", "--help"} & set(sys.argv[1:2]):
            from msp_plugin.plugins import Plugins

            Plugins().hook.msp_register_commands(app=app)
        app()
    except MSPError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was written", err=True)
        sys.exit(130)
