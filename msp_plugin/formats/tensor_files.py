"""Read the tensors of a checkpoint's directory one by one, and write them shard by shard."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from msp_plugin.errors import FormatError, ModelError, shown
from msp_plugin.formats.base import TensorInfo
from msp_plugin.runtime.disk import cannot_write
from msp_plugin.runtime.documents import parse_json
from msp_plugin.runtime.files import write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: The types of the safetensors format that torch has too, by their names there.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
}


class TensorFiles(Mapping[str, TensorInfo]):
    """The safetensors files of a directory, by tensor name, in the order of the files.

    Only headers are read here; safetensors itself checks them (sizes, offsets, overlaps, truncation).

    Raises:
        ModelError: there are no safetensors files.
        FormatError: a file is damaged, the index disagrees with the files, or a tensor is in two files.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._info: dict[str, TensorInfo] = {}
        index = self._index()
        for file in self._files(index):
            for name, info in _header(file).items():
                if name in self._info:
                    raise FormatError(f"tensor {name} is in {self._info[name].file.name} and in {file.name}")
                self._info[name] = info
        found = {name: info.file.name for name, info in self._info.items()}
        lost = sorted(name for name, file in index.items() if found.get(name) != file)
        if lost:
            raise FormatError(
                f"{directory / INDEX} names {len(lost)} tensors that are not in their file, "
                f"e.g. {', '.join(lost[:3])}",
                hint="a shard is missing or from another checkpoint: copy the directory again",
            )

    def __getitem__(self, name: str) -> TensorInfo:
        return self._info[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._info)

    def __len__(self) -> int:
        return len(self._info)

    @property
    def files(self) -> list[Path]:
        """The files, sorted by name."""
        return sorted({info.file for info in self._info.values()})

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU, mapped from its file: do not write into it, and clone it to keep it.

        Raises:
            FormatError: there is no such tensor, or its file is damaged.
        """
        if name not in self._info:
            raise FormatError(f"{self.directory} holds no tensor {name}", hint="a file is missing or damaged")
        return read_tensor(self._info[name].file, name)

    def _index(self) -> dict[str, str]:
        """Return the index's map from tensor to file name; empty without an index.

        transformers does not read one beside SINGLE: it was left there by a save over shards.
        """
        path = self.directory / INDEX
        if not path.is_file() or (self.directory / SINGLE).is_file():
            return {}
        found = read_json(path).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
            raise FormatError(f"{path} has no weight_map from tensor names to file names")
        return found

    def _files(self, index: Mapping[str, str]) -> list[Path]:
        names = sorted(set(index.values()))
        if not names and (self.directory / SINGLE).is_file():
            names = [
                SINGLE
            ]  # transformers reads only this; other files may hold variants of the same tensors
        names = names or [p.name for p in sorted(self.directory.glob("*.safetensors"))]
        if not names:
            raise ModelError(
                f"{self.directory} has no safetensors files", hint="only safetensors checkpoints are read"
            )
        for name in names:
            if Path(name).name != name:
                raise FormatError(
                    f"{self.directory / INDEX} names the file {shown(name)} outside of its directory"
                )
            if not (self.directory / name).is_file():
                raise FormatError(
                    f"{self.directory} lacks {name}, which its index names", hint="copy the directory again"
                )
        return [self.directory / name for name in names]


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """Return one tensor of a safetensors file on the CPU, mapped from it: do not write into it.

    Raises:
        FormatError: the file is damaged, or has no such tensor.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
            return tensor
    except (SafetensorError, OSError, RuntimeError) as error:
        raise FormatError(f"cannot read {name} from {file}: {error}", hint="copy the file again") from error


def _header(file: Path) -> dict[str, TensorInfo]:
    if not os.access(file, os.R_OK):  # safetensors says that there is no such file
        raise FormatError(f"you may not read {file}", hint="ask for its permissions")
    try:
        with safe_open(file, framework="pt") as opened:
            found = {}
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                part = opened.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise FormatError(f"{file}: tensor {name} has the unknown type {part.get_dtype()}")
                found[name] = TensorInfo(file, DTYPES[part.get_dtype()], tuple(part.get_shape()))
            return found
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{file} is not a complete safetensors file: {error}",
            hint="it is truncated or damaged: copy it again",
        ) from error


class ShardWriter:
    """Writes tensors into shards as they come, holding one shard at most.

    Args:
        sizes: at least the bytes of each tensor by name, in the order in which ``add`` will get them.
        shard_bytes: a shard is closed before it would exceed this; a larger tensor gets one of its own.
    """

    def __init__(self, directory: Path, sizes: Mapping[str, int], shard_bytes: int):
        self.directory = directory
        self._held: dict[str, torch.Tensor] = {}
        self._place: dict[str, int] = {}
        count, filled = 0, shard_bytes + 1
        for name, size in sizes.items():
            if filled + size > shard_bytes:
                count, filled = count + 1, 0
            filled += size
            self._place[name] = count
        self._count, self._total = count, 0
        self._order = list(sizes)
        self._next = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take the next tensor, and write its shard if it is the shard's last one.

        Raises:
            OutputError: the shard cannot be written.
        """
        if self._order[self._next] != name:
            raise AssertionError(f"{name} came where {self._order[self._next]} was planned")
        self._next += 1
        self._total += tensor.nbytes
        self._held[name] = tensor.contiguous()
        following = self._order[self._next] if self._next < len(self._order) else None
        if following is None or self._place[following] != self._place[name]:
            file = self.directory / self._file(self._place[name])
            try:
                save_file(self._held, file, metadata={"format": "pt"})
            except (SafetensorError, OSError) as error:
                raise cannot_write(Path(file.name), error) from error
            self._held = {}

    def finish(self) -> list[Path]:
        """Write the index if there is more than one shard; return the files."""
        if self._next != len(self._order):
            raise AssertionError(f"{len(self._order) - self._next} planned tensors never came")
        if self._count > 1:
            weight_map = {name: self._file(place) for name, place in self._place.items()}
            write_json(
                self.directory / INDEX, {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            )
        return [self.directory / self._file(i) for i in range(1, self._count + 1)]

    def _file(self, number: int) -> str:
        return SINGLE if self._count == 1 else f"model-{number:05d}-of-{self._count:05d}.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        FormatError: not readable, no JSON, or no object.
    """
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except PermissionError:
        raise FormatError(f"you may not read {path}", hint="ask for its permissions") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot read {path} as JSON: {error}", hint="copy the file again") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path} holds no JSON object")
    return data
