"""Which groups of a half contribute exactly zero, and which of them an export leaves out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.models.layers import decoder_blocks
from msp_plugin.structure.halves import MLP, Half, find_halves, is_mixed


@dataclass(frozen=True)
class Structure:
    """The halves of a model, and what of them contributes nothing.

    Args:
        halves: block by block.
        depth: number of blocks.
        mixed: some blocks attend to a sliding window and others do not.
        silent: by half, bool[groups], True for a group that contributes nothing (see read_groups).
        empty: by half, bool[groups], True for one of these without any weight.
        biased: names of the halves that add a bias to the hidden state.
    """

    halves: tuple[Half, ...]
    depth: int
    mixed: bool
    silent: Mapping[str, torch.Tensor]
    empty: Mapping[str, torch.Tensor]
    biased: frozenset[str]


def read_structure(model: torch.nn.Module, read: Callable[[str], torch.Tensor | None]) -> Structure:
    """Return the structure of a model, whose own tensors may be on ``meta``; every weight of its halves is read once.

    Args:
        read: returns a tensor by name, None if the model has none of that name.

    Raises:
        ModelError: see find_halves.
        NumericsError: see read_groups.
    """
    halves, (_, blocks) = find_halves(model), decoder_blocks(model)
    groups = {half.name: read_groups(half, read) for half in halves}
    return Structure(
        halves,
        len(blocks),
        is_mixed(model),
        {name: silent for name, (silent, _) in groups.items()},
        {name: empty for name, (_, empty) in groups.items()},
        frozenset(half.name for half in halves if has_bias(half, read)),
    )


def read_groups(half: Half, read: Callable[[str], torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (silent, empty), each bool[groups].

    A group is silent if its contribution to the hidden state is zero whatever the text. That is so where its columns of
    the output projection are zero, or all its rows (and biases) of a projection that silences it. It is empty if all
    its weights are zero. Both are read off the weights alone.

    Args:
        read: returns a tensor by name, None if the model has none of that name.

    Raises:
        NumericsError: a weight of the half is not finite: zero times infinity would be no zero.
    """
    silent = _largest(half, half.output, read, dim=1) == 0
    empty = silent.clone()
    for layer in half.inputs:
        weights, biases = _largest(half, layer, read, dim=0), _largest_bias(half, layer, read)
        empty &= weights == 0
        if layer in half.silencing:
            silent |= (weights == 0) & (biases == 0)
    return silent, empty


def has_bias(half: Half, read: Callable[[str], torch.Tensor | None]) -> bool:
    """Return True if a half adds a bias to the hidden state, which it does without any group."""
    bias = read(f"{half.output}.bias")
    return bias is not None and bool((bias != 0).any())


def kept_groups(
    half: Half, silent: torch.Tensor, *, least: int, quantum: int = 1, fours: bool = False
) -> tuple[int, ...]:
    """Return the groups of a half that stay, in order; none if it is dropped.

    Silent groups, the first ones, stay to make up ``least`` groups and to fill an MLP's channels up to a multiple of
    ``quantum``.

    Args:
        silent: bool[groups], True for those that may go.
        fours: take silent groups where each four of the others, counted from the first, stays an aligned four: after the
            last of them, and elsewhere by four. Where there are too few such places, take the first ones.

    Raises:
        RecipeError: ``quantum`` does not divide the channels.
    """
    step = quantum if half.kind == MLP else 1
    if half.groups % step:
        raise RecipeError(
            f"{half.name} has {half.groups} channels, no multiple of quantum = {quantum}",
            hint="give a quantum that divides them, e.g. 1",
        )
    used = int((~silent).sum())
    count = -(-max(used, least) // step) * step - used
    fillers = torch.nonzero(silent).flatten()
    if fours and count:
        fillers = _between_fours(silent, count, fillers)
    kept = ~silent
    kept[fillers[:count]] = True
    return tuple(torch.nonzero(kept).flatten().tolist())


def _between_fours(silent: torch.Tensor, count: int, first: torch.Tensor) -> torch.Tensor:
    """Return so many silent groups between which aligned fours of the others stay; ``first`` where there are too few."""
    before = (~silent).cumsum(0)[first]  # by silent group, how many of the others stand before it
    after = first[before == before[-1]] if silent[-1] else first[:0]
    inside = [
        run[: len(run) // 4 * 4]
        for place in before[: len(first) - len(after)].unique().tolist()
        if place % 4 == 0 and len(run := first[before == place])
    ]
    spaces = torch.cat([first[:0], *inside])
    needed = -(-max(0, count - len(after)) // 4) * 4
    if needed > min(len(spaces), count):
        return first
    return torch.cat([spaces[:needed], after[: count - needed]])


def _largest(half: Half, layer: str, read: Callable[[str], torch.Tensor | None], *, dim: int) -> torch.Tensor:
    """Return [groups], the largest magnitude in each group's slice of a layer's weight along ``dim``.

    Raises:
        NumericsError: one is not finite.
    """
    weight = read(f"{layer}.weight")
    assert weight is not None, f"a half without {layer}"
    return _finite(weight.abs().amax(dim=1 - dim), half, layer)


def _largest_bias(half: Half, layer: str, read: Callable[[str], torch.Tensor | None]) -> torch.Tensor:
    """Return [groups], the largest magnitude of each group's biases of an input projection; zeros if it has none.

    Raises:
        NumericsError: one is not finite.
    """
    bias = read(f"{layer}.bias")
    return torch.zeros(half.groups) if bias is None else _finite(bias.abs(), half, layer)


def _finite(magnitudes: torch.Tensor, half: Half, layer: str) -> torch.Tensor:
    """Return [groups], the largest of each group's magnitudes [groups * n].

    Raises:
        NumericsError: one is not finite.
    """
    largest = magnitudes.view(half.groups, -1).amax(dim=1)
    if not torch.isfinite(largest).all():
        raise NumericsError(
            f"{layer} holds weights that are not finite", hint="repair or download the checkpoint anew"
        )
    return largest
