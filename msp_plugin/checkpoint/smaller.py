"""Exports that leave out heads, channels, halves and blocks that contribute nothing."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import Sharded, Tensors, rounding, write_export
from msp_plugin.checkpoint.manifest import Manifest
from msp_plugin.checkpoint.tokenizers import keep_tokenizer
from msp_plugin.errors import FormatError, ModelError, RecipeError
from msp_plugin.formats.sparse24 import IN_MULTIPLE, Sparse24Bitmask
from msp_plugin.plan.levels import Level
from msp_plugin.plan.menus import menu_names
from msp_plugin.progress import Progress
from msp_plugin.structure.halves import ATTENTION, MLP, Half, find_halves, is_mixed
from msp_plugin.structure.removal import kept_groups
from msp_plugin.structure.slices import Slices
from msp_plugin.structure.small_model import empty_model
from msp_plugin.structure.uniform import uniform_config
from msp_plugin.structure.widths import read_widths, small_config

_CUT = "; only the model that it was cut from can be filled up"


@dataclass(frozen=True)
class Smaller(Sharded):
    """An export whose tensors are slices of the source's, bit for bit.

    Args:
        quantum: each MLP keeps a multiple of this many channels, filled up with channels that do nothing.
        aligned: keep channels that do nothing where an MLP's 2:4 mask would break without them, so that what is left
            can be packed as sparse24.
    """

    quantum: int = 1
    aligned: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantum < 1:
            raise RecipeError(
                f"quantum = {self.quantum}", hint="give the multiple of channels to keep, e.g. 64; at least 1"
            )

    @abstractmethod
    def slices(self, source: Checkpoint) -> Slices:
        """Return what stays of each half.

        Raises:
            MSPError: this form cannot hold the model, or nothing can be left out.
        """

    @abstractmethod
    def config(self, source: Checkpoint, slices: Slices) -> dict[str, Any]:
        """Return the contents of the export's config.json."""

    def check_model(self, model: torch.nn.Module, menu: Sequence[Level], granularity: str) -> None:
        find_halves(model)

    def _spare(self, source: Checkpoint) -> dict[str, torch.Tensor]:
        """Return by half bool[groups], True for the groups that may go."""
        spare = dict(source.structure.silent)
        for half in source.structure.halves if self.aligned else ():
            if half.kind == MLP:
                spare[half.name] = _spare_channels(source, half, self.quantum)
        return spare

    def _kept(self, source: Checkpoint, half: Half, spare: torch.Tensor, least: int) -> tuple[int, ...]:
        """Return the groups of a half that stay, filled up so that a 2:4 mask of ``down_proj`` survives.

        Raises:
            FormatError: it does not.
            RecipeError: see kept_groups.
        """
        kept = kept_groups(half, spare, least=least, quantum=self.quantum)
        used = torch.nonzero(~spare).flatten()
        if not self.aligned or half.kind != MLP or not len(used) < len(kept):
            return kept
        down = source.dense(f"{half.output}.weight")
        if len(used) == 0 or not _in_fours(down[:, used]):
            return kept
        kept = kept_groups(half, spare, least=least, quantum=self.quantum, fours=True)
        if len(kept) % 4 == 0 and not _in_fours(down[:, list(kept)]):
            raise FormatError(
                f"{half.name} uses {len(used)} channels in a 2:4 mask, which is lost where it is filled up to {len(kept)}",
                hint="give a smaller quantum, or write it with msp export --to small; with aligned: false the mask is lost",
            )
        return kept

    def check(self, source: Checkpoint) -> None:
        if source.quantization is not None:
            raise FormatError(
                f"{source.path} is quantized",
                hint="export before quantizing: only unquantized weights are sliced",
            )
        self.config(source, self.slices(source))

    def size(self, source: Checkpoint) -> int:
        return sum(_sizes(source, self.slices(source)).values())

    def write(self, source: Checkpoint, directory: Path, progress: Progress) -> Manifest:
        slices = self.slices(source)
        config = self.config(source, slices)
        if source.packed:
            config.pop("quantization_config")
        tensors = Tensors(_sizes(source, slices), _sliced(source, slices))

        def about() -> dict[str, Any]:
            return {"structure": slices.to_record(), **rounding(source, slices.name)}

        manifest = write_export(self, source, directory, config, tensors, progress, about)
        if config["model_type"] != source.config["model_type"]:
            keep_tokenizer(source.path, directory)
        return manifest


