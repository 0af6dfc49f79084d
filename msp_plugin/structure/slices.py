"""Which groups of each half are kept: what that makes of tensors, and how export.json records it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from msp_plugin.errors import FormatError, shown
from msp_plugin.structure.halves import ATTENTION, Half
from msp_plugin.structure.widths import Widths


@dataclass(frozen=True)
class Slices:
    """The groups that are kept of each half of a model.

    Args:
        halves: of the model before.
        kept: by half, its groups that stay, in order; none of a dropped half.
        depth: blocks of the model before.
        renumbered: blocks without a half are gone, and those behind them move up.
    """

    halves: tuple[Half, ...]
    kept: Mapping[str, tuple[int, ...]]
    depth: int
    renumbered: bool = False

    @property
    def widths(self) -> tuple[Widths, ...]:
        """The widths of each block of the model before, once its groups are gone; 0 of what is dropped."""
        heads, kv_heads, channels = [0] * self.depth, [0] * self.depth, [0] * self.depth
        for half in self.halves:
            count = len(self.kept[half.name])
            if half.kind == ATTENTION:
                kv_heads[half.block] = count
                heads[half.block] = count * half.query_heads // half.groups
            else:
                channels[half.block] = count
        return tuple(Widths(*of_block) for of_block in zip(heads, kv_heads, channels, strict=True))

    def unfit_for_small(self, mixed: bool) -> tuple[str, str] | None:
        """Return why ``--to small`` cannot write what stays, and what to do instead; None if it can.

        Args:
            mixed: some blocks attend to a sliding window and others do not.
        """
        attentions = [half for half in self.halves if half.kind == ATTENTION]
        dropped = [half.name for half in attentions if not self.kept[half.name]]
        if len(dropped) == len(attentions):
            return (
                "every attention does nothing: no token would see another one",
                "keep one, or write it with msp export --to dense",
            )
        if mixed and dropped:
            return (
                f"the model mixes blocks with and without a sliding window, and {dropped[0]} does nothing",
                "transformers' cache of such a model counts on every attention; drop whole blocks and "
                "write it with msp export --to uniform, or keep every attention",
            )
        return None

    @cached_property
    def blocks(self) -> dict[int, int]:
        """By block of the model before, its index afterwards; blocks that are gone are left out."""
        if not self.renumbered:
            return {block: block for block in range(self.depth)}
        staying = [block for block, widths in enumerate(self.widths) if widths.heads or widths.channels]
        return {block: index for index, block in enumerate(staying)}

    def name(self, name: str) -> str | None:
        """Return a tensor's name afterwards, None if it is gone."""
        part = self._part(name)
        if part is None:
            return name
        half, _ = part
        if not self.kept[half.name]:
            return None
        prefix = half.name.rpartition(".")[0]
        stem = prefix.removesuffix(str(half.block))
        return f"{stem}{self.blocks[half.block]}{name.removeprefix(prefix)}"

    def shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape afterwards of a tensor that stays."""
        cut = self._cut(name)
        if cut is None:
            return tuple(shape)
        half, dim, size = cut
        return *shape[:dim], len(self.kept[half.name]) * size, *shape[dim + 1 :]

    def cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return what stays of a tensor that stays, the same bits."""
        cut = self._cut(name)
        if cut is None:
            return tensor
        half, dim, size = cut
        kept = torch.tensor(self.kept[half.name])
        rows = (kept[:, None] * size + torch.arange(size)).flatten()
        return tensor.index_select(dim, rows)

    def _cut(self, name: str) -> tuple[Half, int, int] | None:
        """Return (half, dimension, size of a group along it) of a tensor that is sliced, None if it is not."""
        half, layer = self._part(name) or (None, "")
        if half is None or len(self.kept[half.name]) == half.groups:
            return None
        if layer in half.inputs:
            return half, 0, half.inputs[layer]
        return (half, 1, half.columns) if name == f"{half.output}.weight" else None

    def _part(self, name: str) -> tuple[Half, str] | None:
        """Return (half, module) of a tensor, None if it belongs to no half."""
        module = name.rpartition(".")[0]
        while module:
            if (half := self._owners.get(module)) is not None:
                return half, name.rpartition(".")[0]
            module = module.rpartition(".")[0]
        return None

    @cached_property
    def _owners(self) -> dict[str, Half]:
        """By module of a half, itself included, and by its norms, the half."""
        return {part: half for half in self.halves for part in (half.name, *half.norms)}

    def to_record(self) -> dict[str, dict[str, Any]]:
        """Return by half its ``groups``, the ``kept`` ones as runs, and its ``module`` afterwards, for export.json."""
        return {
            half.name: {
                "groups": half.groups,
                "kept": runs(self.kept[half.name]),
                "module": (self.name(f"{half.output}.weight") or "").removesuffix(
                    half.output.removeprefix(half.name) + ".weight"
                ),
            }
            for half in self.halves
        }

    @classmethod
    def from_record(
        cls, record: Mapping[str, Mapping[str, Any]], halves: tuple[Half, ...], depth: int
    ) -> Slices:
        """Return the slices that export.json records, of a model with these halves and so many blocks.

        Raises:
            FormatError: the record is damaged, or of another model.
        """
        groups = {half.name: half.groups for half in halves}
        try:
            of = {name: entry["groups"] for name, entry in record.items()}
            kept = {name: from_runs(entry["kept"]) for name, entry in record.items()}
            renumbered = any(entry["module"] not in ("", name) for name, entry in record.items())
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"export.json is damaged: structure: {type(error).__name__}: {error}") from None
        odd = [name for name in {**of, **groups} if of.get(name) != groups.get(name)]
        odd += [name for name, those in kept.items() if those and those[-1] >= groups.get(name, 0)]
        if odd:
            raise FormatError(
                f"the record of structure in export.json is of another model: {odd[0]}",
                hint="give the checkpoint that it was exported from",
            )
        return cls(halves, kept, depth, renumbered)


def runs(numbers: Sequence[int]) -> str:
    """Return increasing numbers as runs, e.g. ``0-5,8``."""
    bounds: list[list[int]] = []
    for number in numbers:
        if bounds and number == bounds[-1][1] + 1:
            bounds[-1][1] = number
        else:
            bounds.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in bounds)


def from_runs(text: str) -> tuple[int, ...]:
    """Return the numbers of runs.

    Raises:
        ValueError: the text holds no increasing runs.
    """
    numbers: list[int] = []
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        begin, end = int(first), int(last or first)
        if end < begin or (numbers and begin <= numbers[-1]):
            raise ValueError(f"{shown(part)} is no increasing run")
        numbers.extend(range(begin, end + 1))
    return tuple(numbers)
