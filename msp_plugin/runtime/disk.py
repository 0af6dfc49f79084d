"""Errors of a disk, said as ours."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from msp_plugin.errors import OutputError
from msp_plugin.runtime.files import check_output

#: By the number of an error of a disk: what to do.
DISK = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some of your quota, or write to another disk",
    errno.EFBIG: "a limit on the size of files is set (ulimit -f): raise it, or write to another disk",
    errno.EACCES: "give a place that you may write to",
    errno.EPERM: "give a place that you may write to",
    errno.ENOTDIR: "a part of the path is a file: give another place",
    errno.EROFS: "give a place on a disk that is not read-only",
}
#: Those that no read gives.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of an error of the disk in the block that ``path`` could not be written.

    Raises:
        OutputError: the block failed with an OSError, or safetensors did, which wraps them.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path | None, error: Exception) -> OutputError:
    """Return the error for a failed write to ``path``; without one, of what the error itself names."""
    number = of_disk(error)
    what = (
        f"write {path}"
        if path is not None
        else f"read or write {getattr(error, 'filename', None) or 'the output'}"
    )
    hint = DISK.get(number, "is the disk full, or the place read-only?")
    return OutputError(f"cannot {what}: {getattr(error, 'strerror', None) or error}", hint=hint)


def of_disk(error: BaseException) -> int | None:
    """Return the number in DISK of an error of a disk, also one that safetensors wraps; None for any other."""
    number = getattr(error, "errno", None)
    if number in DISK:
        return number
    return next((n for n in DISK if f"(os error {n})" in str(error)), None)


def is_full(error: BaseException | None) -> bool:
    """Return True if an error, or what it was made of, is that of a disk which takes nothing more."""
    while error is not None:
        if of_disk(error) in FULL:
            return True
        error = error.__cause__
    return False


def check_free(path: Path, need: int, what: str, hint: str) -> None:
    """Raise if the disk of a path, which need not exist yet, has less room than ``need`` bytes.

    Raises:
        OutputError: it has; the need, what is free and where are named.
    """
    where = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(where).free
    if need > free:
        raise OutputError(
            f"{what} {need / 2**30:.2f} GiB, {where} has {free / 2**30:.2f} GiB free", hint=hint
        )


def check_new(path: Path) -> None:
    """Raise unless a file can be made at a path, and none is there.

    Raises:
        OutputError: it exists, or its directory cannot be written.
    """
    with writing(path):
        if path.exists():
            raise OutputError(f"{path} exists", hint="give another file, or remove it")
    check_output(path)
