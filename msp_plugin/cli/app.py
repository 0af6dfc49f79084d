"""The commands of ``msp``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from msp_plugin import __version__
from msp_plugin.cli.arguments import AsJson
from msp_plugin.cli.bench import bench_command
from msp_plugin.cli.checkpoint import export_command, verify
from msp_plugin.cli.compare import compare_command
from msp_plugin.cli.evaluate import evaluate_command
from msp_plugin.cli.prune import demo, prune, run_command
from msp_plugin.cli.recover import recover
from msp_plugin.cli.report import report
from msp_plugin.cli.search import allocate_command, sensitivity
from msp_plugin.cli.stopping import Stopped
from msp_plugin.errors import HostError, MSPError, RecipeError
from msp_plugin.runtime.ranks import world_size

#: Commands whose work several ranks can share.
SHARED = {"run", "prune", "recover", "demo", "allocate", "compare"}
#: Commands that continue from the cache after a stop.
RESUMED = SHARED | {"sensitivity"}


class Commands(TyperGroup):
    """The group of all commands; ours take no blank argument."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if getattr(getattr(command, "callback", None), "__module__", "").startswith("msp_plugin."):
            _check_given(args)
        return name, command, rest


def _check_given(arguments: list[str]) -> None:
    """Raise RecipeError for a blank argument: a model would count as not given, a path as the working directory."""
    for before, argument in pairwise(arguments):
        option, equals, value = argument.partition("=")
        if not argument.strip() or (option.startswith("--") and equals and not value.strip()):
            what = option if argument.strip() else f"the argument after {before}"
            raise RecipeError(f"{what} is blank", hint="give a value, or leave the option out")


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Mixed sparsity for LLMs: search how sparse each layer may be, prune it, verify the result.",
)
app.command()(demo)
app.command(name="run")(run_command)
app.command()(prune)
app.command()(recover)
app.command(name="allocate")(allocate_command)
app.command()(sensitivity)
app.command(name="export")(export_command)
app.command()(verify)
app.command(name="eval")(evaluate_command)
app.command(name="bench")(bench_command)
app.command()(report)
app.command(name="compare")(compare_command)


@app.command()
def plugins(as_json: AsJson = False) -> None:
    """List estimators, allocators, methods, recoveries, exporters and checks with their options and owners.

    Example: msp plugins --json
    """
    from rich import box
    from rich.table import Table

    from msp_plugin.cli import console
    from msp_plugin.plugins.manager import KINDS, Plugins

    components = {
        KINDS[kind]: sorted(by_name.values(), key=lambda component: component.name)
        for kind, by_name in Plugins().components.items()
        if by_name
    }
    if as_json:
        rows = [
            {"kind": kind, "name": c.name, "owner": c.owner, "options": c.options, "summary": c.summary}
            for kind, known in components.items()
            for c in known
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    titles = {one: kind for kind, one in KINDS.items()}
    for kind, known in components.items():
        table = Table(title=titles[kind], title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("name", no_wrap=True)
        table.add_column("what it does, and its options", overflow="fold")
        table.add_column("from", overflow="fold")
        for c in known:
            options = ", ".join(f"{name}={value}" for name, value in c.options.items())
            table.add_row(c.name, f"{c.summary}\n{options}".strip(), c.owner)
        console.table.print(table)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this environment: versions, host, devices, plugins, cache.

    Example: msp doctor
    """
    from rich.text import Text

    from msp_plugin.cli import console
    from msp_plugin.cli.doctor import examine

    checks = examine()
    if as_json:
        typer.echo(json.dumps([vars(check) for check in checks], indent=2))
    else:
        for check in checks:
            mark = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}[check.state]
            console.out.print(Text.assemble(mark, f" {check.name}: {check.found}"))
            if check.advice:
                console.out.print(f"     -> {check.advice}")
    raise typer.Exit(1 if any(check.state == "fail" for check in checks) else 0)


@app.command()
def enable() -> None:
    """Make MixedSparsityModifier available to unchanged llm-compressor scripts in this environment.

    Example: msp enable
    """
    from msp_plugin.cli.enable import enable as write

    typer.echo(f"enabled: {write()}\nundo it with: msp disable")


@app.command()
def disable() -> None:
    """Undo `msp enable`.

    Example: msp disable
    """
    from msp_plugin.cli.enable import disable as remove

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


def run(stopped: Callable[[], int] = lambda: 0) -> None:
    """Run the command line, with the plugins' commands.

    Args:
        stopped: returns the exit code once a signal has come, 0 before (see ``stopping``).
    """
    debug = os.environ.get("MSP_DEBUG", "") not in ("", "0")
    where = ""
    try:
        ranks = world_size()
        where = f"rank {os.environ.get('RANK')}: " if ranks > 1 else ""
        if ranks > 1 and not (SHARED & set(sys.argv[1:2]) or "--help" in sys.argv):
            raise HostError(
                f"{' '.join(sys.argv[1:2]) or 'msp'} runs in one process, not in {ranks}",
                hint="start it without torchrun; run, prune, recover, demo, allocate and compare share their work among ranks",
            )
        if not {"plugins", "doctor", "disable", "--version"} & set(sys.argv[1:2]):
            from msp_plugin.plugins.manager import Plugins

            Plugins().hook.msp_register_commands(app=app)
        try:
            app()
        except Exception as error:
            if code := stopped():  # compiled code has turned the Stopped into this error
                raise Stopped(code) from error
            raise
    except MSPError as error:
        if debug:
            raise
        typer.echo(f"{where}error: {error}", err=True)
        sys.exit(error.exit_code)
    except Stopped:
        typer.echo(f"stopped; nothing half-written is left. {_again(sys.argv)}".strip(), err=True)
        raise
    except Exception as error:
        message, code = _cause(error)
        if debug or message is None:
            raise
        typer.echo(f"{where}error: {message}", err=True)
        sys.exit(code)


def _again(command: list[str]) -> str:
    """Return advice on how to continue a stopped command; empty if it cannot be continued."""
    if not RESUMED & set(command[1:2]):
        return ""
    if "--fresh" in command:
        return (
            "The same command without --fresh continues with the measurements made so far, and uses those of older "
            "runs in the cache for the rest"
        )
    return "The same command continues with the measurements made so far"


def _cause(error: Exception) -> tuple[str | None, int]:
    """Return (message, exit code) of an error of disk or memory; the message is None for a bug."""
    from msp_plugin.runtime.disk import cannot_write, disk_errno
    from msp_plugin.runtime.memory import is_out_of_memory

    if disk_errno(error):  # of the cache or stdout; the results have errors of ours
        return str(cannot_write(None, error)), 2
    if not is_out_of_memory(error):
        return None, 1
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    hint = (
        "give shorter samples (--length), a smaller dtype, or more memory; measurements made so far are kept"
    )
    return f"out of memory: {first}\n  -> {hint}", 1
