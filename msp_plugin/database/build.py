"""Build the level database: calibration statistics once, then every layer at every level."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.store import LayerErrors, LevelDatabase
from msp_plugin.errors import NumericsError
from msp_plugin.formats.bitmask import bitmask_bytes
from msp_plugin.models.offload import linear, onloaded
from msp_plugin.models.weights import weight_place
from msp_plugin.passes.by_block import BlockPass, runs_by_block
from msp_plugin.passes.observe import in_groups, observe_inputs
from msp_plugin.plan.levels import DENSE, Level
from msp_plugin.plan.units import Layer, Unit, UnitTable, shared_inputs
from msp_plugin.progress import Progress, silent
from msp_plugin.pruning.base import Pruner
from msp_plugin.runtime.disk import check_free
from msp_plugin.runtime.ranks import ALONE, Ranks

log = logging.getLogger(__name__)

#: Tokens of one forward pass. A batch's activations inside a block are what a build needs most memory for
#: beside the model: of 97 M weights, 4,096 tokens take 0.17 GB more.
BATCH_TOKENS = 4096
#: Statistics held at once. If a block has more, it is run again.
STATISTICS_BYTES = 4 * 1024**3
#: Tokens on which it is tested whether the model runs block by block.
CHECKED_TOKENS = 64


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
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> int:
    """Write the missing layers of the database and return how many were written, by all ranks.

    With a ``prefix``, a block's layers are pruned from the inputs that they get when all blocks before it are pruned
    to the levels that it names, as a pruning of the whole model does it, one block after the other; without one,
    from the dense model's. Layers that inference fuses have
    the same input, so they share one statistic. The samples go through the model block by block, and a
    block's layers are pruned as soon as it has run; with a prefix it runs once more with what they have become. Memory beyond the model: the hidden states of all
    samples (tokens * hidden size * bytes of a number), one block's statistics and one layer's levels. A block
    whose statistics take more than ``statistics_bytes`` is run once per group of its layers.

    In a model that hands more than the hidden state from block to block, each group of ``statistics_bytes`` costs a
    forward pass up to its last block.

    Ranks share the layers. Each passes all samples through the blocks and adds up the inputs of its own layers, in the
    order of one process, so that the weights are the same bytes on any number of ranks. Parts of a statistic that
    ranks add up would differ by rounding, and behind a prefix that does not stay small: in one block a weight goes
    that was as good as another, and SparseGPT's weights of later blocks differ in most numbers.

    Args:
        prefix: the name of a level by layer, for all layers of the table; the menu holds it.
        only_prefix: write of each layer its level of the prefix only, and nothing of one that stays dense: what a
            pruning of the whole model to those levels leaves.

    Raises:
        NumericsError: an activation is not finite, or the method fails on a layer.
    """
    start = time.monotonic()

    def wanted(layer: Layer) -> list[Level]:
        names = {prefix[layer.name]} if only_prefix else {level.name for level in database.menu}
        return [level for level in database.menu if level.name in names and not level.is_dense]

    def find() -> list[Unit]:
        return [u for u in shared_inputs(table) if not all(database.has(layer) for layer in u.layers)]

    missing = sorted(ranks.on_rank_zero(find), key=lambda unit: unit.block)
    own = ranks.share(missing)
    total = sum(len(unit.layers) for unit in own)

    def write() -> int:
        written = 0
        pruned = partial(_pruned_block, database, model, table, prefix) if prefix else None
        for unit, statistic in _statistics(
            model,
            own,
            pruner,
            data,
            pruned,
            batch_tokens,
            statistics_bytes,
            ranks,
            missing[-1].block if missing else None,
        ):
            for layer in unit.layers:
                if levels := wanted(layer):
                    _write_layer(database, model, layer, pruner, statistic, levels)
                written += 1
                progress(written, total)
        return written

    written_here = ranks.collective(write)
    written = sum(ranks.gather(lambda: written_here))
    if written:
        seconds = time.monotonic() - start
        log.info("level database: %d layers x %d levels, %.1f s", written, len(database.menu), seconds)
    else:
        log.info("level database: %d layers reused from %s", len(table.layers), database.path)
    return written


def _statistics(
    model: torch.nn.Module,
    units: Sequence[Unit],
    pruner: Pruner,
    data: CalibrationSet,
    pruned: Callable[[int], AbstractContextManager[None]] | None,
    batch_tokens: int,
    statistics_bytes: int,
    ranks: Ranks,
    last: int | None,
) -> Iterator[tuple[Unit, Any]]:
    """Yield this rank's units, in the order of the blocks, each with its statistic, which nothing else holds then.

    Args:
        units: in the order of the blocks.
        pruned: lets a block, by its number, hold the weights that the next block's inputs come from; None: its own.
        last: the last block of any rank's units; None if there are none.
    """
    if last is None or not pruner.needs_statistics:
        yield from (
            (unit, _new_statistic(pruner, model.get_submodule(unit.layers[0].name))) for unit in units
        )
        return

    def groups(units: Iterable[Unit]) -> list[list[Unit]]:
        def need(unit: Unit) -> int:
            return pruner.statistic_bytes(model.get_submodule(unit.layers[0].name))

        return list(in_groups(units, need, statistics_bytes))

    if all(ranks.gather(lambda: runs_by_block(model, data.samples[0][:CHECKED_TOKENS]))):
        walk = BlockPass(model, data, batch_tokens)
        found = _by_block(walk, units, groups, pruner, pruned, ranks, last)
    else:
        log.info("%s does not run block by block: whole forward passes", type(model).__name__)
        observe = partial(collect, model, pruner=pruner, data=data, batch_tokens=batch_tokens)
        found = (
            map(observe, groups(units))
            if pruned is None
            else _by_pass(observe, units, groups, pruned, ranks, last)
        )
    for statistics in found:
        for unit in units:
            if unit.name in statistics:
                yield unit, statistics.pop(unit.name)


def _by_block(
    walk: BlockPass,
    units: Sequence[Unit],
    groups: Callable[[Iterable[Unit]], list[list[Unit]]],
    pruner: Pruner,
    pruned: Callable[[int], AbstractContextManager[None]] | None,
    ranks: Ranks,
    last: int,
) -> Iterator[dict[str, Any]]:
    """Yield the statistics of a group of units, by unit name, one group after the other.

    Args:
        groups: of units those whose statistics are held at once.
        pruned, last: see _statistics.
    """
    by_block = {number: list(some) for number, some in groupby(units, key=lambda unit: unit.block)}
    for number in range(last + 1):
        parts = groups(by_block.get(number, ())) or [[]]
        for part in parts:
            advance = pruned is None and part is parts[-1] and number < last
            if part or advance:
                statistics, add = _collector(walk.model, part, pruner)
                walk.run(part, add, advance=advance)
                yield statistics
        if pruned is not None and number < last:
            ranks.gather(lambda: None)  # wait for the layers of this block that other ranks write
            with pruned(number):
                walk.run()


def _by_pass(
    observe: Callable[[Sequence[Unit]], dict[str, Any]],
    units: Sequence[Unit],
    groups: Callable[[Iterable[Unit]], list[list[Unit]]],
    pruned: Callable[[int], AbstractContextManager[None]],
    ranks: Ranks,
    last: int,
) -> Iterator[dict[str, Any]]:
    """Yield the statistics of a group of units from whole forward passes, each behind the pruned blocks before it.

    Args:
        observe: returns the statistics of a group.
        groups, pruned, last: see _by_block.
    """
    by_block = {number: list(some) for number, some in groupby(units, key=lambda unit: unit.block)}
    with ExitStack() as stack:
        for number in range(last + 1):
            yield from map(observe, groups(by_block.get(number, ())))
            ranks.gather(lambda: None)  # wait for the layers of this block that other ranks write
            stack.enter_context(pruned(number))


@contextmanager
def _pruned_block(
    database: LevelDatabase, model: torch.nn.Module, table: UnitTable, prefix: Mapping[str, str], number: int
) -> Iterator[None]:
    """Let a block's layers hold their weights of the database at the levels of ``prefix``, then their own again."""
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
    """Raise if the disk cannot hold the layers that are still missing; an old file's room is its new one's.

    Raises:
        OutputError: it cannot; the need, what is free and where are named.
    """
    need = most = 0
    for layer in table.layers:
        if not database.has(layer):
            size = model.get_submodule(layer.name).weight.element_size()
            out, into = layer.out_features, layer.in_features
            own = sum(
                level.kept(out, into) * size + bitmask_bytes(out, into)
                for level in database.menu
                if not level.is_dense
            )
            old = database.file(layer.name)
            replaced = min(own, old.stat().st_size) if old.exists() else 0
            need, most = need + own - replaced, max(most, replaced)
    need += most  # old and new lie side by side, one layer at a time
    hint = "set cache (or MSP_CACHE) to a larger disk, or use fewer levels"
    check_free(database.path, need, "the level database needs", hint)


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
    statistics, add = _collector(model, units, pruner)
    observe_inputs(model, data, units, add, batch_tokens=batch_tokens)
    return statistics


