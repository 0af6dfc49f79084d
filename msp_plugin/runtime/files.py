"""Write files so that they appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from msp_plugin.errors import OutputError

_ELSEWHERE = "give a directory that you may write to"


def expanded(path: str | Path) -> Path:
    """Return a path with ``~`` expanded; unchanged for an unknown user, where Path.expanduser raises."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def default_cache() -> Path:
    """Return ``$MSP_CACHE``, or ``msp_plugin`` under the user's cache directory."""
    base = os.environ.get("MSP_CACHE")
    if base:
        return expanded(base)
    user = expanded(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification ignores a path that is not absolute.
    return (user if user.is_absolute() else expanded("~/.cache")) / "msp_plugin"


def cache_directory(cache: str | None) -> Path:
    """Return the given cache directory with ``~`` expanded; the default one if none is given."""
    return expanded(cache) if cache else default_cache()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``, and rename it to ``path`` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(value: float | None) -> float | None:
    """Return the value, or None for infinity and NaN, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write sorted, indented JSON whole or not at all."""
    text = json.dumps(finite_json(data), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def finite_json(data: Any) -> Any:
    """Return JSON data with null for infinity and NaN, which JSON does not have."""
    if isinstance(data, dict):
        return {key: finite_json(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite_json(value) for value in data]
    return finite(data) if isinstance(data, float) else data


def check_output(path: str | Path) -> Path:
    """Return the absolute path of an output directory if a run may write there.

    Raises:
        OutputError: the path is a file, a directory that is not empty, or cannot be made.
    """
    path = expanded(path).resolve()
    try:
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file", hint="give a directory that does not exist yet")
        if path.is_dir() and any(path.iterdir()):
            raise OutputError(f"{path} is not empty", hint="give another directory, or empty this one")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint=_ELSEWHERE) from error
    check_writable(path)
    return path


def check_writable(path: Path) -> Path:
    """Return the directory at a path, or its nearest parent that exists, if a directory can be made in there.

    Raises:
        OutputError: it is a file or cannot be written.
    """
    try:
        parent = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not parent.is_dir():
            raise OutputError(f"{parent} is a file", hint="give a directory that does not exist yet")
        if not os.access(parent, os.W_OK):
            raise OutputError(f"{parent} is not writable", hint=_ELSEWHERE)
        # A directory is made, because os.access lets root write everywhere, even in /proc.
        probe = parent / f".{path.name}.{uuid.uuid4().hex}.partial"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint=_ELSEWHERE) from error
    return parent


@contextmanager
def output_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``path`` if the block succeeds.

    One rename makes ``path`` appear whole, also in place of an empty directory. If ``path`` is a mount point or holds
    the working directory, or its parent cannot be written, the finished files are moved into it one by one instead.

    Raises:
        OutputError: the finished directory cannot be moved; the message says where it is.
    """
    kept = path.is_dir() and Path.cwd().is_relative_to(path.resolve())  # a shell stands in it
    inside = kept or (path.is_dir() and (path.is_mount() or not os.access(path.parent, os.W_OK)))
    parent = path if inside else path.parent
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        for file in temporary.rglob("*"):  # safetensors creates its files readable by the owner alone
            file.chmod(file.stat().st_mode | (temporary.stat().st_mode & 0o444))
        if inside:
            for file in sorted(temporary.iterdir()):
                file.rename(path / file.name)
            temporary.rmdir()
        else:
            temporary.rename(path)
    except OSError as error:
        whole = temporary.with_suffix(".whole")  # the next run to this path removes *.partial
        with suppress(OSError):
            temporary = temporary.rename(whole)
        raise OutputError(
            f"cannot move the finished run to {path}: {error}", hint=f"it is whole in {temporary}"
        ) from error
