"""``msp export`` and ``msp verify``: checkpoints after pruning."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msp_plugin.cli.arguments import (
    AsJson,
    Bos,
    Column,
    Remote,
    Verbose,
    component_options,
    resolve_model,
    with_groups,
)

if TYPE_CHECKING:
    from msp_plugin.checkpoint.manifest import Manifest
    from msp_plugin.data.calibration import CalibrationSet
    from msp_plugin.plugins.manager import Plugins
    from msp_plugin.verify.base import Check, CheckResult, Subject

Directory = Annotated[Path, typer.Argument(help="directory that `msp prune` or `msp export` wrote")]


def export_command(
    source: Directory,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", help="sparse24, bitmask, small, uniform, dense, recipe, or a plugin's; see `msp plugins`"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="directory for the results; must be empty or new")
    ] = None,
    forms: Annotated[
        bool, typer.Option("--forms", help="list the forms that the checkpoint allows, and write nothing")
    ] = False,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="option of the exporter, e.g. values=int8 of bitmask")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write a checkpoint in another form: packed, smaller (without parts that do nothing), dense, or a plain recipe.

    Example: msp export llama-75 --to sparse24 --out llama-75-packed
    """
    from msp_plugin.cli.console import progress_bars, set_up_logs

    set_up_logs(verbose)
    from msp_plugin.checkpoint.export import export_checkpoint
    from msp_plugin.errors import RecipeError
    from msp_plugin.plugins.manager import Plugins

    if forms:
        _show_forms(source, as_json)
        return
    if to is None or out is None:
        raise RecipeError("an export needs a form and a directory", hint="give --to and --out, or --forms")
    pairs = [f"exporter.{pair}" for pair in options or ()]
    exporter = Plugins().build("exporters", component_options(pairs, exporter=to)["exporter"])
    with progress_bars(not as_json) as progress:
        manifest = export_checkpoint(
            source, exporter, out, progress=lambda done, total: progress(f"export {to}", done, total)
        )
    if as_json:
        typer.echo(json.dumps(_export_record(manifest, out), indent=2, sort_keys=True))
    else:
        _show_export(manifest, out)


def _show_forms(source: Path, as_json: bool) -> None:
    """Print for each exporter how many bytes its export takes, or why it is refused."""
    from msp_plugin.checkpoint.export import allowed_forms
    from msp_plugin.cli import console
    from msp_plugin.plugins.manager import Plugins

    plugins = Plugins()
    exporters = [plugins.build("exporters", name) for name in sorted(plugins.components["exporters"])]
    forms = allowed_forms(source, exporters)
    if as_json:
        typer.echo(json.dumps(forms, indent=2, sort_keys=True))
        return
    for name, form in forms.items():
        console.out.print(f"{name}: {form['refused'] or format(form['bytes'], ',') + ' bytes'}")
        if form["hint"]:
            console.out.print(f"  -> {form['hint']}")


def _export_record(manifest: Manifest, out: Path) -> dict[str, Any]:
    names = (
        "format",
        "files",
        "packed",
        "kept_dense",
        "packed_bytes",
        "dense_bytes",
        "negative_zeros",
        "quantization_errors",
        "rounded_to_zero",
        "structure",
    )
    return {"path": str(out), **{name: getattr(manifest, name) for name in names}}


def _show_export(manifest: Manifest, out: Path) -> None:
    from msp_plugin.cli import console
    from msp_plugin.structure.slices import from_runs

    if manifest.packed:
        ratio = manifest.packed_bytes / manifest.dense_bytes
        console.out.print(
            f"{len(manifest.packed)} layers packed: {manifest.packed_bytes:,} bytes, "
            f"{ratio:.4f} of {manifest.dense_bytes:,} dense"
        )
    if manifest.structure:
        kept = [(len(from_runs(half["kept"])), half["groups"]) for half in manifest.structure.values()]
        dropped, narrower = sum(not n for n, _ in kept), sum(0 < n < groups for n, groups in kept)
        console.out.print(f"{dropped} of {len(kept)} attentions and MLPs dropped, {narrower} narrower")
    for layer, reason in manifest.kept_dense.items():
        console.out.print(f"dense: {layer}: {reason}")
    if manifest.negative_zeros:
        console.out.print(f"{sum(manifest.negative_zeros.values()):,} negative zeros became positive")
    for layer, change in manifest.quantization_errors.items() if manifest.packed else ():
        zeros = manifest.rounded_to_zero.get(layer)
        note = f", {zeros:,} kept weights became zero" if zeros else ""
        console.out.print(f"int8: {layer}: changed by {change:.4f} of its norm{note}")
    total = sum(entry["bytes"] for entry in manifest.files.values())
    console.out.print(f"Results: {out} ({len(manifest.files)} files, {total:,} bytes)")


