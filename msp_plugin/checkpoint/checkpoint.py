"""A checkpoint's directory: its config, its allocation, its tensors, in either form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from msp_plugin.checkpoint.manifest import Manifest
from msp_plugin.checkpoint.packing import Packing, sort_layers
from msp_plugin.errors import FormatError, ModelError, VerificationError, shown
from msp_plugin.formats.sparse24 import FORMAT, SUFFIXES, Packed, unpack
from msp_plugin.formats.tensor_files import TensorFiles, TensorInfo, read_json
from msp_plugin.plan.allocation import ALLOCATION_FILE, Allocation

#: What the values of a packed weight may be: without a scale, eight bits say nothing.
VALUE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Checkpoint:
    """A model's directory, opened and checked for consistency; no tensor is read yet.

    Args:
        path: the directory.
        config: the contents of config.json.
        tensors: the headers of its safetensors files.
        packed: names of the layers that are stored packed, in the config's order; empty in a dense checkpoint.
    """

    path: Path
    config: dict[str, Any]
    tensors: TensorFiles
    packed: tuple[str, ...]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Return the checkpoint in a directory.

        Raises:
            ModelError: no model's directory.
            FormatError: a damaged file, a sparsity format that this package does not read, or a config and
                tensors that contradict each other.
        """
        path = Path(path).expanduser()
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path} has no config.json", hint="give the directory that `msp prune` or `msp export` wrote"
            )
        config, tensors = read_json(path / "config.json"), TensorFiles(path)
        _check_config(config, path / "config.json")
        packed = packed_layers(config, str(path / "config.json"))
        _check_packed(packed, tensors)
        return cls(path, config, tensors, packed)

    @property
    def form(self) -> str:
        """``"sparse24"`` or ``"dense"``."""
        return "sparse24" if self.packed else "dense"

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The quantization_config of a checkpoint that is quantized, None for one that is merely packed."""
        return None if self.packed else self.config.get("quantization_config")

    @cached_property
    def allocation(self) -> Allocation | None:
        """The allocation beside the tensors, checked against them; None if there is none.

        Its layers have the names of the tensors, which may differ from those of a model's modules.

        Raises:
            RecipeError: it is damaged.
            VerificationError: it is for another model.
        """
        file = self.path / ALLOCATION_FILE
        if not file.is_file():
            return None
        found = Allocation.read(file).as_stored()
        if self.quantization is not None:  # its weights have other names and shapes
            return found
        odd = []
        for layer in found.table.layers:
            shape = self.shape_of(layer.name)
            if shape != (layer.out_features, layer.in_features):
                odd.append(f"{layer.name} [{layer.out_features}, {layer.in_features}], found {shape}")
        if odd:
            raise VerificationError(
                f"{file} is for another model: {len(odd)} of its {len(found.table.layers)} layers are not in "
                f"this one, e.g. {'; '.join(odd[:3])}",
                hint="put the allocation.json of the run that made these weights there",
            )
        return found

    @cached_property
    def packing(self) -> Packing:
        """What an export to sparse24 would pack of a dense checkpoint; may read every weight."""
        return sort_layers(self)

    def check_files(self) -> None:
        """Hold the files against the checksums of the export, where there is one. Reads every file.

        Raises:
            FormatError: a file is missing or has other bytes, or export.json is damaged or newer.
        """
        if self.manifest is None:
            return
        lost = [f"there is no tensor {name}" for name in self.manifest.tensors if name not in self.tensors]
        wrong = lost or self.manifest.differences(self.path)
        if wrong:
            raise FormatError(
                f"{self.path} is not what was exported: {'; '.join(wrong[:3])}", hint="copy or export it anew"
            )

    @cached_property
    def manifest(self) -> Manifest | None:
        """What the export wrote about itself; None for a directory that no export wrote."""
        return Manifest.read(self.path)

    def shape_of(self, layer: str) -> tuple[int, ...] | None:
        """Return the shape of a layer's weight, None if it is not there."""
        if layer in self._packed_set:
            rows, half = self.tensors[f"{layer}.compressed"].shape
            return rows, 2 * half
        info = self.tensors.get(f"{layer}.weight")
        return info.shape if info else None

    @cached_property
    def _packed_set(self) -> frozenset[str]:
        return frozenset(self.packed)

    def read_packed(self, layer: str) -> Packed:
        """Return the packed weight of a layer.

        Raises:
            FormatError: a tensor is missing, damaged or shaped otherwise than ``shape`` says.
        """
        values, bitmask, shape = (self.tensors.read(f"{layer}.{suffix}") for suffix in SUFFIXES)
        said = tuple(shape.reshape(-1).tolist())
        if shape.is_floating_point() or said != self.shape_of(layer):
            raise FormatError(
                f"{layer}.shape says {list(said)}, its values are those of a weight {list(self.shape_of(layer))}",
                hint="the file is damaged: export or download it anew",
            )
        return Packed(values, bitmask, said)

    def weight(self, layer: str) -> torch.Tensor:
        """Return the weight [out, in] of a layer from either form, on the CPU.

        Raises:
            FormatError: see ``read_packed`` and ``formats.sparse24.unpack``.
        """
        if layer in self._packed_set:
            return unpack(self.read_packed(layer), layer)
        return self.tensors.read(f"{layer}.weight")

    @cached_property
    def dense_names(self) -> dict[str, str | None]:
        """The names of the dense form's tensors in order; for each the packed layer that it comes from, or None."""
        names: dict[str, str | None] = {}
        for name in self.tensors:
            layer, _, suffix = name.rpartition(".")
            if layer in self._packed_set and suffix in SUFFIXES:
                if suffix == SUFFIXES[0]:
                    names[f"{layer}.weight"] = layer
            else:
                names[name] = None
        return names

    def dense(self, name: str) -> torch.Tensor:
        """Return one tensor of the dense form."""
        layer = self.dense_names[name]
        return self.tensors.read(name) if layer is None else self.weight(layer)

    def dense_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor of the dense form, one at a time."""
        for name in self.dense_names:
            yield name, self.dense(name)


def _check_config(config: dict[str, Any], file: Path) -> None:
    """Raise unless what is read of a config besides its quantization has the right type."""
    names, most = config.get("architectures"), config.get("max_position_embeddings")
    if not (names is None or (isinstance(names, list) and all(isinstance(n, str) for n in names))):
        raise FormatError(f"{file}: architectures is {shown(names)}, no list of names")
    if not (most is None or (isinstance(most, int) and not isinstance(most, bool) and most > 0)):
        raise FormatError(f"{file}: max_position_embeddings is {shown(most)}, no count")


def packed_layers(config: dict[str, Any], source: str) -> tuple[str, ...]:
    """Return the layers that a model's config says are packed.

    Raises:
        FormatError: a sparsity_config in a form that this package does not read.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or not quantization.get("sparsity_config"):
        return ()
    sparsity = quantization["sparsity_config"]
    if not isinstance(sparsity, dict):
        raise FormatError(f"{source}: sparsity_config is no mapping")
    if not sparsity.get("targets") and sparsity.get("format") == "dense":
        return ()
    if quantization.get("config_groups"):
        raise FormatError(
            f"{source}: the checkpoint is quantized and packed at once",
            hint="only unquantized weights are packed",
        )
    if sparsity.get("format") != FORMAT:
        raise FormatError(
            f"{source}: sparsity format {shown(sparsity.get('format'))} is not read here",
            hint=f"expected {FORMAT!r}",
        )
    targets = sparsity.get("targets")
    named = isinstance(targets, list) and all(
        isinstance(t, str) and "." in t and ":" not in t for t in targets
    )
    if not targets or not named:
        raise FormatError(
            f"{source}: sparsity_config.targets does not name layers one by one: {shown(targets)}",
            hint="class names and patterns are not read: vLLM 0.18 destroyed dense layers with them",
        )
    if len(set(targets)) < len(targets):
        raise FormatError(f"{source}: sparsity_config.targets names a layer twice")
    return tuple(targets)


