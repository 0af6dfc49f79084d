"""Build the level database: calibration statistics once, then every layer at every level."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from msp_plugin.calibration import CalibrationSet
from msp_plugin.database.store import LayerErrors, LevelDatabase
from msp_plugin.errors import NumericsError, OutputError
from msp_plugin.models import decoder_blocks
from msp_plugin.plan.units import Layer, Unit, UnitTable, shared_inputs
from msp_plugin.pruning.base import Pruner
from msp_plugin.sensitivity.base import Progress, silent

log = logging.getLogger(__name__)

#: Statistics held at once. With more to collect, the samples are passed through the model again.
STATISTICS_BYTES = 4 * 1024**3


def build_database(
    database: LevelDatabase,
    model: torch.nn.Module,
    table: UnitTable,
    pruner: Pruner,
    data: CalibrationSet,
    *,
    batch_tokens: int = 4096,
    statistics_bytes: int = STATISTICS_BYTES,
    progress: Progress = silent,
) -> int:
    """Write the missing layers of the database and return how many were written.

    The layers are pruned from the dense model's inputs, each on its own. Layers that inference fuses have
    the same input, so they share one statistic. They are taken in groups whose statistics fit into
    ``statistics_bytes``; each group costs one forward pass over the samples up to its last block.

    Raises:
        NumericsError: an activation is not finite, or the method fails on a layer.
    """
    start = time.monotonic()
    missing = [u for u in shared_inputs(table) if not all(database.has(layer) for layer in u.layers)]
    total = sum(len(unit.layers) for unit in missing)
    written = 0
    for group in _groups(missing, model, pruner, statistics_bytes):
        statistics = collect(model, group, pruner, data, batch_tokens)
        for unit in group:
            statistic = statistics.pop(unit.name)
            for layer in unit.layers:
                _write_layer(database, model, layer, pruner, statistic)
                written += 1
                progress(written, total)
    if written:
        seconds = time.monotonic() - start
        log.info("level database: %d layers x %d levels, %.1f s", written, len(database.menu), seconds)
    else:
        log.info("level database: %d layers reused from %s", len(table.layers), database.path)
    return written


def check_space(database: LevelDatabase, model: torch.nn.Module, table: UnitTable) -> None:
    """Raise if the disk cannot hold the layers that are still missing.

    Raises:
        OutputError: it cannot; the need, what is free and where are named.
    """
    copies = len({"dense", *(level.name for level in database.menu)})
    need = sum(
        copies * layer.weights * model.get_submodule(layer.name).weight.element_size()
        for layer in table.layers
        if not database.has(layer)
    )
    where = next(p for p in (database.path, *database.path.absolute().parents) if p.exists())
    free = shutil.disk_usage(where).free
    if need > free:
        raise OutputError(
            f"the level database needs {need / 2**30:.1f} GiB, {where} has {free / 2**30:.1f} GiB free",
            hint="set cache (or MSP_CACHE) to a larger disk, or use fewer levels",
        )


def _groups(
    units: Sequence[Unit], model: torch.nn.Module, pruner: Pruner, limit: int
) -> Iterator[list[Unit]]:
    group: list[Unit] = []
    held = 0
    for unit in units:
        need = pruner.statistic_bytes(model.get_submodule(unit.layers[0].name))
        if group and held + need > limit:
            yield group
            group, held = [], 0
        group.append(unit)
        held += need
    if group:
        yield group


class _EnoughError(Exception):
    """Ends a forward pass after the last layer that is observed."""


@torch.no_grad()
def collect(
    model: torch.nn.Module,
    units: Sequence[Unit],
    pruner: Pruner,
    data: CalibrationSet,
    batch_tokens: int,
) -> dict[str, Any]:
    """Return each unit's statistic over all samples, by unit name; the model is left as it was.

    Raises:
        NumericsError: a layer's input is not finite, or a layer saw no token at all.
    """
    statistics = {u.name: pruner.new_statistic(model.get_submodule(u.layers[0].name)) for u in units}
    if not pruner.needs_statistics:
        return statistics
    device = next(model.parameters()).device
    with _observed(model, units, pruner, statistics) as reached:
        for ids in data.batches(batch_tokens):
            with suppress(_EnoughError):
                model(ids.to(device), use_cache=False)
    missed = [unit.layers[0].name for unit in units if unit.name not in reached]
    if missed:
        raise NumericsError(
            f"{len(missed)} layers saw no calibration token, e.g. {missed[0]}",
            hint="give more calibration text, or add the layers to ignore",
        )
    return statistics


@contextmanager
def _observed(
    model: torch.nn.Module, units: Sequence[Unit], pruner: Pruner, statistics: dict[str, Any]
) -> Iterator[set[str]]:
    """Feed the units' inputs to ``statistics``; yield the set of the names that were reached."""
    reached: set[str] = set()
    last = max(units, key=lambda unit: unit.block).block
    waiting: set[str] = set()
    handles = []

    def hook_for(unit: Unit):
        def hook(module: torch.nn.Linear, args: tuple) -> None:
            if args[0].numel() == 0:
                return
            if not torch.isfinite(args[0]).all():
                raise NumericsError(
                    f"the input of {unit.layers[0].name} is not finite",
                    hint="the activations overflow: try dtype float32 or bfloat16",
                )
            statistics[unit.name] = pruner.observe(module, args[0], statistics[unit.name])
            waiting.discard(unit.name)
            reached.add(unit.name)

        return hook

    def start(module: torch.nn.Module, args: Any) -> None:
        waiting.update(unit.name for unit in units)

    def stop(module: torch.nn.Module, args: Any, output: Any) -> None:
        if not waiting:
            raise _EnoughError

    try:
        handles.append(model.get_input_embeddings().register_forward_pre_hook(start))
        for unit in units:
            module = model.get_submodule(unit.layers[0].name)
            handles.append(module.register_forward_pre_hook(hook_for(unit)))
        handles.append(decoder_blocks(model)[1][last].register_forward_hook(stop))
        yield reached
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _write_layer(
    database: LevelDatabase, model: torch.nn.Module, layer: Layer, pruner: Pruner, statistic: Any
) -> None:
    module = model.get_submodule(layer.name)
    dense = module.weight.detach()
    levels = [level for level in database.menu if not level.is_dense]
    weights, errors = {"dense": dense}, {"dense": LayerErrors(0.0, 0.0)}
    for level, pruned in zip(levels, pruner.prune_levels(module, statistic, levels, layer.name), strict=True):
        if not torch.isfinite(pruned).all():
            raise NumericsError(
                f"method {pruner.name!r} returned weights that are not finite for {layer.name} at {level}",
                hint="give more calibration samples, or a larger dampening",
            )
        delta = (pruned.float() - dense.float()).contiguous()
        error = LayerErrors(float(delta.double().square().sum()), pruner.output_error(delta, statistic))
        weights[level.name], errors[level.name] = pruned, error
    database.write(layer, weights, errors)