@dataclass(frozen=True)
class Small(Smaller):
    """Each block only as wide as it needs, recorded in config.json; ``msp_plugin.load`` reads it without remote code."""

    name = "small"
    menu = "mixed"

    def check_menu(self, menu: Sequence[Level], granularity: str) -> None:
        _check_narrows(self.name, menu, "mixed")

    def check_model(self, model: torch.nn.Module, menu: Sequence[Level], granularity: str) -> None:
        super().check_model(model, menu, granularity)
        if granularity == "half" and is_mixed(model) and any(level.is_dropped for level in menu):
            raise ModelError(
                f"{type(model).__name__} mixes blocks with and without a sliding window: form small cannot drop an attention",
                hint="use levels width, or form uniform, which drops whole blocks",
            )

    def slices(self, source: Checkpoint) -> Slices:
        structure, spare = source.structure, self._spare(source)
        kept = {}
        for half in structure.halves:
            least = 1 if half.name in structure.biased else 0
            kept[half.name] = self._kept(source, half, spare[half.name], least)
        slices = Slices(structure.halves, kept, structure.depth)
        if (unfit := slices.unfit_for_small(structure.mixed)) is not None:
            raise FormatError(f"{source.path}: {unfit[0]}", hint=unfit[1])
        _check_smaller(source, kept)
        return slices

    def config(self, source: Checkpoint, slices: Slices) -> dict[str, Any]:
        return small_config(source.config, slices.widths)


