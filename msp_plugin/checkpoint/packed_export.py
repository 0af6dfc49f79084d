"""Export with packed layers: which layers are packed is up to the format, all else stays dense."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import Sharded, Tensors, rounding, write_export
from msp_plugin.checkpoint.manifest import Manifest
from msp_plugin.checkpoint.packing import other_matrices, pack_layer
from msp_plugin.errors import FormatError, ModelError, RecipeError
from msp_plugin.formats.base import PackedFormat, TensorInfo, without_shape
from msp_plugin.formats.bitmask import SparseBitmask
from msp_plugin.formats.bitmask_int8 import Int8Bitmask, error
from msp_plugin.formats.sparse24 import Sparse24Bitmask
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plan.levels import Level
from msp_plugin.progress import Progress

log = logging.getLogger(__name__)


@dataclass
class _Changes:
    """Sums and counts of an export's packed layers, as in the manifest, filled in layer by layer."""

    packed_bytes: int = 0
    negative_zeros: dict[str, int] = field(default_factory=dict)
    quantization_errors: dict[str, float] = field(default_factory=dict)
    rounded_to_zero: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PackedExporter(Sharded):
    """Layers packed in ``format``, all else dense. A plugin's exporter sets ``name`` and ``format``.

    The format decides which layers: by their level in allocation.json, or without an allocation by their weights.
    """

    format: ClassVar[PackedFormat]

    @property
    def packed_format(self) -> PackedFormat:
        """The format that the exporter's options choose."""
        return self.format

    def check_model(self, model: torch.nn.Module, menu: Sequence[Level], granularity: str) -> None:
        sparse = [level for level in menu if not level.is_dense]
        reasons = [
            self.packed_format.refuses(
                layer.name,
                (layer.out_features, layer.in_features),
                model.get_parameter(f"{layer.name}.weight").dtype,
                level,
            )
            for layer in prunable_layers(model).layers
            for level in sparse
        ]
        if reasons and all(reasons):
            raise ModelError(
                f"form {self.name} would pack no layer of this model: {reasons[0]}",
                hint="choose other levels, or another form",
            )

    def check(self, source: Checkpoint) -> None:
        if source.packed:
            hint = (
                "it can be served as it is"
                if source.format and source.format.served
                else "export it to dense"
            )
            raise FormatError(f"{source.path} is packed already", hint=hint)
        if source.quantization is not None:
            quantization = source.quantization
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise FormatError(
                f"{source.path} is quantized ({method})",
                hint=f"{self.name} packs unquantized weights; export before quantizing, or serve it as it is",
            )
        packing = source.packing_in(self.packed_format)
        if not packing.packed:
            reasons = sorted(set(packing.dense.values()))
            for_kernels = self.packed_format.structure == "2:4"
            runs = "that 2:4 kernels could run" if for_kernels else f"that {self.name} packs"
            raise FormatError(
                f"{source.path} has no layer {runs}: {'; '.join(reasons[:3]) or 'no layers'}",
                hint="prune with servable levels (servable, or names such as 2:4 and 2:8); bitmask packs any zeros"
                if for_kernels
                else "export it to dense",
            )

    def size(self, source: Checkpoint) -> int:
        packed = sum(sum(sizes.values()) for sizes in self._packed_sizes(source).values())
        return packed + sum(info.bytes for _, info, layer in self._planned(source) if layer is None)

    def write(self, source: Checkpoint, directory: Path, progress: Progress) -> Manifest:
        packing = source.packing_in(self.packed_format)
        changes = _Changes()
        packed_sizes, sizes = self._packed_sizes(source), dict[str, int]()
        for name, info, layer in self._planned(source):
            if layer is None:
                sizes[name] = info.bytes
            else:
                sizes |= {f"{layer}.{suffix}": size for suffix, size in packed_sizes[layer].items()}
        config = dict(source.config)
        others = other_matrices(source.tensors, packing)
        config["quantization_config"] = self.packed_format.config(list(packing.packed), others)
        tensors = Tensors(sizes, self._tensors(source, changes))

        def about() -> dict[str, Any]:
            details, before = asdict(changes), rounding(source)
            for key, together in (("quantization_errors", math.hypot), ("rounded_to_zero", operator.add)):
                for layer, first in before.get(key, {}).items():  # int8 has rounded this layer once before
                    details[key][layer] = together(first, details[key].get(layer, 0))
            return {
                "packed": packing.packed,
                "kept_dense": packing.dense,
                "dense_bytes": sum(source.tensors[f"{layer}.weight"].bytes for layer in packing.packed),
                **details,
            }

        manifest = write_export(self, source, directory, config, tensors, progress, about)
        if changes.negative_zeros:
            log.info("%d negative zeros became positive", sum(changes.negative_zeros.values()))
        return manifest

    def _planned(self, source: Checkpoint) -> Iterator[tuple[str, TensorInfo, str | None]]:
        """Yield (name, header, layer that it is packed for) of every tensor of a dense checkpoint."""
        packed = source.packing_in(self.packed_format).packed
        for name, info in source.tensors.items():
            layer = name.removesuffix(".weight")
            yield name, info, layer if layer != name and layer in packed else None

    def _packed_sizes(self, source: Checkpoint) -> dict[str, dict[str, int]]:
        """Return the bytes of each packed layer's tensors by suffix; upper bounds if there is no allocation."""
        sizes = {}
        levels = source.allocation.by_layer if source.allocation else {}
        layers = {layer.name: layer for layer in source.allocation.table.layers} if source.allocation else {}
        for _, info, layer in self._planned(source):
            if layer is not None:
                rows, columns = info.shape
                kept = levels[layer].kept(layers[layer]) if layer in layers else rows * columns
                sizes[layer] = self.packed_format.sizes((rows, columns), info.dtype, kept)
        return sizes

    def _tensors(self, source: Checkpoint, changes: _Changes) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the export's tensors, and fill in what packing changes in each layer."""
        for name, _, layer in self._planned(source):
            tensor = source.tensors.read(name)
            if layer is None:
                yield name, tensor
                continue
            stored, count = pack_layer(self.packed_format, tensor, layer)
            if count:
                changes.negative_zeros[layer] = count
            changes.packed_bytes += without_shape({suffix: part.nbytes for suffix, part in stored.items()})
            if self.packed_format.lossy:
                kept = self.packed_format.unpack(stored, layer)
                changes.quantization_errors[layer] = error(tensor, kept)
                if lost := int(torch.count_nonzero(tensor)) - int(torch.count_nonzero(kept)):
                    changes.rounded_to_zero[layer] = lost
            del tensor
            yield from ((f"{layer}.{suffix}", part) for suffix, part in stored.items())


