"""Build the level database: prune every layer to every level, from calibration statistics collected once."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.bitmask import bitmask_bytes
from msp_plugin.database.gradients import gradient_scores
from msp_plugin.database.statistics import StatisticsCollector
from msp_plugin.database.store import LayerErrors, LevelDatabase
from msp_plugin.errors import NumericsError
from msp_plugin.models.offload import linear, onloaded
from msp_plugin.models.weights import weight_place
from msp_plugin.plan.levels import DENSE, Level
from msp_plugin.plan.units import Layer, Unit, UnitTable, group_layers, pruned_together, shared_inputs
from msp_plugin.progress import NotedProgress, Repeated, silent
from msp_plugin.pruning.base import Pruner, UnitInputs
from msp_plugin.runtime.disk import check_free
from msp_plugin.runtime.ranks import ALONE, Ranks

log = logging.getLogger(__name__)

#: Tokens of one forward pass. Beside the model, a build needs most of its memory for a batch's activations inside a
#: block: 0.17 GB for 4,096 tokens and 97 M weights.
BATCH_TOKENS = 4096
#: Memory of the statistics held at once. A block that has more is run again.
STATISTICS_BYTES = 4 * 1024**3


def build_database(
    database: LevelDatabase,
    model: torch.nn.Module,
    table: UnitTable,
    pruner: Pruner,
    data: CalibrationSet,
    *,
    prefix: Mapping[str, str] | None = None,
    only_prefix: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    statistics_bytes: int = STATISTICS_BYTES,
    progress: NotedProgress = silent,
    ranks: Ranks = ALONE,
) -> int:
    """Write the missing layers of the database and return how many were written, by all ranks.

    The samples pass through the model block by block, and a block's layers are pruned as soon as it has run. Layers
    that inference fuses have the same input, so they share one statistic. A block whose statistics take more than
    ``statistics_bytes`` is run once per group of its layers. Memory beyond the model: the hidden states of all samples
    (tokens * hidden size * bytes of a number), one block's statistics and one layer's levels.

    Without a ``prefix``, all layers are pruned from their inputs in the dense model. With one, a block's layers are
    pruned from their inputs behind the pruned blocks before it, as in the pruning of a whole model; each block runs
    once more with its pruned weights.

    In a model that hands more than the hidden state from block to block, each group of ``statistics_bytes`` costs a
    forward pass up to its last block.

    Ranks share the layers. Each passes all samples through the blocks and adds up the inputs of its own layers in the
    order of one process, so that the weights are the same bytes on any number of ranks. Sums of the ranks' statistics
    would differ by rounding, and behind a prefix the difference grows: it decides between two equally good weights of
    one block, and most of SparseGPT's weights of the later blocks differ then.

    Args:
        prefix: the name of a level by layer, for all layers of the table; the menu has these levels.
        only_prefix: write only each layer's level of the prefix, and nothing for a layer that stays dense.

    Raises:
        NumericsError: an activation is not finite, or the method fails on a layer.
    """
    start = time.monotonic()

    def levels_of(layer: Layer) -> list[Level]:
        levels = [level for level in database.menu if not level.is_dense]
        if prefix is not None and only_prefix:
            return [level for level in levels if level.name == prefix[layer.name]]
        return levels

    def find_missing() -> list[Unit]:
        parts = pruned_together(table) if pruner.prunes_units else shared_inputs(table)
        return [part for part in parts if not all(database.has(layer) for layer in part.layers)]

    missing = sorted(ranks.on_rank_zero(find_missing), key=lambda unit: unit.block)
    own = ranks.share(missing)
    total = sum(len(part.layers) for part in own)
    units = (
        table
        if pruner.prunes_units
        else group_layers(((u.block, a) for u in table for a in u.layers), "layer")
    )

    def write() -> int:
        written = 0
        scores = gradient_scores(model, own, pruner, data) if pruner.gradient_order else {}
        pruned = partial(_pruned_block, database, model, table, prefix) if prefix else None
        report = Repeated(progress)  # between two layers lie forward passes of all samples
        collector = StatisticsCollector(
            model, pruner, data, batch_tokens, statistics_bytes, ranks, report.again
        )
        last = missing[-1].block if missing else None
        inputs = shared_inputs(UnitTable(tuple(own)))
        if own:
            report(0, total)
        for unit, statistics in _with_statistics(collector.statistics(inputs, last, pruned), units):
            if levels := levels_of(unit.layers[0]):
                own_scores = {layer.name: scores[layer.name] for layer in unit.layers if layer.name in scores}
                _write_unit(database, model, unit, pruner, statistics, own_scores, levels)
            written += len(unit.layers)
            report(written, total)
        return written

    written_here = ranks.collective(write)
    written = sum(ranks.gather(lambda: written_here))
    if written:
        seconds = time.monotonic() - start
        log.info("level database: %d layers x %d levels, %.1f s", written, len(database.menu), seconds)
    else:
        log.info("level database: %d layers reused from %s", len(table.layers), database.path)
    return written


def _with_statistics(
    statistics: Iterator[tuple[Unit, Any]], units: Iterable[Unit]
) -> Iterator[tuple[Unit, dict[str, Any]]]:
    """Yield each unit, as soon as all of them are there, with the statistics of its layers by name."""
    owners = {layer.name: unit for unit in units for layer in unit.layers}
    held: dict[str, Any] = {}
    for shared, statistic in statistics:
        held |= {layer.name: statistic for layer in shared.layers}
        for unit in dict.fromkeys(owners[layer.name] for layer in shared.layers):
            if all(layer.name in held for layer in unit.layers):
                yield unit, {layer.name: held.pop(layer.name) for layer in unit.layers}


@contextmanager
def _pruned_block(
    database: LevelDatabase, model: torch.nn.Module, table: UnitTable, prefix: Mapping[str, str], number: int
) -> Iterator[None]:
    """Let a block's layers hold their weights of the database, at the levels of ``prefix``, during the block."""
    layers = [layer.name for unit in table if unit.block == number for layer in unit.layers]
    places = {name: weight_place(linear(model, name)) for name in layers if prefix[name] != DENSE.name}
    for place in places.values():
        place.enter()
    try:
        for name, place in places.items():
            place.put(partial(database.weight_for, place, name, prefix[name]))
        yield
    finally:
        for place in places.values():
            place.leave()


