"""Locks: only one process at a time writes to an output; leftovers of killed processes are removed."""

from __future__ import annotations

import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from msp_plugin.errors import OutputError
from msp_plugin.runtime.digests import digest
from msp_plugin.runtime.disk import check_new, writing
from msp_plugin.runtime.files import cache_directory, check_output, expanded
from msp_plugin.runtime.journal import journals_of

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, what: str, *, wait: bool = False, remove: bool = False) -> Iterator[None]:
    """Hold the lock file ``path`` during the block; the system frees it when the process ends in any way.

    Args:
        what: what the holder does, for messages, e.g. "it writes to out".
        wait: wait for another process instead of raising.
        remove: remove the file before the lock is freed; only for locks that no process waits for.

    Raises:
        OutputError: another process holds the lock, or the file cannot be made.
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
            log.warning("waiting for another process: %s", what)
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # filelock raises the second where the disk has no locks
        raise OutputError(
            f"cannot lock {path}: {error}",
            hint="set cache (or MSP_CACHE) to a directory that you may write to",
        ) from error
    try:
        yield
    finally:
        if remove:
            path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def sole_output(out: str | Path, cache: str | None = None, *, file: bool = False) -> Iterator[Path]:
    """Yield the absolute path of an output, locked against other processes during the block.

    Partial files that killed processes left there are removed first.

    Args:
        out: a new or empty directory; with ``file``, a new file.
        cache: directory of the lock where the output's parent cannot be written.

    Raises:
        OutputError: another process writes there, or the output cannot be made (see check_output and
            check_new).
    """
    path = expanded(out).resolve()
    made = [folder for folder in path.parents if not folder.exists()]
    with suppress(OSError):  # check_output raises with the reason
        path.parent.mkdir(parents=True, exist_ok=True)
    # The lock lies beside the output: runs to it may have different caches, and the output itself must be
    # empty. The parent is made first, so that all processes look for the lock in the same place.
    beside = path.parent.is_dir() and os.access(path.parent, os.W_OK)
    folder = path.parent if beside else cache_directory(cache) / "runs"
    try:
        lock = folder / f".{path.name}.{digest(str(path))[:8]}.lock"
        with locked(lock, f"it writes to {path}", remove=True):
            _remove_partial(path)
            if file:
                check_new(path)
            else:
                check_output(path)
            yield path
    finally:
        for folder in made:  # from the inside out; only empty ones can be removed
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def sole_run(
    out: str | Path, cache: str | None, *, fresh: bool = False, keep: bool = False
) -> Iterator[tuple[Path, Path]]:
    """Yield (output directory, journal file), locked against other processes (see sole_output).

    The journal lies in the cache. It exists if an earlier run to this directory was stopped, and is removed
    if the block succeeds.

    Args:
        fresh: remove the journal of an earlier run first.
        keep: leave the journal in place, because the run goes on after the block.

    Raises:
        OutputError: see sole_output.
    """
    with sole_output(out, cache) as path:
        journal = cache_directory(cache) / "runs" / f"{digest(str(path))[:24]}.jsonl"
        if fresh:
            journal.unlink(missing_ok=True)
        yield path, journal
        if not keep:  # no other command can write to this directory now
            for file in journals_of(journal):
                file.unlink(missing_ok=True)


@contextmanager
def scratch_directory(name: str, cache: str | None = None) -> Iterator[Path]:
    """Yield a new directory below ``name`` in the cache, and remove it after the block.

    Directories that killed processes left there are removed first.

    Raises:
        OutputError: the cache cannot be written or locked.
    """
    parent = cache_directory(cache) / name
    folder = parent / uuid.uuid4().hex
    with ExitStack() as stack:
        # One process at a time cleans up, so that none sees a lock file before its owner holds it.
        with locked(parent.with_name(f"{name}.lock"), "it cleans up", wait=True):
            for lock in parent.glob("*.lock"):
                with suppress(OutputError), locked(lock, "it uses it", remove=True):  # else its owner lives
                    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            stack.enter_context(locked(folder.with_suffix(".lock"), "it uses it", remove=True))
        try:
            with writing(folder):
                folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_partial(out: Path) -> None:
    """Remove the partial files that output_directory(out) or replacing(out) left in a killed process."""
    name = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{32}}\.partial")
    for folder in (out.parent, out):
        if folder.is_dir():
            for entry in folder.iterdir():
                if name.fullmatch(entry.name):
                    if entry.is_dir():
                        shutil.rmtree(entry)
                    else:
                        entry.unlink()
