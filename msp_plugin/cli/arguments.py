"""Arguments that several commands share, and what they mean in a recipe."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="model directory, hub id, or demo:llama / demo:qwen2")]
Data = Annotated[
    str,
    typer.Option(
        "--data", "-d", help="calibration text: file, table (jsonl, parquet, csv, ...), directory or dataset"
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="directory for the results; must be empty or new")]
Sparsity = Annotated[str, typer.Option("--sparsity", "-s", help="share of zeros among prunable weights")]
Method = Annotated[str, typer.Option("--method", "-m", help="pruning method; see `msp plugins`")]
Levels = Annotated[
    str | None, typer.Option("--levels", help='comma list, e.g. "dense,4:8,2:8,1:8", or servable')
]
AllocatorName = Annotated[str, typer.Option("--allocator", help="allocator; see `msp plugins`")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="option of allocator, method or an estimator, e.g. allocator.tokens=8192 or fisher.samples=64",
    ),
]
Targets = Annotated[list[str] | None, typer.Option("--target", help="layers to prune (repeatable)")]
Ignore = Annotated[list[str] | None, typer.Option("--ignore", help="layers to leave alone (repeatable)")]
Granularity = Annotated[
    str | None, typer.Option("--granularity", help="what shares a level: unit (fused layers), layer or block")
]
BoundsOf = Annotated[
    list[str] | None,
    typer.Option("--bounds", help="PATTERN=LOW,HIGH: least and most zeros of these layers (repeatable)"),
]
Protect = Annotated[
    list[str] | None, typer.Option("--protect", help="layers to keep dense, in the budget (repeatable)")
]
Seed = Annotated[int, typer.Option("--seed")]
Cache = Annotated[str | None, typer.Option("--cache", help="where the level database lives")]
SearchData = Annotated[str | None, typer.Option("--search-data", help="text that measures candidates")]
TestData = Annotated[str | None, typer.Option("--test-data", help="text of the perplexity")]
Count = Annotated[
    int | None, typer.Option("--samples", help="calibration samples; default 128, or what the text holds")
]
Length = Annotated[
    int | None, typer.Option("--length", help="tokens per sample; default 2048, or the model's maximum")
]
TestCount = Annotated[int, typer.Option("--test-samples", help="samples of the perplexity; 0: none")]
Column = Annotated[
    str, typer.Option("--text-column", help="of tables and datasets: text, or a conversation's messages")
]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="start each sample with the beginning-of-text token; default: as the tokenizer does",
    ),
]
Batch = Annotated[int, typer.Option("--batch", help="samples per forward pass of the host")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="run the model repository's code")]
Offload = Annotated[
    bool, typer.Option("--offload", help="leave weights on disk: for models larger than memory, slower")
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="measure anew what an earlier or stopped run left in the cache")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON on stdout, no bars")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="show the hosts' logs")]


def resolve_model(model: str) -> str:
    """Return the directory of ``demo:NAME``, anything else as it is."""
    from msp_plugin.demo import demo_model_path

    return str(demo_model_path(model[5:])) if model.startswith("demo:") else model


def component_options(
    pairs: list[str] | None, estimators: Collection[str] = (), **names: str
) -> dict[str, Any]:
    """Return components by role, with the options of ``--set role.option=value`` merged in.

    Args:
        estimators: names that may be roles too, for the options of the estimators that an allocator uses.
        names: the component's name by role.

    Raises:
        RecipeError: a pair that is not of this form, or another role.
    """
    from msp_plugin.errors import RecipeError, nearest, shown
    from msp_plugin.runtime.documents import parse_yaml

    specs: dict[str, dict[str, Any]] = {role: {"name": name} for role, name in names.items()}
    for pair in pairs or ():
        left, equals, text = pair.partition("=")
        role, dot, option = left.partition(".")
        if not (equals and dot and option):
            raise RecipeError(f"--set {shown(pair)} is not ROLE.OPTION=VALUE")
        if role not in {*specs, *estimators}:
            raise RecipeError(
                f"--set {shown(pair)}: no such role {shown(role)}", hint=nearest(role, {*specs, *estimators})
            )
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise RecipeError(f"--set {left}: {shown(text)} is no value: {error}") from None
        specs.setdefault(role, {})[option] = value
    return specs


def recipe_options(
    sparsity: str | None, levels: str | None, targets: list[str] | None, ignore: list[str] | None,
    seed: int, cache: str | None, specs: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    estimators = {role: spec for role, spec in specs.items() if role not in ("method", "allocator")}
    given = {
        "sparsity": sparsity, "method": specs.get("method"), "allocator": specs.get("allocator"),
        "levels": None if levels is None else levels.split(","), "targets": targets or None,
        "ignore": ignore or None, "seed": seed, "cache": cache, "estimators": estimators or None,
    }  # fmt: skip
    return {key: value for key, value in given.items() if value is not None}


def layer_options(
    granularity: str | None, bounds: list[str] | None, protect: list[str] | None
) -> dict[str, Any]:
    """Return what a recipe says of granularity, bounds and protected layers.

    Raises:
        RecipeError: bounds that are not PATTERN=LOW,HIGH.
    """
    from msp_plugin.errors import RecipeError

    shares: dict[str, list[str]] = {}
    for text in bounds or ():
        pattern, equals, values = text.rpartition("=")
        pair = [part.strip() for part in values.split(",")]
        if not (equals and pattern and len(pair) == 2):
            raise RecipeError(f"--bounds {text!r} is not PATTERN=LOW,HIGH", hint="e.g. down_proj=0.5,0.75")
        shares[pattern] = pair
    given = {"granularity": granularity, "bounds": shares or None, "protect": protect or None}
    return {key: value for key, value in given.items() if value is not None}