def check_space(database: LevelDatabase, model: torch.nn.Module, table: UnitTable) -> None:
    """Raise if the disk cannot hold the layers that are still missing; a damaged file makes room for its new one.

    Raises:
        OutputError: it cannot; the message gives the need, the free space and the place.
    """
    need = most = 0
    for layer in table.layers:
        if not database.has(layer):
            size = linear(model, layer.name).weight.element_size()
            mask = bitmask_bytes(layer.out_features, layer.in_features)
            levels = [level for level in database.menu if not level.is_dense and not level.misfit(layer)]
            own = sum(level.kept(layer) * size + mask for level in levels)
            old = database.file(layer.name)
            replaced = min(own, old.stat().st_size) if old.exists() else 0
            need, most = need + own - replaced, max(most, replaced)
    need += most  # old and new lie side by side, one layer at a time
    hint = "set cache (or MSP_CACHE) to a larger disk, or use fewer levels"
    check_free(database.path, need, "the level database needs", hint)


@torch.no_grad()
def _write_unit(
    database: LevelDatabase,
    model: torch.nn.Module,
    unit: Unit,
    pruner: Pruner,
    statistics: Mapping[str, Any],
    scores: Mapping[str, torch.Tensor],
    levels: Sequence[Level],
) -> None:
    """Write the weights of a unit's layers at the levels, with their errors.

    What a level takes from an attention or MLP is the error of its last layer; the rows of the others that go with it
    change nothing else, so that they have no error of their own.

    Raises:
        NumericsError: the method returns weights that are not finite.
    """
    layers = {layer.name: layer for layer in unit.layers}
    with ExitStack() as stack:
        modules = {name: stack.enter_context(onloaded(linear(model, name))) for name in layers}
        for name, by_level in pruner.prune_unit(UnitInputs(unit, modules, statistics, scores), levels):
            dense, statistic = modules[name].weight.detach(), statistics[name]
            weights, rows, errors = {}, {}, {"dense": LayerErrors(0.0, 0.0)}
            for level, pruned in zip(levels, by_level, strict=True):
                delta = (pruned.float() - dense.float()).contiguous()
                if level.narrows and layers[name].inner:
                    delta *= (pruned != 0).any(dim=1, keepdim=True)
                change = float(torch.linalg.vector_norm(delta, dtype=torch.float64) ** 2)
                if not math.isfinite(change):
                    raise NumericsError(
                        f"method {pruner.name!r} returned weights that are not finite for {name} at {level}",
                        hint="give more calibration samples, or a larger dampening",
                    )
                weights[level.name] = pruned
                by_row = pruner.row_errors(delta, statistic)
                if by_row is None:
                    output = pruner.output_error(delta, statistic)
                else:
                    rows[level.name], output = by_row, float(by_row.sum())
                errors[level.name] = LayerErrors(change, output)
            database.write(layers[name], weights, errors, rows)
