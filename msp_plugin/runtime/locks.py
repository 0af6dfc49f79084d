"""Runs that were stopped: who writes to a directory, and what an unfinished run to it has measured."""

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
from msp_plugin.runtime.files import cache_directory, check_output

log = logging.getLogger(__name__)


@contextmanager
def alone(path: Path, what: str, *, wait: bool = False, remove: bool = False) -> Iterator[None]:
    """Hold the lock file ``path`` for the block; it is free again however the process ends.

    Args:
        what: what the holder does, e.g. "a run writes to out".
        wait: wait for another process instead of refusing.
        remove: remove the file at the end, while it is held; only for locks that nobody waits for.

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
            log.warning("waiting for another process: %s", what)
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # the second: filelock, on a disk without locks
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
    """Keep other processes off an output for the block, and yield its path; what killed ones left there goes.

    Args:
        out: a directory, new or empty, or, with ``file``, a file that is not there.
        cache: where the lock lies if the output's own place cannot be written.

    Raises:
        OutputError: another process writes there, or see check_output and check_new.
    """
    path = Path(out).expanduser().resolve()
    made = [folder for folder in path.parents if not folder.exists()]
    with suppress(OSError):  # check_output will say why
        path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, because runs to it may have different caches; and not in it, because it must be empty.
    # Always in the same place: the directory is made for the lock if it has to be.
    beside = path.parent.is_dir() and os.access(path.parent, os.W_OK)
    folder = path.parent if beside else cache_directory(cache) / "runs"
    try:
        lock = folder / f".{path.name}.{digest(str(path))[:8]}.lock"
        with alone(lock, f"it writes to {path}", remove=True):
            _remove_partial(path)
            check_new(path) if file else check_output(path)
            yield path
    finally:
        for folder in made:  # from the inside out, those that nothing was written to
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def sole_run(
    out: str | Path, cache: str | None, *, fresh: bool = False, keep: bool = False
) -> Iterator[tuple[Path, Path]]:
    """Keep other processes off an output directory for the block (see sole_output).

    Yields the directory's path and that of a journal, which lies in the cache, is there if an earlier run to
    this directory was stopped, and is removed if the block succeeds.

    Args:
        fresh: forget what an earlier run had measured.
        keep: leave the journal where it is: the block is not all of the run.

    Raises:
        OutputError: see sole_output.
    """
    with sole_output(out, cache) as path:
        journal = cache_directory(cache) / "runs" / f"{digest(str(path))[:24]}.jsonl"
        if fresh:
            journal.unlink(missing_ok=True)
        yield path, journal
        if not keep:
            journal.unlink(missing_ok=True)


@contextmanager
def scratch_directory(name: str, cache: str | None = None) -> Iterator[Path]:
    """Yield a new directory in a part of the cache, which goes with the block; what killed processes left goes first.

    Raises:
        OutputError: the cache cannot be written or locked.
    """
    parent = cache_directory(cache) / name
    folder = parent / uuid.uuid4().hex
    with ExitStack() as stack:
        with alone(
            parent.with_name(f"{name}.lock"), "it tidies up", wait=True
        ):  # so that a lock is not found before it is held
            for lock in parent.glob("*.lock"):  # whoever holds it lives, on whatever machine
                with suppress(OutputError), alone(lock, "it uses it", remove=True):
                    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            stack.enter_context(alone(folder.with_suffix(".lock"), "it uses it", remove=True))
        try:
            with writing(folder):
                folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_partial(out: Path) -> None:
    """Remove what output_directory(out) and replacing(out) wrote in a process that was killed."""
    name = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{32}}\.partial")
    for folder in (out.parent, out):
        if folder.is_dir():
            for entry in folder.iterdir():
                if name.fullmatch(entry.name):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