@dataclass(frozen=True)
class Uniform(Smaller):
    """All blocks equally wide, blocks that do nothing left out: plain transformers loads it.

    Args:
        pad: if blocks need different widths, give all of them the largest, filled up with heads and channels that do
            nothing; without it such a model is refused.
    """

    name = "uniform"
    menu = "depth"
    granularity = "block"

    pad: bool = False

    def check_menu(self, menu: Sequence[Level], granularity: str) -> None:
        _check_narrows(self.name, menu, "depth")
        widths = [level.name for level in menu if level.by_groups]
        halves = granularity != "block" and any(level.is_dropped for level in menu)
        if len(menu) > 1 and (widths or halves):
            found = f"levels {', '.join(widths)} make blocks" if widths else "dropped halves make blocks"
            raise RecipeError(
                f"form uniform has equally wide blocks, and {found} differ",
                hint="use levels depth with granularity block, which drops whole blocks, or one width alone",
            )

    def check_model(self, model: torch.nn.Module, menu: Sequence[Level], granularity: str) -> None:
        halves = find_halves(model)
        biased = [h.name for h in halves if getattr(model.get_submodule(h.output), "bias", None) is not None]
        if biased and any(level.is_dropped for level in menu):
            raise ModelError(
                f"{biased[0]} adds a bias, which form uniform cannot leave out with its block",
                hint="use form small, or one width alone",
            )

    def slices(self, source: Checkpoint) -> Slices:
        structure, spare = source.structure, self._spare(source)
        needed = {half.name: int((~spare[half.name]).sum()) for half in structure.halves}
        used = {half.block for half in structure.halves if needed[half.name] or half.name in structure.biased}
        kept: dict[str, tuple[int, ...]] = {}
        for kind in (ATTENTION, MLP):
            halves = [half for half in structure.halves if half.kind == kind and half.block in used]
            least = self._width(source, kind, halves, needed, used)
            for half in structure.halves:
                if half.kind == kind:
                    groups = self._kept(source, half, spare[half.name], least)
                    kept[half.name] = groups if half.block in used else ()
        if read_widths(source.config, str(source.path)) is None:  # else --to small made it smaller already
            _check_smaller(source, kept)
        return Slices(structure.halves, kept, structure.depth, renumbered=True)

    def _width(
        self, source: Checkpoint, kind: str, halves: list[Half], needed: dict[str, int], used: set[int]
    ) -> int:
        """Return the groups that each half of a kind keeps.

        Raises:
            FormatError: the blocks need different numbers of groups, or one has no such half.
        """
        missing = sorted(used - {half.block for half in halves})
        step = self.quantum if kind == MLP else 1
        widths = {half.name: -(-needed[half.name] // step) * step for half in halves}
        most = max(widths.values(), default=0)
        different = [name for name, width in widths.items() if width != most]
        short = [half.name for half in halves if half.groups < most]
        if not most or missing or short or (different and not self.pad):
            groups = "KV heads" if kind == ATTENTION else "channels"
            hint = "write it with msp export --to small"
            if not most:
                found = f"every {kind} does nothing"
                hint = "keep one, or write it with msp export --to dense" if kind == ATTENTION else hint
            elif missing:
                found = f"block {missing[0]} has no {kind}"
                hint += _CUT
            elif short:
                found = f"{short[0]} has fewer {groups} than {most}, which others use"
                hint += _CUT
            else:
                found = f"{different[0]} uses {widths[different[0]]} {groups}, others {most}"
                hint += ", or --to uniform --set pad=true, which fills all blocks up"
            raise FormatError(f"{source.path} is not equally wide in all blocks: {found}", hint=hint)
        return most

    def config(self, source: Checkpoint, slices: Slices) -> dict[str, Any]:
        widths = slices.widths[next(iter(slices.blocks))]
        attention = next(half for half in slices.halves if half.kind == ATTENTION)
        head_dim = attention.inputs[f"{attention.name}.k_proj"]
        return uniform_config(
            source.config, empty_model(source.path).config, widths, list(slices.blocks), head_dim
        )


def _check_narrows(form: str, menu: Sequence[Level], name: str) -> None:
    """Raise RecipeError unless a level of a menu takes out heads, channels, halves or blocks."""
    if not any(level.narrows for level in menu):
        raise RecipeError(
            f"form {form} leaves out heads, channels, halves or blocks, and no level takes any: {', '.join(menu_names(menu))}",
            hint=f"leave levels out, which takes the menu {name}",
        )


def _spare_channels(source: Checkpoint, half: Half, quantum: int) -> torch.Tensor:
    """Return bool[groups], True for the channels of an MLP that may go.

    A channel that is silent but holds weights has a place in a 2:4 mask of ``down_proj``: without it, the columns behind
    it move into other groups of four. So where the columns of all channels with weights are 2:4, and those of the
    channels that are heard are not, silent channels go in whole aligned pieces, as large as the kernels want them.
    """
    silent, empty = source.structure.silent[half.name], source.structure.empty[half.name]
    if silent.all() or not (silent & ~empty).any():
        return silent
    down, piece = source.dense(f"{half.output}.weight"), math.lcm(quantum, IN_MULTIPLE)
    held = torch.nonzero(~empty).flatten()
    if len(held) % piece or not _is_24(down[:, held]) or _is_24(down[:, ~silent]):
        return silent
    spare = empty.clone()
    spare[held] = silent[held].view(-1, piece).all(dim=1).repeat_interleave(piece)
    return spare


def _is_24(weight: torch.Tensor) -> bool:
    """Return True if 2:4 kernels run a weight [out, in]."""
    shape = tuple(weight.shape)
    return Sparse24Bitmask().refuses("", shape, weight.dtype, None) is None and _in_fours(weight)


def _in_fours(weight: torch.Tensor) -> bool:
    """Return True if a weight [out, in] keeps at most two of every aligned four."""
    return weight.shape[1] % 4 == 0 and Sparse24Bitmask().refuses_weight(weight) is None


def _check_smaller(source: Checkpoint, kept: dict[str, tuple[int, ...]]) -> None:
    """Raise FormatError if every group stays."""
    structure = source.structure
    if any(len(kept[half.name]) < half.groups for half in structure.halves):
        return
    filled = next((half for half in structure.halves if structure.silent[half.name].any()), None)
    if filled is None:
        raise FormatError(
            f"every KV head and channel of {source.path} does something: nothing can be left out",
            hint="zeros within rows and columns, such as N:M, are packed by sparse24 and bitmask",
        )
    idle = int(structure.silent[filled.name].sum())
    levels = () if source.allocation is None else source.allocation.levels
    masked = not levels or any(level.by_groups and level.masks for level in levels)
    aligned = "; with aligned: false those go too that have a place in an MLP's 2:4 mask" if masked else ""
    raise FormatError(
        f"{idle} of {filled.groups} KV heads or channels of {filled.name} do nothing, but filled up nothing can be left out",
        hint=f"write it with msp export --to small, without a quantum{aligned}",
    )


def _sizes(source: Checkpoint, slices: Slices) -> dict[str, int]:
    """Return the bytes of each tensor of the export by name, in order."""
    sizes = {}
    for name in source.dense_names:
        if (after := slices.name(name)) is not None:
            info = source.dense_info(name)
            sizes[after] = torch.Size(slices.shape(name, info.shape)).numel() * info.dtype.itemsize
    return sizes


def _sliced(source: Checkpoint, slices: Slices) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the export's tensors, one at a time."""
    for name in source.dense_names:
        if (after := slices.name(name)) is not None:
            yield after, slices.cut(name, source.dense(name))
