"""What was measured so far, on disk, so that what was killed goes on where it stopped.

An allocator is a function of its inputs, its seed and the losses that it asks for. With the losses at hand it
goes the same way again, at no cost, up to the first one that is missing. So the state of a search is the list
of its measurements: one line each, appended when it is made, with a checksum. Any allocator resumes so, a
third party's too.
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
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from msp_plugin.errors import OutputError
from msp_plugin.runtime.disk import writing
from msp_plugin.runtime.files import replacing
from msp_plugin.runtime.ranks import ALONE, Ranks

if TYPE_CHECKING:
    pass
log = logging.getLogger(__name__)


SCHEMA = "msp_plugin/journal"


class Journal:
    """Values by key, in an append-only file; a line that is torn or damaged is dropped and measured anew.

    Args:
        path: of the file, made with the first value; None keeps the values in memory only.
        identity: JSON values that name everything the values depend on; a file of another is not read.
        ranks: of the run; rank 0 reads and writes the file, all hold the same values.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any], ranks: Ranks = ALONE):
        self.path = path if ranks.rank == 0 else None
        self.identity = json.loads(json.dumps({"schema": SCHEMA, **identity}, default=str))
        self._values: dict[str, Any] = {}
        self._file: IO[bytes] | None = None
        if self.path is not None:
            for left in self.path.parent.glob(f".{self.path.name}.*.partial"):  # by a process that was killed
                left.unlink(missing_ok=True)
            if self.path.exists():
                self._read()
        self._values = ranks.on_rank_zero(lambda: self._values)

    def _read(self) -> None:
        first, *lines = _lines_of(self.path)
        before = _record(first)
        known = before == self.identity
        if isinstance(before, dict) and not known:
            changed = sorted(
                k for k in before.keys() | self.identity if before.get(k) != self.identity.get(k)
            )
            log.warning("%s is of another %s: it is begun anew", self.path, ", ".join(changed))
        elif not known and first.endswith(b"\n"):
            log.warning("%s is damaged: it is begun anew", self.path)
        records = [_record(line) for line in lines] if known else []
        records = [record if _is_value(record) else None for record in records]
        good = [line for line, record in zip(lines, records, strict=False) if record is not None]
        damaged = sum(line.endswith(b"\n") for line in lines) - len(good) if known else 0
        if damaged:  # a torn last line is no damage: it is what a kill leaves
            log.warning("%s: %d damaged lines are measured anew", self.path, damaged)
        self._values = {record["key"]: record["value"] for record in records if record is not None}
        if not known or len(good) < len(lines):
            with replacing(self.path) as temporary:
                temporary.write_bytes(b"".join([_line(self.identity), *good]))

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return the JSON value of a key, measured and written down if it is not there.

        All ranks ask for the same keys in the same order, and measure the same values.
        """
        if key not in self._values:
            value = measure()
            if self.path is not None:
                self._append({"key": key, "value": value})
            self._values[key] = value
        return self._values[key]

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        line = _line(record)
        try:
            with writing(self.path):
                self._write(line)
        except OutputError:
            with suppress(OSError):  # what could not be written it tries again
                self.close()
            raise

    def _write(self, line: bytes) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
            if self._file.tell() == 0:
                line = _line(self.identity) + line
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())


def _lines_of(path: Path) -> list[bytes]:
    """Return the lines of a file with their ends; one empty line for an empty file."""
    return path.read_bytes().splitlines(keepends=True) or [b""]


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _is_value(record: Any) -> bool:
    return isinstance(record, dict) and record.keys() >= {"key", "value"}


def _record(line: bytes) -> Any:
    """Return what a line says, None if it is torn or damaged."""
    head, _, text = line.partition(b" ")
    if not line.endswith(b"\n") or head != b"%08x" % zlib.crc32(text[:-1]):
        return None
    return json.loads(text)


def packed(array: np.ndarray) -> dict[str, Any]:
    """Return a float64 array as JSON, bit for bit."""
    data = zlib.compress(np.ascontiguousarray(array, dtype="<f8").tobytes(), 1)
    return {"shape": list(array.shape), "zlib": base64.b64encode(data).decode()}


def unpacked(held: Mapping[str, Any]) -> np.ndarray:
    data = zlib.decompress(base64.b64decode(held["zlib"]))
    return np.frombuffer(data, dtype="<f8").reshape(held["shape"]).copy()
