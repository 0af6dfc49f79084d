"""The hooks of msp_plugin.

A plugin implements any of them, and registers its module or object under the entry-point group
``msp_plugin``. The ``msp_register_*`` hooks return classes: frozen dataclasses with a class attribute
``name``, whose fields are the options that a recipe may set. The order in which plugins are loaded changes
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import typer

    from msp_plugin.plan.allocation import Allocation
    from msp_plugin.plan.levels import Level

PROJECT = "msp_plugin"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def msp_register_estimators() -> list[type[Any]]:
    """Return classes of ``msp_plugin.Estimator``: they measure what pruning a layer costs the model."""


@hookspec
def msp_register_allocators() -> list[type[Any]]:
    """Return classes of ``msp_plugin.Allocator``: they choose one level per unit on an exact budget."""


@hookspec
def msp_register_pruners() -> list[type[Any]]:
    """Return classes of ``msp_plugin.Pruner``: they turn a weight and a level into a pruned weight."""


@hookspec
def msp_register_structured_pruners() -> list[type[Any]]:
    """Return classes of ``msp_plugin.StructuredPruner``: pruners that say which heads and channels of a half go."""


@hookspec
def msp_register_recoveries() -> list[type[Any]]:
    """Return classes of ``msp_plugin.Recovery``: they change surviving weights only (``msp recover``)."""


@hookspec
def msp_register_formats() -> list[type[Any]]:
    """Return classes of ``msp_plugin.PackedFormat``, which every reader of checkpoints then knows."""


@hookspec
def msp_register_exporters() -> list[type[Any]]:
    """Return classes of ``msp_plugin.Exporter``: they write a checkpoint in another form (``msp export --to``)."""


@hookspec
def msp_register_checks() -> list[type[Any]]:
    """Return classes of ``msp_plugin.Check``: each proves one thing of a checkpoint (``msp verify``)."""


@hookspec
def msp_register_commands(app: typer.Typer) -> None:
    """Add commands to the ``msp`` command line."""


@hookspec
def msp_run_started(allocation: Allocation) -> None:
    """Called when the allocation is known and pruning is about to start."""


@hookspec
def msp_layer_pruned(layer: str, level: Level, zeros: int, weights: int) -> None:
    """Called for every layer after the recount: its level, its zeros and its weights."""


@hookspec
def msp_run_finished(record: dict[str, Any]) -> None:
    """Called with the contents of run.json when a run has written its files."""


@hookspec
def msp_report_section(record: dict[str, Any]) -> Any:
    """Return a ``msp_plugin.Section`` for the report (``msp report``), or None if there is nothing to say.

    ``record["schema"]`` says what it is of: ``msp_plugin/run``, the contents of run.json with those of
    allocation.json under ``allocation``, or ``msp_plugin/compare``, the contents of compare.json.
    """
