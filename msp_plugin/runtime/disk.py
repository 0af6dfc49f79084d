"""Turn disk errors into our own errors with a hint."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from msp_plugin.errors import OutputError
from msp_plugin.runtime.files import check_output

#: The hint for the user, by errno.
HINTS = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some of your quota, or write to another disk",
    errno.EFBIG: "a limit on the size of files is set (ulimit -f): raise it, or write to another disk",
    errno.EACCES: "give a place that you may read and write",
    errno.EPERM: "give a place that you may read and write",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "a link leads to itself: give another place",
    errno.ENOTDIR: "a part of the path is a file: give another place",
    errno.EROFS: "give a place on a disk that is not read-only",
}
#: The errnos that only a failed write has, never a failed read.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn every disk error in the block into an OutputError that names ``path``.

    Raises:
        OutputError: the block failed with an OSError, or with safetensors' own error, which wraps one.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path | None, error: Exception) -> OutputError:
    """Return the error for a failed write to ``path``, or to the file that the error itself names."""
    action = f"write {path}"
    if path is None:
        action = f"read or write {getattr(error, 'filename', None) or 'the output'}"
    number = disk_errno(error)
    hint = "is the disk full, or the place read-only?" if number is None else HINTS[number]
    return OutputError(f"cannot {action}: {getattr(error, 'strerror', None) or error}", hint=hint)


def disk_errno(error: BaseException) -> int | None:
    """Return the errno of a disk error, a key of HINTS; None for any other error.

    safetensors wraps such errors and gives the errno only in its message.
    """
    number = getattr(error, "errno", None)
    if isinstance(number, int) and number in HINTS:
        return number
    return next((n for n in HINTS if f"(os error {n})" in str(error)), None)


def is_full(error: BaseException | None) -> bool:
    """Return True if an error, or one of its causes, says that the disk takes no more data."""
    while error is not None:
        if disk_errno(error) in FULL:
            return True
        error = error.__cause__
    return False


def check_free(path: Path, need: int, what: str, hint: str) -> None:
    """Raise unless the disk of ``path`` has ``need`` bytes free; the path need not exist yet.

    Args:
        what: begins the message, with its verb, e.g. "the pruned weights need".

    Raises:
        OutputError: it has fewer; the message gives the need, the free space and the place.
    """
    where = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(where).free
    if need > free:
        raise OutputError(
            f"{what} {need / 2**30:.2f} GiB, {where} has {free / 2**30:.2f} GiB free", hint=hint
        )


def check_new(path: Path) -> None:
    """Raise unless a new file can be made at a path.

    Raises:
        OutputError: a file or directory is there, or its directory cannot be written.
    """
    with writing(path):
        if path.is_dir():
            raise OutputError(f"{path} is a directory", hint="give a file")
        if path.exists():
            raise OutputError(f"{path} exists", hint="give another file, or remove it")
    check_output(path)