def _check_packed(packed: tuple[str, ...], tensors: TensorFiles) -> None:
    for layer in packed:
        lost = [s for s in SUFFIXES if f"{layer}.{s}" not in tensors]
        if lost or f"{layer}.weight" in tensors:
            found = f"there is no {layer}.{lost[0]}" if lost else f"{layer}.weight is there too"
            raise FormatError(
                f"config.json says that {layer} is packed, but {found}",
                hint="the config is from another checkpoint, or a shard is missing",
            )
        _check_headers(layer, *(tensors[f"{layer}.{suffix}"] for suffix in SUFFIXES))
    known = set(packed)
    for name in tensors:
        layer, _, suffix = name.rpartition(".")
        if suffix in SUFFIXES[:2] and layer not in known:
            raise FormatError(
                f"{layer} is stored packed, but config.json does not name it",
                hint="the config is from another checkpoint: export the model anew",
            )


def _check_headers(layer: str, values: TensorInfo, bitmask: TensorInfo, shape: TensorInfo) -> None:
    """Raise unless the three tensors of a packed layer can be a weight's, as far as their headers say."""
    rows, half = values.shape if len(values.shape) == 2 else (0, 0)
    right = (
        rows > 0
        and half > 0
        and half % 2 == 0
        and values.dtype in VALUE_DTYPES
        and (bitmask.dtype, bitmask.shape) == (torch.uint8, (rows, -(-half // 4)))
        and (shape.dtype, shape.bytes) == (torch.int64, 16)
    )
    if not right:
        found = ", ".join(
            f"{suffix} {info.dtype} {list(info.shape)}"
            for suffix, info in zip(SUFFIXES, (values, bitmask, shape), strict=True)
        )
        raise FormatError(
            f"{layer} is no packed weight: {found}",
            hint="expected compressed [out, in / 2] in float16, bfloat16 or float32, bitmask uint8 [out, in / 8] "
            "and shape int64 [2, 1]; the file is damaged, or quantized",
        )
