"""The embedded corpus: the source text of the standard library of the running Python.

Every machine that runs this package has it, so that the demo needs no download. The split of a file depends
only on its path below the library's root, so that training, calibration, search, hold-out and test never
share a file.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

from msp_plugin.errors import DataError

SPLITS = ("train", "calibration", "search", "holdout", "test")

#: Tables instead of code: their rows are so alike that every split would contain the same text.
_TABLES = ("encodings/", "pydoc_data/")
_NOT_LIBRARY = ("site-packages/", "dist-packages/", "__pycache__/", "config-", "lib-dynload/")


def split_of(name: str) -> str:
    """Return the split of a library file by its posix path, e.g. ``"json/decoder.py"``.

    Eighty per cent of the names are training text, and five per cent belong to each other split. CPython's
    own tests are always training text, because many systems leave them out, and the other splits must be the
    same on all.
    """
    if any(part in ("test", "tests", "idle_test") for part in name.split("/")):
        return "train"
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "train" if bucket < 80 else SPLITS[1 + (bucket - 80) // 5]


def library_files(split: str) -> list[Path]:
    """Return the standard-library files of one split, sorted by name.

    Raises:
        DataError: the split is unknown, or this interpreter has no source files on disk.
    """
    if split not in SPLITS:
        raise DataError(
            f"unknown split {split!r} of the embedded corpus", hint=f"use one of {', '.join(SPLITS)}"
        )
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    chosen = [
        name
        for name in names
        if not name.startswith(_TABLES)
        and not any(part in name for part in _NOT_LIBRARY)
        and split_of(name) == split
    ]
    if not chosen:
        raise DataError(
            f"no standard-library source of split {split!r} under {root}",
            hint="this interpreter ships without .py files; give a file of text instead",
        )
    return [root / name for name in chosen]


def library_texts(split: str) -> list[str]:
    """Return the text of every standard-library file of one split, in the order of their names."""
    return [path.read_text(encoding="utf-8", errors="replace") for path in library_files(split)]
