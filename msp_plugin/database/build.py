"""Build the level database: calibration statistics once, then every layer at every level."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Sequence
from typing import Any

import torch

from msp_plugin.activations import in_groups, observe_inputs
from msp_plugin.calibration import CalibrationSet
from msp_plugin.database.bitmask import bitmask_bytes
from msp_plugin.database.store import LayerErrors, LevelDatabase
from msp_plugin.errors import NumericsError, OutputError
from msp_plugin.plan.units import Layer, Unit, UnitTable, shared_inputs
from msp_plugin.progress import Progress, silent
from msp_plugin.pruning.base import Pruner

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

    def need(unit: Unit) -> int:
        return pruner.statistic_bytes(model.get_submodule(unit.layers[0].name))

    for group in in_groups(missing, need, statistics_bytes):
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
    need = 0
    for layer in table.layers:
        if not database.has(layer):
            size = model.get_submodule(layer.name).weight.element_size()
            out, into = layer.out_features, layer.in_features
            need += sum(
                level.kept(out, into) * size + bitmask_bytes(out, into)
                for level in database.menu
                if not level.is_dense
            )
    where = next(p for p in (database.path, *database.path.absolute().parents) if p.exists())
    free = shutil.disk_usage(where).free
    if need > free:
        raise OutputError(
            f"the level database needs {need / 2**30:.1f} GiB, {where} has {free / 2**30:.1f} GiB free",
            hint="set cache (or MSP_CACHE) to a larger disk, or use fewer levels",
        )


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
    modules = {unit.name: model.get_submodule(unit.layers[0].name) for unit in units}
    statistics = {unit: pruner.new_statistic(module) for unit, module in modules.items()}
    if not pruner.needs_statistics:
        return statistics

    def add(unit: str, inputs: torch.Tensor) -> None:
        statistics[unit] = pruner.observe(modules[unit], inputs, statistics[unit])

    observe_inputs(model, data, units, add, batch_tokens=batch_tokens)
    return statistics


@torch.no_grad()
def _write_layer(
    database: LevelDatabase, model: torch.nn.Module, layer: Layer, pruner: Pruner, statistic: Any
) -> None:
    module = model.get_submodule(layer.name)
    dense = module.weight.detach()
    levels = [level for level in database.menu if not level.is_dense]
    weights, errors = {}, {"dense": LayerErrors(0.0, 0.0)}
    for level, pruned in zip(levels, pruner.prune_levels(module, statistic, levels, layer.name), strict=True):
        delta = (pruned.float() - dense.float()).contiguous()
        change = float(torch.linalg.vector_norm(delta, dtype=torch.float64) ** 2)
        if not math.isfinite(change):
            raise NumericsError(
                f"method {pruner.name!r} returned weights that are not finite for {layer.name} at {level}",
                hint="give more calibration samples, or a larger dampening",
            )
        weights[level.name] = pruned
        errors[level.name] = LayerErrors(change, pruner.output_error(delta, statistic))
    database.write(layer, weights, errors)
