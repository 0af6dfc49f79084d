"""The directory of a checkpoint, dense or packed: its config, its allocation, its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from msp_plugin.checkpoint.manifest import Manifest
from msp_plugin.checkpoint.packed_layers import check_packed, packed_layers
from msp_plugin.checkpoint.packing import Packing, sort_layers
from msp_plugin.errors import FormatError, ModelError, VerificationError, shown
from msp_plugin.formats.base import PackedFormat, TensorInfo
from msp_plugin.formats.tensor_files import TensorFiles, read_json
from msp_plugin.plan.allocation import ALLOCATION_FILE, Allocation
from msp_plugin.runtime.files import expanded
from msp_plugin.structure.removal import Structure, read_structure
from msp_plugin.structure.small_model import empty_model
from msp_plugin.structure.widths import read_widths


@dataclass(frozen=True)
class Checkpoint:
    """A model's directory, opened and checked for consistency; no tensor is read yet.

    Args:
        path: the directory.
        config: the contents of config.json.
        tensors: the headers of its safetensors files.
        packed: names of the layers that are stored packed, in the config's order; empty in a dense
            checkpoint.
        format: the format of the packed layers; None in a dense checkpoint.
    """

    path: Path
    config: dict[str, Any]
    tensors: TensorFiles
    packed: tuple[str, ...] = ()
    format: PackedFormat | None = None
    _packings: dict[str, Packing] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path, formats: Iterable[PackedFormat] | None = None) -> Checkpoint:
        """Return the checkpoint in a directory.

        Args:
            formats: the formats of packed weights to try; None for the built-in ones and those of plugins.

        Raises:
            ModelError: the directory holds no model.
            FormatError: a file is damaged, the sparsity format is unknown, or config and tensors contradict each
                other.
        """
        path = expanded(path)
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path} has no config.json", hint="give the directory that `msp prune` or `msp export` wrote"
            )
        config, tensors = read_json(path / "config.json"), TensorFiles(path)
        _check_config(config, path / "config.json")
        packed = packed_layers(config, str(path / "config.json"), formats)
        check_packed(packed, tensors)
        if packed is None:
            return cls(path, config, tensors)
        return cls(path, config, tensors, packed.layers, packed.format)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The quantization_config of a quantized checkpoint; None for a packed or plain one."""
        return None if self.packed else self.config.get("quantization_config")

    @property
    def rounded(self) -> bool:
        """True if the weights were rounded by an export: in a lossy format, or dense again after one."""
        stored_so = self.format is not None and self.format.lossy
        return stored_so or (self.manifest is not None and bool(self.manifest.quantization_errors))

    @property
    def smaller(self) -> bool:
        """True if heads, channels or halves of it were left out, as export.json says, or config.json with no export.json.

        Raises:
            FormatError: the widths in config.json are damaged.
        """
        recorded = self.manifest is not None and bool(self.manifest.structure)
        return recorded or read_widths(self.config, str(self.path / "config.json")) is not None

    @cached_property
    def allocation(self) -> Allocation | None:
        """The allocation beside the tensors, checked against them; None if there is none.

        Its layers are named as in the files, which may differ from the names of a model's modules.

        Raises:
            RecipeError: it is damaged.
            VerificationError: it is for another model.
        """
        file = self.path / ALLOCATION_FILE
        if not file.is_file():
            return None
        allocation = Allocation.read(file).as_stored()
        if self.quantization is not None:  # its weights have other names and shapes
            return allocation
        odd = []
        for layer in allocation.table.layers:
            shape = self.shape_of(layer.name)
            if shape != (layer.out_features, layer.in_features):
                odd.append(f"{layer.name} [{layer.out_features}, {layer.in_features}], found {shape}")
        if odd:
            raise VerificationError(
                f"{file} is for another model: {len(odd)} of its {len(allocation.table.layers)} layers are "
                f"not in this one, e.g. {'; '.join(odd[:3])}",
                hint="put the allocation.json of the run that made these weights there",
            )
        return allocation

    def packing_in(self, format: PackedFormat) -> Packing:
        """Return which layers of a dense checkpoint a format packs; may read every weight once."""
        if format.name not in self._packings:
            self._packings[format.name] = sort_layers(
                self.tensors, self.allocation, format, lambda layer: self.tensors.read(f"{layer}.weight")
            )
        return self._packings[format.name]

    @cached_property
    def structure(self) -> Structure:
        """The attention and MLP of every block, and the heads and channels in them that do nothing.

        Reads every weight of the blocks once.

        Raises:
            ModelError: heads and channels of this model cannot be removed one by one.
            FormatError: a tensor is missing or damaged.
        """
        model = empty_model(self.path)
        names = {name for name, _ in model.named_parameters()}
        return read_structure(model, lambda name: self.dense(name) if name in names else None)

    def check_files(self) -> None:
        """Compare every file with its checksum in export.json, if there is one.

        Raises:
            FormatError: a file is missing or has other bytes, or export.json is damaged or newer.
        """
        if self.manifest is None:
            return
        lost = [f"there is no tensor {name}" for name in self.manifest.tensors if name not in self.tensors]
        wrong = lost or self.manifest.differences(self.path)
        if wrong:
            raise FormatError(
                f"{self.path} is not what was exported: {'; '.join(wrong[:3])}",
                hint="copy or export it again",
            )

    @cached_property
    def manifest(self) -> Manifest | None:
        """The contents of export.json; None for a directory that no export wrote."""
        return Manifest.read(self.path)

    def shape_of(self, layer: str) -> tuple[int, ...] | None:
        """Return the shape [out, in] of a layer's weight; None if there is none."""
        name = f"{layer}.weight"
        return self.dense_info(name).shape if name in self.dense_names else None

    def weight(self, layer: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the weight [out, in] of a layer, unpacked if it is packed, on the CPU.

        Args:
            dtype: as for ``dense``.

        Raises:
            FormatError: a tensor is missing or damaged.
        """
        return self.dense(f"{layer}.weight", dtype)

    @cached_property
    def dense_names(self) -> dict[str, str | None]:
        """The tensors of the dense form in order; the value is the packed layer that one comes from, or None."""
        names: dict[str, str | None] = {}
        packed, suffixes = frozenset(self.packed), self.format.suffixes if self.format else ()
        for name in self.tensors:
            layer, _, suffix = name.rpartition(".")
            if layer in packed and suffix in suffixes:
                names[f"{layer}.weight"] = layer
            else:
                names[name] = None
        return names

    def dense(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return one tensor of the dense form.

        Args:
            dtype: of the weight, if the format of its layer is lossy; None for the checkpoint's.

        Raises:
            FormatError: it is missing or damaged.
        """
        layer = self.dense_names.get(name)
        if layer is None or self.format is None:
            return self.tensors.read(name)
        stored = {suffix: self.tensors.read(f"{layer}.{suffix}") for suffix in self.format.suffixes}
        if dtype is None or not self.format.lossy:
            return self.format.unpack(stored, layer)
        # Unpacked in float32: a scale may be too small for the dtype.
        stored = {s: t.float() if t.is_floating_point() else t for s, t in stored.items()}
        return self.format.unpack(stored, layer).to(dtype)

    def dense_info(self, name: str) -> TensorInfo:
        """Return the header of one tensor of the dense form."""
        layer = self.dense_names[name]
        if layer is None or self.format is None:
            return self.tensors[name]
        stored = {suffix: self.tensors[f"{layer}.{suffix}"] for suffix in self.format.suffixes}
        return self.format.header(stored, layer)

    def dense_tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor of the dense form, one at a time; ``dtype`` as for ``dense``."""
        for name in self.dense_names:
            yield name, self.dense(name, dtype)


def _check_config(config: dict[str, Any], file: Path) -> None:
    """Raise FormatError unless the entries that are read here have the right type; quantization is checked elsewhere."""
    names, most = config.get("architectures"), config.get("max_position_embeddings")
    if not (names is None or (isinstance(names, list) and all(isinstance(n, str) for n in names))):
        raise FormatError(f"{file}: architectures is {shown(names)}, expected a list of names")
    if not (most is None or (isinstance(most, int) and not isinstance(most, bool) and most > 0)):
        raise FormatError(f"{file}: max_position_embeddings is {shown(most)}, expected a count")
