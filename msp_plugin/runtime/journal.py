"""A file of the measurements made so far, so that a run that was killed continues where it stopped.

An allocator depends only on its inputs, its seed and the losses that it asks for. Given the recorded losses it
repeats its steps at no cost up to the first missing loss. So the state of a search is the list of its measurements:
one line each, with a checksum, appended as soon as it is made. Allocators of plugins resume in the same way.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from msp_plugin.errors import OutputError
from msp_plugin.runtime.disk import writing
from msp_plugin.runtime.files import replacing
from msp_plugin.runtime.ranks import ALONE, Ranks

log = logging.getLogger(__name__)

SCHEMA = "msp_plugin/journal"


class Journal:
    """Values by key, in an append-only file; a torn or damaged line is dropped, and its value measured again.

    A file with another identity, such as that of a command with another option, is kept beside it (see journals_of), and
    read again once a journal asks for its identity.

    Args:
        path: the file, written with the first value; None keeps the values in memory only.
        identity: JSON values that name everything the values depend on; a file with another identity is not read.
        ranks: the ranks of the run; rank 0 reads and writes the file, all hold the same values.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any], ranks: Ranks = ALONE):
        self.path = path if ranks.rank == 0 else None
        self.identity = json.loads(json.dumps({"schema": SCHEMA, **identity}, default=str))
        self._values: dict[str, Any] = {}
        self._file: IO[bytes] | None = None
        if self.path is not None:
            # Left by a process that was killed.
            for partial in self.path.parent.glob(f".{self.path.name}.*.partial"):
                partial.unlink(missing_ok=True)
            self._set_other_aside(self.path)
            if self.path.exists():
                self._values = self._read(self.path)
        self._values = ranks.on_rank_zero(lambda: self._values)

    def _set_other_aside(self, path: Path) -> None:
        """Rename a file with another identity, and put one with this identity that was set aside in its place."""
        first = _lines_of(path)[0] if path.exists() else b""
        identity, own = _record(first), _aside(path, _line(self.identity))
        if isinstance(identity, dict) and identity != self.identity:
            changed = sorted(
                key for key in identity.keys() | self.identity if identity.get(key) != self.identity.get(key)
            )
            log.warning(
                "%s belongs to another %s: it is kept for that, and this starts again",
                path,
                ", ".join(changed),
            )
            path.replace(_aside(path, first))
        if own.exists() and not path.exists():
            own.replace(path)

    def _read(self, path: Path) -> dict[str, Any]:
        """Return the values in the file, and rewrite the file without its damaged lines."""
        first, *lines = _lines_of(path)
        known = _record(first) == self.identity
        if not known and first.endswith(b"\n"):
            log.warning("%s is damaged: it starts again", path)
        records = [_record(line) for line in lines] if known else []
        records = [record if _is_value(record) else None for record in records]
        good = [line for line, record in zip(lines, records, strict=False) if record is not None]
        damaged = sum(line.endswith(b"\n") for line in lines) - len(good) if known else 0
        if damaged:  # a torn last line is no damage: it is what a kill leaves
            log.warning("%s: %d damaged lines are measured again", path, damaged)
        if not known or len(good) < len(lines):
            with replacing(path) as temporary:
                temporary.write_bytes(b"".join([_line(self.identity), *good]))
        return {record["key"]: record["value"] for record in records if record is not None}

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return the JSON value of a key; if it is missing, measure it and write it to the file.

        All ranks must ask for the same keys in the same order, and measure the same values.
        """
        if key not in self._values:
            value = measure()
            if self.path is not None:
                self._append(self.path, {"key": key, "value": value})
            self._values[key] = value
        return self._values[key]

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _append(self, path: Path, record: Mapping[str, Any]) -> None:
        line = _line(record)
        try:
            with writing(path):
                self._write(path, line)
        except OutputError:
            with suppress(OSError):  # closing tries to write the same bytes again
                self.close()
            raise

    def _write(self, path: Path, line: bytes) -> None:
        if self._file is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            if self._file.tell() == 0:
                line = _line(self.identity) + line
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())


def journals_of(path: Path) -> list[Path]:
    """Return the files of a journal's path: itself, and those of other identities that were set aside."""
    return [path, *path.parent.glob(f"{path.stem}-*{path.suffix}")]


def _aside(path: Path, identity: bytes) -> Path:
    """Return the place of a journal that is set aside, by the line with its identity."""
    return path.with_name(f"{path.stem}-{zlib.crc32(identity):08x}{path.suffix}")


def _lines_of(path: Path) -> list[bytes]:
    """Return the lines of a file with their ends; one empty line for an empty file."""
    return path.read_bytes().splitlines(keepends=True) or [b""]


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _is_value(record: Any) -> bool:
    return isinstance(record, dict) and record.keys() >= {"key", "value"}


def _record(line: bytes) -> Any:
    """Return the record of a line, None if the line is torn or damaged."""
    head, _, text = line.partition(b" ")
    if not line.endswith(b"\n") or head != b"%08x" % zlib.crc32(text[:-1]):
        return None
    return json.loads(text)


def packed(array: np.ndarray) -> dict[str, Any]:
    """Return a float64 array as JSON that keeps every bit."""
    data = zlib.compress(np.ascontiguousarray(array, dtype="<f8").tobytes(), 1)
    return {"shape": list(array.shape), "zlib": base64.b64encode(data).decode()}


def unpacked(record: Mapping[str, Any]) -> np.ndarray:
    """Return the float64 array from the JSON of ``packed``."""
    data = zlib.decompress(base64.b64decode(record["zlib"]))
    return np.frombuffer(data, dtype="<f8").reshape(record["shape"]).copy()
