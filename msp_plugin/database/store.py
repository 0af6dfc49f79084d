"""The level database on disk: one safetensors file per layer, in a directory named by its content.

A level is stored as its kept values, `<level>.values` [n], and `<level>.bitmask` (database/bitmask.py). The dense
weight is not stored; the model has it. `<level>.rows` float32 [out] are the parts of the output error by output
feature, where the method gives them.

The directory's name is a digest of everything that the weights depend on: model, calibration samples, method with
host, version and options, and the levels. A second run on the same values finds these files, and no other run does.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from msp_plugin.database.bitmask import bitmask_bytes, pack_bitmask, unpack_bitmask
from msp_plugin.errors import FormatError, VerificationError
from msp_plugin.models.weights import Place
from msp_plugin.plan.levels import Level
from msp_plugin.plan.units import Layer, UnitTable
from msp_plugin.runtime.digests import digest
from msp_plugin.runtime.disk import writing
from msp_plugin.runtime.files import replacing
from msp_plugin.runtime.memory import is_out_of_memory

log = logging.getLogger(__name__)

SCHEMA = "msp_plugin/level-database"
VERSION = "5"
#: Errors of a file that is missing or holds something else; RuntimeError comes from torch, which maps files too.
UNREADABLE = (SafetensorError, FormatError, OSError, KeyError, ValueError, RuntimeError)
#: Files that stay open, and so mapped into memory; one holds one layer.
OPEN_FILES = 16


@dataclass(frozen=True)
class LayerErrors:
    """Errors of one layer at one level: squared change of the weight, and squared change of the output per token."""

    weight: float
    output: float


class LevelDatabase:
    """Pruned weights by layer and level.

    Args:
        root: directory of all databases.
        identity: JSON values that name everything the weights depend on.
        menu: the levels; ``dense`` has errors, of zero, and no weights.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any], menu: Sequence[Level]):
        self.menu = tuple(menu)
        self.identity = dict(identity, levels=[level.name for level in menu], version=VERSION)
        self.key = digest(self.identity)
        self.path = root / "database" / self.key[:24]
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._whole: set[str] = set()
        self._damaged: set[str] = set()
        self._renewing = False

    @property
    def lock(self) -> Path:
        """Return the lock file of the process that builds this database."""
        return self.path.with_name(f"{self.path.name}.lock")

    def renew(self) -> None:
        """Count only layers that this object has written as present, so that each is written again, over the old file.

        Nothing is removed, because other processes may read it.
        """
        self._renewing = True

    def tidy(self) -> None:
        """Remove the temporary files of killed writers; only the holder of the lock may call this."""
        for file in self.path.glob(".*.safetensors.*.partial"):
            file.unlink(missing_ok=True)

    def file(self, layer: str) -> Path:
        """Return the path of a layer's file."""
        return self.path / f"{layer}.safetensors"

    def write(
        self,
        layer: Layer,
        weights: Mapping[str, torch.Tensor],
        errors: Mapping[str, LayerErrors],
        rows: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """Write a layer's weights [out, in] by level name, their errors, and the output errors by row [out]."""
        tensors: dict[str, torch.Tensor] = {}
        for name, weight in weights.items():
            packed = pack_bitmask(weight.detach().cpu())
            tensors |= dict(zip((f"{name}.values", f"{name}.bitmask"), packed, strict=True))
        tensors |= {f"{name}.rows": by_row.float().cpu() for name, by_row in rows.items()}
        about = {
            "schema": SCHEMA,
            "key": self.key,
            "layer": layer.name,
            "shape": [layer.out_features, layer.in_features],
            "errors": {name: [e.weight, e.output] for name, e in errors.items()},
            "crc32": {name: _crc32(tensor) for name, tensor in tensors.items()},
            "dtypes": {name: str(tensor.dtype) for name, tensor in tensors.items()},
        }
        # One entry, because safetensors writes several entries in no fixed order.
        text = json.dumps(about, sort_keys=True)
        meta = {"about": f"{zlib.crc32(text.encode()):08x} {text}"}
        with writing(self.path), replacing(self.file(layer.name)) as temporary:
            save_file(tensors, temporary, metadata=meta)
        self._open.pop(layer.name, None)
        self._whole.add(layer.name)

    def has(self, layer: Layer) -> bool:
        """Return True if the layer's file is there, whole, and of this database.

        The first call reads every byte and compares checksums. A file that fails is named in the log; write it again.
        """
        if layer.name in self._whole:
            return True
        if self._renewing or not self.file(layer.name).exists():
            return False
        try:
            damage = self._damage(layer)
        except (*UNREADABLE, TypeError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            damage = str(error)
        if damage:
            self._open.pop(layer.name, None)
            if layer.name not in self._damaged:
                log.warning("%s cannot be used, it is built anew: %s", self.file(layer.name), damage)
            self._damaged.add(layer.name)
            return False
        self._whole.add(layer.name)
        return True

    def _damage(self, layer: Layer) -> str:
        """Return a sentence about the damage of a layer's file; it is empty for a whole file of this database."""
        handle, about = self._handle(layer.name), self._about(layer.name)
        shape = [layer.out_features, layer.in_features]
        if about.get("key") != self.key or about.get("layer") != layer.name or about.get("shape") != shape:
            return "it is another database's, or another layer's"
        names = [level.name for level in self.menu if not level.is_dense]
        sums = about["crc32"]
        needed = {f"{name}.{part}" for name in names for part in ("values", "bitmask")}
        if set(sums) not in (needed, needed | {f"{name}.rows" for name in names}):
            return "it holds other levels"
        if set(about["errors"]) != {level.name for level in self.menu} | {"dense"}:
            return "errors are missing"
        mask = [bitmask_bytes(*shape)]
        if any(handle.get_slice(f"{name}.bitmask").get_shape() != mask for name in names):
            return "a bitmask has another size"
        for name, crc in sums.items():
            tensor = handle.get_tensor(name)
            if _crc32(tensor) != crc or str(tensor.dtype) != about["dtypes"][name]:
                return f"{name}: the checksum differs"
        return ""

    def weight(self, layer: str, level: str) -> torch.Tensor:
        """Return the weight [out, in] of a layer at a level that is not dense, both by name.

        Raises:
            VerificationError: the database does not hold it.
        """
        with self._readable(f"{layer} at {level}"):
            handle = self._handle(layer)
            values, mask = (handle.get_tensor(f"{level}.{part}") for part in ("values", "bitmask"))
            return unpack_bitmask(values, mask, tuple(self._about(layer)["shape"]))

    def row_errors(self, layer: str, level: str) -> torch.Tensor:
        """Return float32[out], the output error of a layer at a level by output feature.

        Raises:
            VerificationError: the database does not hold it.
        """
        with self._readable(f"the row errors of {layer} at {level}"):
            rows: torch.Tensor = self._handle(layer).get_tensor(f"{level}.rows")
            return rows

    def has_row_errors(self, table: UnitTable) -> bool:
        """Return True if the files of all layers hold row errors.

        Raises:
            VerificationError: the database does not hold a layer.
        """
        wanted = {f"{level.name}.rows" for level in self.menu if not level.is_dense}
        for layer in table.layers:
            with self._readable(f"the tensors of {layer.name}"):
                if not wanted <= self._about(layer.name)["crc32"].keys():
                    return False
        return True

    def weight_for(self, place: Place, layer: str, level: str) -> torch.Tensor:
        """Return the weight [out, in] of a layer at a level, on the device and in the dtype of the layer's place."""
        return self.weight(layer, level).to(place.at, place.dtype)

    def errors(self, table: UnitTable) -> tuple[np.ndarray, np.ndarray]:
        """Return (weight_error, output_error), each float64[U, K] summed over the unit's layers.

        Raises:
            VerificationError: the database does not hold them.
        """
        result = np.zeros((2, len(table), len(self.menu)))
        for u, unit in enumerate(table):
            for layer in unit.layers:
                with self._readable(f"the errors of {layer.name}"):
                    errors = self._about(layer.name)["errors"]
                result[:, u, :] += np.array([errors[level.name] for level in self.menu]).T
        return result[0], result[1]

    @contextmanager
    def _readable(self, what: str) -> Iterator[None]:
        try:
            yield
        except UNREADABLE as error:
            if is_out_of_memory(error):
                raise
            raise VerificationError(
                f"the level database at {self.path} cannot give {what}: {error}",
                hint="remove that directory; it is built anew",
            ) from error

    def _about(self, layer: str) -> dict[str, Any]:
        """Return the description of a layer's file: key, layer, shape, errors, checksums and dtypes."""
        crc, _, text = (self._handle(layer).metadata() or {})["about"].partition(" ")
        if crc != f"{zlib.crc32(text.encode()):08x}":
            raise ValueError("the checksum of its description differs")
        about: dict[str, Any] = json.loads(text)
        return about

    def _handle(self, layer: str) -> Any:
        """Return safetensors' handle of a layer's file; the files used last stay open."""
        if layer in self._open:
            self._open.move_to_end(layer)
            return self._open[layer]
        handle = self._open[layer] = safe_open(self.file(layer), framework="pt")
        while len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)
        return handle


def _crc32(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data)