@dataclass(frozen=True)
class Sparse24(PackedExporter):
    """Servable layers packed as two of four weights and a bitmask; all else dense.

    A layer is servable if its level in allocation.json runs on 2:4 kernels, or without an allocation if its weights
    are 2:4. Layers that inference fuses are packed all or none.
    """

    name = "sparse24"
    menu = "servable"
    format = Sparse24Bitmask()

    def check_menu(self, menu: Sequence[Level], granularity: str) -> None:
        if others := [level.name for level in menu if not level.is_dense and not level.servable]:
            raise RecipeError(
                f"form sparse24 would leave layers at {', '.join(others)} dense: 2:4 kernels do not run them",
                hint="leave levels out, which takes the menu servable, or use form bitmask",
            )
        if granularity == "layer" and any(level.is_dense for level in menu):
            raise RecipeError(
                "form sparse24 packs the layers that inference fuses all or none, and granularity layer may leave one dense",
                hint="leave granularity out, which takes unit",
            )


@dataclass(frozen=True)
class Bitmask(PackedExporter):
    """Layers packed as their nonzero weights and a bitmask, at any level; dense where packing saves no bytes.

    Args:
        values: ``original`` stores the nonzero weights as they are; ``int8`` quantizes them, with a scale for each row
            of a layer, and leaves layers dense that this changes too much.
    """

    name = "bitmask"
    format = SparseBitmask()

    values: Literal["original", "int8"] = "original"

    @property
    def packed_format(self) -> PackedFormat:
        return Int8Bitmask() if self.values == "int8" else self.format
