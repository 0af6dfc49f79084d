"""Numbers that were measured once and lie on disk: by key, with a checksum."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from msp_plugin.errors import OutputError
from msp_plugin.files import write_json

log = logging.getLogger(__name__)


def digest(key: Any) -> str:
    """Return the SHA-256 of a JSON value, in hex."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()


def source_digest(component: object) -> str:
    """Return the SHA-256 of the source of a component's classes and their modules, in hex.

    A class that was typed at a prompt has no source and counts by its name alone.
    """
    found = hashlib.sha256()
    for cls in type(component).__mro__:
        if cls is not object:
            found.update(cls.__qualname__.encode())
            with suppress(OSError, TypeError):
                found.update(inspect.getsource(inspect.getmodule(cls)).encode())
    return found.hexdigest()


def held(
    folder: Path, name: str, key: Mapping[str, Any], measure: Callable[[], Any], *, fresh: bool = False
) -> Any:
    """Return a JSON value that was measured for this key, measured and written if it is not there.

    A file that is damaged, or of another key, is named in the log and replaced.

    Args:
        key: JSON values that name everything the value depends on.
        fresh: measure it even if it is there.
    """
    path = folder / f"{name}-{digest(key)[:16]}.json"
    if path.exists() and not fresh:
        found = _read(path, key)
        if found is not None:
            return found["found"]
        log.warning("%s is damaged or of other data: %s is measured anew", path, name)
    began = time.monotonic()
    value = measure()
    write_json(path, {"key": dict(key), "found": value, "crc32": _checksum(value)})
    log.info("%s: %.1f s", name, time.monotonic() - began)
    return value


def _checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _read(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(found, dict) and {"key", "found", "crc32"} <= found.keys()
    if not whole or found["key"] != key or found["crc32"] != _checksum(found["found"]):
        return None
    return found


@contextmanager
def alone(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path`` for the block; it is free again however the process ends.

    Args:
        what: what the holder does, e.g. "a run writes to out".
        wait: wait for another process instead of refusing.

    Raises:
        OutputError: another process holds it, or the file cannot be made.
    """
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise OutputError(
                    f"another process holds {path}: {what}", hint="wait for it to end, or stop it"
                ) from None
            log.info("waiting for another process: %s", what)
            lock.acquire()
    except OSError as error:
        raise OutputError(
            f"cannot lock {path}: {error}",
            hint="set cache (or MSP_CACHE) to a directory that you may write to",
        ) from error
    try:
        yield
    finally:
        lock.release()
