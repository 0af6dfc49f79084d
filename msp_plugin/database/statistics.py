"""Collect the calibration statistics of units, while the samples pass through a model block by block."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.models.offload import linear, onloaded
from msp_plugin.passes.by_block import BlockPass, runs_by_block
from msp_plugin.passes.observe import in_groups, observe_inputs
from msp_plugin.plan.units import Unit
from msp_plugin.pruning.base import Pruner
from msp_plugin.runtime.ranks import Ranks

log = logging.getLogger(__name__)

#: Returns a context in which a block, by its number, holds the weights that the next block's inputs come from.
PrunedBlock = Callable[[int], AbstractContextManager[None]]

#: Tokens on which it is tested whether the model runs block by block.
CHECKED_TOKENS = 64


@dataclass(frozen=True)
class StatisticsCollector:
    """Passes samples through a model and collects a method's statistics.

    Args:
        batch_tokens: tokens of one forward pass.
        statistics_bytes: memory for statistics; a block with more of them is run once per group of its units.
        ranks: each passes all samples, for units of its own.
        report: called after each forward pass of a block.
    """

    model: torch.nn.Module
    pruner: Pruner
    data: CalibrationSet
    batch_tokens: int
    statistics_bytes: int
    ranks: Ranks
    report: Callable[[], None] = lambda: None

    def statistics(
        self, units: Sequence[Unit], last: int | None, pruned: PrunedBlock | None
    ) -> Iterator[tuple[Unit, Any]]:
        """Yield each unit of this rank with its statistic, block after block; no reference to it is kept.

        Args:
            units: in the order of the blocks.
            last: the last block of any rank's units; None if there are none.
            pruned: None leaves each block its own weights.

        Raises:
            NumericsError: see collect.
        """
        if last is None or not self.pruner.needs_statistics:
            yield from ((unit, _new_statistic(self.model, unit, self.pruner)) for unit in units)
            return
        start = self.data.samples[0][:CHECKED_TOKENS]
        if all(self.ranks.gather(lambda: runs_by_block(self.model, start))):
            parts = self._by_block(units, last, pruned)
        else:
            log.info("%s does not run block by block: whole forward passes", type(self.model).__name__)
            parts = self._by_pass(units, last, pruned)
        for statistics in parts:
            for unit in units:
                if unit.name in statistics:
                    yield unit, statistics.pop(unit.name)

    def _by_block(
        self, units: Sequence[Unit], last: int, pruned: PrunedBlock | None
    ) -> Iterator[dict[str, Any]]:
        """Yield the statistics of one group of units after the other, by unit name; each block runs by itself."""
        walk = BlockPass(self.model, self.data, self.batch_tokens, self.report)
        by_block = _by_number(units)
        for number in range(last + 1):
            groups = self._groups(by_block.get(number, ())) or [[]]
            for group in groups:
                advance = pruned is None and group is groups[-1] and number < last
                if group or advance:
                    statistics, add = _collecting(self.model, group, self.pruner)
                    walk.run(group, add, advance=advance)
                    yield statistics
            if pruned is not None and number < last:
                self.ranks.gather(lambda: None)  # wait for the layers of this block that other ranks write
                with pruned(number):
                    walk.run()

    def _by_pass(
        self, units: Sequence[Unit], last: int, pruned: PrunedBlock | None
    ) -> Iterator[dict[str, Any]]:
        """Yield the statistics of one group of units after the other, by unit name, from whole forward passes."""
        if pruned is None:
            yield from map(self._collect, self._groups(units))
            return
        by_block = _by_number(units)
        with ExitStack() as stack:
            for number in range(last + 1):
                yield from map(self._collect, self._groups(by_block.get(number, ())))
                self.ranks.gather(lambda: None)  # wait for the layers of this block that other ranks write
                stack.enter_context(pruned(number))

    def _groups(self, units: Iterable[Unit]) -> list[list[Unit]]:
        """Return the units in groups whose statistics are held at once."""

        def need(unit: Unit) -> int:
            return self.pruner.statistic_bytes(unit.layers[0])

        return list(in_groups(units, need, self.statistics_bytes))

    def _collect(self, units: Sequence[Unit]) -> dict[str, Any]:
        return collect(self.model, units, self.pruner, self.data, self.batch_tokens)


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
    statistics, add = _collecting(model, units, pruner)
    observe_inputs(model, data, units, add, batch_tokens=batch_tokens)
    return statistics


def _by_number(units: Sequence[Unit]) -> dict[int, list[Unit]]:
    """Return the units, which are in the order of the blocks, by the number of their block."""
    return {number: list(group) for number, group in groupby(units, key=lambda unit: unit.block)}


def _collecting(
    model: torch.nn.Module, units: Sequence[Unit], pruner: Pruner
) -> tuple[dict[str, Any], Callable[[str, torch.Tensor], None]]:
    """Return empty statistics by unit name, and a function that adds inputs to the statistic of a unit's name."""
    modules = {unit.name: linear(model, unit.layers[0].name) for unit in units}
    statistics = {unit.name: _new_statistic(model, unit, pruner) for unit in units}

    def add(unit: str, inputs: torch.Tensor) -> None:
        statistics[unit] = pruner.observe(modules[unit], inputs, statistics[unit])

    return statistics, add


def _new_statistic(model: torch.nn.Module, unit: Unit, pruner: Pruner) -> Any:
    with onloaded(linear(model, unit.layers[0].name)) as module:
        return pruner.layer_statistic(unit.layers[0], module)
