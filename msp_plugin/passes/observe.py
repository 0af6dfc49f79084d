"""Observe the inputs of layers over calibration text, and group the layers that share one.

Shape legend: B samples, T tokens of a sample, N tokens routed to an expert, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import NumericsError
from msp_plugin.models.layers import decoder_blocks
from msp_plugin.models.offload import input_device, linear
from msp_plugin.plan.units import Layer, Unit, group_layers
from msp_plugin.progress import Progress, silent

Item = TypeVar("Item")


class EnoughError(Exception):
    """Raised to end a forward pass after the last observed layer."""


def by_block(model: torch.nn.Module, layers: Sequence[str]) -> dict[int, tuple[str, ...]]:
    """Return the names of the layers by decoder block, in their order."""
    prefix, _ = decoder_blocks(model)
    blocks: dict[int, tuple[str, ...]] = {}
    for name in layers:
        number = int(name[len(prefix) + 1 :].partition(".")[0])
        blocks[number] = (*blocks.get(number, ()), name)
    return blocks


def units_of(model: torch.nn.Module, layers: Sequence[str]) -> tuple[Unit, ...]:
    """Return the layers grouped by their input: layers that inference fuses read the same tensor."""
    placed = []
    for block, names in by_block(model, layers).items():
        for name in names:
            module = linear(model, name)
            placed.append((block, Layer(name, module.out_features, module.in_features)))
    return group_layers(placed).units


def in_groups(items: Iterable[Item], need: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Yield groups of consecutive items whose ``need`` adds up to at most ``limit``; a larger item comes alone."""
    group: list[Item] = []
    total = 0
    for item in items:
        size = need(item)
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield group


def all_finite(x: torch.Tensor) -> bool:
    """Return True if no number is infinite or NaN.

    A finite sum proves it at a small part of the cost of testing every number; they are tested only if it overflows.
    """
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


@torch.no_grad()
def observe_inputs(
    model: torch.nn.Module,
    data: CalibrationSet,
    units: Sequence[Unit],
    add: Callable[[str, torch.Tensor], None],
    *,
    batch_tokens: int = 4096,
    progress: Progress = silent,
) -> None:
    """Run the samples through the model up to the block of the last unit; the model is left as it was.

    Args:
        add: called with (a unit's name, a batch of its inputs), [B, T, I] or [N, I] in the model's dtype.
        batch_tokens: most tokens of one forward pass.

    Raises:
        NumericsError: an input is not finite, or a unit saw no token at all.
    """
    device = input_device(model)
    reached: set[str] = set()
    done = 0

    def stop(module: torch.nn.Module, args: object, output: object) -> None:
        if len(seen) == len(units):
            raise EnoughError

    with observed(model, units, add) as seen:
        last = max(unit.block for unit in units)
        handle = decoder_blocks(model)[1][last].register_forward_hook(stop)
        try:
            for ids in data.batches(batch_tokens):
                seen.clear()
                with suppress(EnoughError):
                    model(ids.to(device), use_cache=False)
                reached |= seen
                done += len(ids)
                progress(done, len(data))
        finally:
            handle.remove()
    check_reached(units, reached)


def check_reached(units: Sequence[Unit], reached: Collection[str]) -> None:
    """Raise unless ``reached``, the names of the units that saw a token, has all units.

    Raises:
        NumericsError: units are missing; the message names the first one.
    """
    missed = [unit.layers[0].name for unit in units if unit.name not in reached]
    if missed:
        raise NumericsError(
            f"{len(missed)} layers saw no calibration token, e.g. {missed[0]}",
            hint="give more calibration text, or add the layers to ignore",
        )


def as_samples(inputs: torch.Tensor) -> torch.Tensor:
    """Return a layer's inputs as [B, T, I] or [N, I]; some layers of DeepSeek's attention get [B, 1, T, I]."""
    return inputs.flatten(1, -2) if inputs.dim() > 3 else inputs


@contextmanager
def observed(
    model: torch.nn.Module, units: Sequence[Unit], add: Callable[[str, torch.Tensor], None]
) -> Iterator[set[str]]:
    """Pass the units' inputs to ``add`` (see observe_inputs); yield the set of the units reached so far, by name."""
    seen: set[str] = set()
    handles = []

    def hook_for(unit: Unit) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            inputs = as_samples(args[0])
            if inputs.numel() == 0:
                return
            if not all_finite(inputs):
                raise NumericsError(
                    f"the input of {unit.layers[0].name} is not finite",
                    hint="the activations overflow: try dtype float32 or bfloat16",
                )
            add(unit.name, inputs)
            seen.add(unit.name)

        return hook

    try:
        for unit in units:
            module = model.get_submodule(unit.layers[0].name)
            handles.append(module.register_forward_pre_hook(hook_for(unit)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
