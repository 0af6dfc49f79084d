"""``msp recover``: change the surviving weights of a sparse model."""

from __future__ import annotations

from typing import Annotated

import typer

from msp_plugin.cli.arguments import (
    Cache,
    CalibrationText,
    Loading,
    Out,
    Output,
    Seed,
    TestCount,
    TestData,
    component_options,
    resolve_model,
    with_groups,
)
from msp_plugin.cli.prune import show_run

MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--set", help="option of the recovery, e.g. blockwise.epochs=16 (repeatable)"),
]


@with_groups
def recover(
    run: Annotated[str, typer.Argument(help="directory or hub id of a sparse model, pruned by anyone")],
    out: Out,
    text: CalibrationText,
    loading: Loading,
    output: Output,
    original: Annotated[
        str | None, typer.Option("--original", help="the dense model; not needed by every method")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", "-m", help="recovery method; see `msp plugins`")
    ] = "blockwise",
    options: MethodOptions = None,
    test_data: TestData = None,
    test_samples: TestCount = None,
    seed: Seed = 0,
    cache: Cache = None,
) -> None:
    """Recover quality lost by pruning: change surviving weights only; every zero stays.

    Example: msp recover qwen-75 --original Qwen/Qwen2.5-7B --data c4.jsonl --test-data wiki.txt --out qwen-75-recovered
    """
    with output.running() as context:
        from msp_plugin.runs.recover import recover as recover_model

        spec = component_options(options, **{method: method})[method]
        result = recover_model(
            resolve_model(run),
            text.text(test=test_data, test_samples=test_samples),
            out,
            original=None if original is None else resolve_model(original),
            method=spec,
            seed=seed,
            cache=cache,
            context=context,
            **vars(loading),
        )
    if result is not None:
        show_run(result, output.as_json, f"{run}, recovery {method}")
