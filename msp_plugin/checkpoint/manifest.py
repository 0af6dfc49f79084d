"""export.json: the files, tensors and packed layers of an export, so that a copy of it can be checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from msp_plugin.errors import FormatError, shown
from msp_plugin.formats.tensor_files import read_json
from msp_plugin.runtime.files import write_json

MANIFEST_FILE = "export.json"
SCHEMA = "msp_plugin/export"
VERSION = 1
#: Most bytes that file systems allow in a file's name.
LONGEST_NAME = 255


@dataclass(frozen=True)
class Manifest:
    """The contents of export.json (``schema: msp_plugin/export``, ``version: 1``).

    Args:
        format: the exporter's name.
        files: by file name, its ``bytes`` and ``sha256``.
        tensors: by name, the shape of every tensor in the files.
        packed: by packed layer, its level's name; without an allocation, the format's structure, e.g. ``2:4``.
        kept_dense: by layer that was considered and not packed, the reason.
        packed_bytes: bytes that the packed layers take, without their ``shape`` tensors.
        dense_bytes: bytes that the same layers take dense, in the same dtype.
        negative_zeros: by layer, the zeros whose sign was dropped.
        structure: only of a smaller model, also once it is packed; by half-block of the model before: the number of its ``groups`` (KV heads
            or channels), the ``kept`` ones as runs, and the ``module`` that holds them, empty for a dropped half.
        versions: of the packages that wrote it.
    """

    format: str
    files: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, Sequence[int]]
    packed: Mapping[str, str] = field(default_factory=dict)
    kept_dense: Mapping[str, str] = field(default_factory=dict)
    packed_bytes: int = 0
    dense_bytes: int = 0
    negative_zeros: Mapping[str, int] = field(default_factory=dict)
    structure: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """Return the manifest of a directory, None if it has none.

        Raises:
            FormatError: it is damaged, or of a newer version.
        """
        path = directory / MANIFEST_FILE
        if not path.is_file():
            return None
        data = read_json(path)
        if data.get("schema") != SCHEMA:
            raise FormatError(f"{path} is not an export manifest", hint=f'expected schema "{SCHEMA}"')
        if data.get("version") != VERSION:
            raise FormatError(
                f"{path} has version {shown(data.get('version'))}, this package reads {VERSION}",
                hint="update msp_plugin",
            )
        hints = get_type_hints(cls)
        if unknown := data.keys() - hints.keys() - {"schema", "version"}:
            raise FormatError(f"{path} is damaged: a manifest has no key {shown(min(unknown))}")
        try:
            manifest = cls(**{key: value for key, value in data.items() if key in hints})
            for key, kind in hints.items():
                TypeAdapter(kind).validate_python(getattr(manifest, key), strict=True)
            for name, entry in manifest.files.items():
                size = entry["bytes"]
                whole = isinstance(size, int) and not isinstance(size, bool) and size >= 0
                known = Path(name).name == name and len(name.encode()) <= LONGEST_NAME
                if not known or not isinstance(entry["sha256"], str) or not whole:
                    raise ValueError(f"file {shown(name)}")
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in (key, *first["loc"]))
            raise FormatError(f"{path} is damaged: {where}: {first['msg']}") from None
        except (TypeError, KeyError, ValueError) as error:
            raise FormatError(f"{path} is damaged: {type(error).__name__}: {error}") from None
        return manifest

    def write(self, directory: Path) -> None:
        """Write export.json into a directory."""
        write_json(directory / MANIFEST_FILE, {"schema": SCHEMA, "version": VERSION, **asdict(self)})

    def differences(self, directory: Path) -> list[str]:
        """Return a text for each file in a directory that is missing, or has another size or other bytes.

        Reads every file completely.
        """
        wrong = []
        for name, entry in self.files.items():
            file = directory / name
            if not file.is_file():
                wrong.append(f"{name} is missing")
            elif file.stat().st_size != entry["bytes"]:
                wrong.append(f"{name} has {file.stat().st_size:,} bytes, {entry['bytes']:,} were written")
            elif digest(file) != entry["sha256"]:
                wrong.append(f"{name} has other bytes than were written (SHA-256)")
        return wrong


def describe_files(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return the ``bytes`` and ``sha256`` of files by name; each file is read."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": digest(file)} for file in files}


def digest(file: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
