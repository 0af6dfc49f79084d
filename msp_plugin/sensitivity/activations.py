"""The inputs of layers over calibration text: which layers share one, and what is seen of them.

Shape legend: T tokens, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

from msp_plugin.calibration import CalibrationSet
from msp_plugin.errors import NumericsError
from msp_plugin.models import decoder_blocks
from msp_plugin.plan.units import Layer, Unit, group_layers
from msp_plugin.sensitivity.base import Progress, silent

#: Tokens of one forward pass.
BATCH_TOKENS = 4096

Item = TypeVar("Item")


class _EnoughError(Exception):
    """Ends a forward pass after the last layer that is observed."""


def by_block(model: torch.nn.Module, layers: Sequence[str]) -> dict[int, tuple[str, ...]]:
    """Return the names of the layers by decoder block, in their order."""
    prefix, _ = decoder_blocks(model)
    blocks: dict[int, tuple[str, ...]] = {}
    for name in layers:
        number = int(name[len(prefix) + 1 :].partition(".")[0])
        blocks[number] = (*blocks.get(number, ()), name)
    return blocks


def units_of(model: torch.nn.Module, layers: Sequence[str]) -> tuple[Unit, ...]:
    """Return the layers grouped by their input: those that inference fuses read the same tensor."""
    found = []
    for block, names in by_block(model, layers).items():
        for name in names:
            module = model.get_submodule(name)
            found.append((block, Layer(name, module.out_features, module.in_features)))
    return group_layers(found).units


def in_groups(items: Iterable[Item], need: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Yield neighbouring items whose needs add up to ``limit`` at most, or a single one beyond it."""
    group: list[Item] = []
    held = 0
    for item in items:
        if group and held + need(item) > limit:
            yield group
            group, held = [], 0
        group.append(item)
        held += need(item)
    if group:
        yield group


@torch.no_grad()
def observe_inputs(
    model: torch.nn.Module,
    data: CalibrationSet,
    units: Sequence[Unit],
    add: Callable[[str, torch.Tensor], None],
    progress: Progress = silent,
) -> None:
    """Pass the samples through the model up to the last of the units; the model is left as it was.

    Args:
        add: called with a unit's name and a batch of its inputs [T, I], in the model's dtype.

    Raises:
        NumericsError: an input is not finite, or a unit saw no token at all.
    """
    device = next(model.parameters()).device
    reached: set[str] = set()
    done = 0
    with _observed(model, units, add) as seen:
        for ids in data.batches(BATCH_TOKENS):
            seen.clear()
            with suppress(_EnoughError):
                model(ids.to(device), use_cache=False)
            reached |= seen
            done += len(ids)
            progress(done, len(data))
    missed = [unit.layers[0].name for unit in units if unit.name not in reached]
    if missed:
        raise NumericsError(
            f"{len(missed)} layers saw no calibration token, e.g. {missed[0]}",
            hint="give more calibration text, or add the layers to ignore",
        )


@contextmanager
def _observed(
    model: torch.nn.Module, units: Sequence[Unit], add: Callable[[str, torch.Tensor], None]
) -> Iterator[set[str]]:
    """Feed the units' inputs to ``add``; yield the set of the names that were reached."""
    seen: set[str] = set()
    last = max(unit.block for unit in units)
    handles = []

    def hook_for(unit: Unit):
        def hook(module: torch.nn.Linear, args: tuple) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            if not len(x):
                return
            if not torch.isfinite(x).all():
                raise NumericsError(
                    f"the input of {unit.layers[0].name} is not finite",
                    hint="the activations overflow: try dtype float32 or bfloat16",
                )
            add(unit.name, x)
            seen.add(unit.name)

        return hook

    def stop(module: torch.nn.Module, args: object, output: object) -> None:
        if len(seen) == len(units):
            raise _EnoughError

    try:
        for unit in units:
            module = model.get_submodule(unit.layers[0].name)
            handles.append(module.register_forward_pre_hook(hook_for(unit)))
        handles.append(decoder_blocks(model)[1][last].register_forward_hook(stop))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def input_norms(
    model: torch.nn.Module, data: CalibrationSet, layers: Sequence[str], progress: Progress = silent
) -> dict[str, torch.Tensor]:
    """Return by layer ||X_j||_2, the norm of each input feature over all tokens, float32[I].

    Squares are summed in float32 within a batch and in float64 over the batches.

    Raises:
        NumericsError: see observe_inputs.
    """
    units = units_of(model, layers)
    sums: dict[str, torch.Tensor | float] = {unit.name: 0.0 for unit in units}

    def add(unit: str, x: torch.Tensor) -> None:
        sums[unit] = sums[unit] + x.float().square().sum(dim=0, dtype=torch.float64)

    observe_inputs(model, data, units, add, progress)
    return {layer.name: sums[unit.name].sqrt().float() for unit in units for layer in unit.layers}


def saliences(model: torch.nn.Module, name: str, norm: torch.Tensor) -> torch.Tensor:
    """Return A = |W| * ||X||_2 of a layer, float32[O, I] (Wanda, arXiv 2306.11695, eq. 1)."""
    return model.get_submodule(name).weight.detach().float().abs() * norm
