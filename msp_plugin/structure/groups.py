"""The groups of each unit of a table: heads and channels, as widths count them."""

from __future__ import annotations

from dataclasses import replace

import torch

from msp_plugin.errors import RecipeError
from msp_plugin.plan.units import Groups, Unit, UnitTable
from msp_plugin.structure.halves import MLP, Half, find_halves


def with_groups(model: torch.nn.Module, table: UnitTable, quantum: int) -> UnitTable:
    """Return the table with the groups of its layers; its units are attentions and MLPs of the model.

    Args:
        quantum: the channels that a width keeps of an MLP are a multiple of it; heads come one by one.

    Raises:
        ModelError: heads or channels of this model cannot be removed one by one (see find_halves).
        RecipeError: ``quantum`` does not divide the channels, or a unit is no whole attention or MLP.
    """
    halves = {half.name: half for half in find_halves(model)}
    return UnitTable(tuple(_grouped(unit, halves.get(unit.name), quantum) for unit in table))


def _grouped(unit: Unit, half: Half | None, quantum: int) -> Unit:
    """Return a unit with the groups of its layers."""
    names = {layer.name for layer in unit.layers}
    if half is None or names != {*half.inputs, half.output}:
        raise RecipeError(
            f"{unit.name} is no whole attention or MLP, so that no width fits it",
            hint="use granularity half, and protect layers instead of ignoring some of a half",
        )
    step = quantum if half.kind == MLP else 1
    if half.groups % step:
        raise RecipeError(
            f"{half.name} has {half.groups} channels, no multiple of quantum = {quantum}",
            hint="give a quantum that divides them, e.g. "
            f"{max(n for n in range(1, quantum + 1) if half.groups % n == 0)}",
        )
    layers = (
        replace(layer, groups=Groups(half.groups, step), inner=layer.name != half.output)
        for layer in unit.layers
    )
    return replace(unit, layers=tuple(layers))