def _collector(
    model: torch.nn.Module, units: Sequence[Unit], pruner: Pruner
) -> tuple[dict[str, Any], Callable[[str, torch.Tensor], None]]:
    """Return empty statistics by unit name, and what adds a unit's inputs to them."""
    modules = {unit.name: model.get_submodule(unit.layers[0].name) for unit in units}
    statistics = {name: _new_statistic(pruner, module) for name, module in modules.items()}

    def add(unit: str, inputs: torch.Tensor) -> None:
        statistics[unit] = pruner.observe(modules[unit], inputs, statistics[unit])

    return statistics, add


def _new_statistic(pruner: Pruner, module: torch.nn.Module) -> Any:
    with onloaded(module):
        return pruner.new_statistic(module)


@torch.no_grad()
def _write_layer(
    database: LevelDatabase, model: torch.nn.Module, layer: Layer, pruner: Pruner, statistic: Any,
    levels: Sequence[Level],
) -> None:  # fmt: skip
    with onloaded(model.get_submodule(layer.name)) as module:
        dense = module.weight.detach()
        weights, rows, errors = {}, {}, {"dense": LayerErrors(0.0, 0.0)}
        for level, pruned in zip(
            levels, pruner.prune_levels(module, statistic, levels, layer.name), strict=True
        ):
            delta = (pruned.float() - dense.float()).contiguous()
            change = float(torch.linalg.vector_norm(delta, dtype=torch.float64) ** 2)
            if not math.isfinite(change):
                raise NumericsError(
                    f"method {pruner.name!r} returned weights that are not finite for {layer.name} at {level}",
                    hint="give more calibration samples, or a larger dampening",
                )
            weights[level.name] = pruned
            by_row = pruner.row_errors(delta, statistic)
            if by_row is None:
                output = pruner.output_error(delta, statistic)
            else:
                rows[level.name], output = by_row, float(by_row.sum())
            errors[level.name] = LayerErrors(change, output)
    database.write(layer, weights, errors, rows)