@dataclass(frozen=True, kw_only=True)
class VerificationText:
    """Options of the test text of a verification."""

    data: Annotated[str | None, typer.Option("--data", "-d", help="test text, for perplexity and KL")] = None
    samples: Annotated[int, typer.Option("--samples", help="test samples")] = 32
    length: Annotated[int | None, typer.Option("--length", help="tokens per sample")] = None
    text_column: Column = "text"
    bos: Bos = None

    def read(self, checkpoint: Path, *, trust_remote_code: bool) -> CalibrationSet | None:
        """Return the samples, tokenized for a checkpoint; None without a text.

        Raises:
            MSPError: the text or the tokenizer cannot be read.
        """
        from msp_plugin.data.samples import Text
        from msp_plugin.models.source import load_tokenizer

        if self.data is None:
            return None
        text = Text(
            self.data, samples=self.samples, length=self.length, column=self.text_column, bos=self.bos
        )
        tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
        text = text.for_model(checkpoint, trust_remote_code=trust_remote_code)
        data, samples = self.data, self.samples
        return text.fitted(lambda fitted: fitted.read(tokenizer, data, samples, at_least=1))


@with_groups
def verify(
    checkpoint: Directory,
    text: VerificationText,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference", help="the checkpoint it was exported from; must equal it bit for bit, but for int8"
        ),
    ] = None,
    original: Annotated[
        str | None, typer.Option("--original", help="the model before pruning: directory, hub id, demo:llama")
    ] = None,
    vllm: Annotated[
        Path | None,
        typer.Option(
            "--vllm", help="virtual environment with vLLM and msp_plugin, which serves the checkpoint"
        ),
    ] = None,
    check: Annotated[
        list[str] | None, typer.Option("--check", help="run only these (repeatable); see `msp plugins`")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="option of a check, e.g. served.tokens=128")
    ] = None,
    trust_remote_code: Remote = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Check that a checkpoint has the planned zeros, is undamaged, and is served correctly. Exit code 1 if not.

    Example: msp verify packed --reference llama-75 --original demo:llama --data wiki.txt --vllm ~/venvs/vllm
    """
    from msp_plugin.cli.console import progress_bars, set_up_logs

    set_up_logs(verbose)
    from msp_plugin.checkpoint.checkpoint import Checkpoint
    from msp_plugin.plugins.manager import Plugins
    from msp_plugin.verify.base import Subject, run_checks
    from msp_plugin.verify.server import vllm_executable

    checks = _build_checks(Plugins(), check, options)
    pruned = Checkpoint.open(checkpoint)
    test = text.read(checkpoint, trust_remote_code=trust_remote_code)
    if vllm is not None:
        vllm_executable(vllm)
    subject = Subject(
        pruned,
        None if reference is None else Checkpoint.open(reference),
        None if original is None else resolve_model(original),
        test,
        vllm,
        trust_remote_code,
    )
    _require_needs(checks, subject, check)
    with progress_bars(not as_json) as progress:
        results = run_checks(subject, checks, progress)
    if as_json:
        typer.echo(json.dumps([result.to_dict() for result in results], indent=2))
    else:
        _show_checks(results, checkpoint)
    raise typer.Exit(0 if all(result.passed for result in results) else 1)


def _build_checks(plugins: Plugins, names: list[str] | None, options: list[str] | None) -> list[Check]:
    """Return the checks, cheapest first: structure, round_trip, logits, quality, served, then the plugins' by name."""
    order = ("structure", "round_trip", "logits", "quality", "served")
    known = plugins.components["checks"]
    for name in names or ():
        plugins.options("checks", name)  # raises for an unknown one
    chosen = sorted(names or known, key=lambda n: (order.index(n) if n in order else len(order), n))
    specs = component_options(options, **{name: name for name in chosen})
    return [plugins.build("checks", specs[name]) for name in dict.fromkeys(chosen)]


def _require_needs(checks: list[Check], subject: Subject, names: list[str] | None) -> None:
    """Raise RecipeError if a check that was chosen by name lacks an argument that it needs."""
    from msp_plugin.errors import RecipeError
    from msp_plugin.verify.base import missing_needs

    for check in checks if names else ():
        missing = missing_needs(check, subject)
        if missing:
            raise RecipeError(
                f"check {check.name!r} needs {', '.join(missing)}", hint="give it, or leave the check out"
            )


def _show_checks(results: list[CheckResult], path: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    from msp_plugin.cli import console

    marks = {"ok": Text("ok", "green"), "fail": Text("FAIL", "red"), "skip": Text("skip", "yellow")}
    table = Table(title=f"Verification of {path}", title_justify="left")
    for heading in ("check", "what", "", "found", "expected"):
        table.add_column(heading, overflow="fold")
    for result in results:
        for i, row in enumerate(result.findings):
            name = result.check if i == 0 else ""
            table.add_row(name, row.item, marks[row.state], row.found, row.expected)
    console.table.print(table)
    failed = [result.check for result in results if not result.passed]
    skipped = [result.check for result in results if all(row.state == "skip" for row in result.findings)]
    verdict = (f"failed: {', '.join(failed)}", "red") if failed else ("passed", "green")
    console.out.print(Text.assemble(verdict, f" (not checked: {', '.join(skipped)})" if skipped else ""))
