"""Digests of what measured numbers depend on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
from contextlib import suppress
from typing import Any


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


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on, those that are installed."""
    found = {}
    for name in ("msp_plugin", "torch", "transformers", "llmcompressor", "compressed-tensors", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
