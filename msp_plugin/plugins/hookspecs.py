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

    from msp_plugin.allocators.base import Allocator
    from msp_plugin.checkpoint.export import Exporter
    from msp_plugin.formats.base import PackedFormat
    from msp_plugin.plan.allocation import Allocation
    from msp_plugin.plan.levels import Level
    from msp_plugin.pruning.base import Pruner
    from msp_plugin.report.section import Section
    from msp_plugin.sensitivity.base import Estimator
    from msp_plugin.verify.base import Check

PROJECT = "msp_plugin"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def msp_register_estimators() -> list[type[Estimator]]:
    """Return sensitivity estimators: what pruning a layer costs the model."""
    raise NotImplementedError


@hookspec
def msp_register_allocators() -> list[type[Allocator]]:
    """Return allocators: they choose one level per unit on an exact budget."""
    raise NotImplementedError


@hookspec
def msp_register_pruners() -> list[type[Pruner]]:
    """Return pruning methods: they turn a weight and a level into a pruned weight."""
    raise NotImplementedError


@hookspec
def msp_register_formats() -> list[type[PackedFormat]]:
    """Return formats of packed weights, which every reader of checkpoints then knows."""
    raise NotImplementedError


@hookspec
def msp_register_exporters() -> list[type[Exporter]]:
    """Return exporters: they write a run's checkpoint in another form (``msp export --to``)."""
    raise NotImplementedError


@hookspec
def msp_register_checks() -> list[type[Check]]:
    """Return checks: each proves one thing of a checkpoint (``msp verify``)."""
    raise NotImplementedError


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
def msp_report_section(record: dict[str, Any]) -> Section | None:
    """Return a section for the report (``msp report``), or None if there is nothing to say.

    ``record["schema"]`` says what it is of: ``msp_plugin/run``, the contents of run.json with those of
    allocation.json under ``allocation``, or ``msp_plugin/compare``, the contents of compare.json.
    """
