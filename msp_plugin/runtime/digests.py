"""Digests of source code and versions, which say whether a stored measurement is still valid."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
from abc import ABC
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any


def digest(key: Any) -> str:
    """Return the SHA-256 of a JSON value, in hex."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()


def source_digest(*classes: type, modules: Iterable[ModuleType] = ()) -> str:
    """Return the SHA-256 of the names of classes and of the source of the modules that define them, in hex.

    A class that was typed at a prompt has no source and counts by its name only.

    Args:
        modules: further modules whose source counts.
    """
    sha256 = hashlib.sha256()
    for cls in classes:
        sha256.update(cls.__qualname__.encode())
    for module in dict.fromkeys([*map(inspect.getmodule, classes), *modules]):  # each once, in order
        if module is not None:
            with suppress(OSError, TypeError):
                sha256.update(inspect.getsource(module).encode())
    return sha256.hexdigest()


def folders_digest(root: Path, folders: Iterable[str]) -> str:
    """Return the SHA-256, in hex, of the names and contents of all Python files below folders of ``root``."""
    sha256 = hashlib.sha256()
    for file in sorted(file for folder in folders for file in (root / folder).rglob("*.py")):
        sha256.update(f"{file.relative_to(root).as_posix()}\n".encode())
        sha256.update(hashlib.sha256(file.read_bytes()).digest())
    return sha256.hexdigest()


def component_digest(component: object, modules: Iterable[ModuleType] = ()) -> str:
    """Return the source_digest of a component's class and its bases."""
    return source_digest(
        *(cls for cls in type(component).__mro__ if cls not in (object, ABC)), modules=modules
    )


def versions() -> dict[str, str]:
    """Return, by name, the versions of the installed packages that a result depends on."""
    names = ("msp_plugin", "torch", "transformers", "llmcompressor", "compressed-tensors", "numpy")
    return {name: version for name in names if (version := installed_version(name))}


@functools.cache
def installed_version(name: str) -> str | None:
    """Return the version of an installed package, None if there is none; its metadata is parsed once in a process."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
