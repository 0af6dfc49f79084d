"""Retry with less in memory when it runs out, and return freed memory to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

from msp_plugin.errors import ModelError

T = TypeVar("T")

#: Torch reports some shortages of memory as plain RuntimeErrors with these words (CPU allocator, CUDA, cuBLAS).
_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
#: Options of glibc's mallopt (mallopt(3)): blocks from the first size on are mapped by themselves, and free memory
#: at the end of the heap beyond the second size is returned.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
#: Values of both in bytes: ours, and the two that glibc itself reaches in a process that has freed large tensors.
_KEPT, _GLIBC = 2**30, (2**25, 2**26)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _MESSAGES)


def retried(work: Callable[[], T], release: Callable[[], bool]) -> T:
    """Return the result of ``work``; if memory runs out, call ``release`` and try once more.

    Args:
        release: frees memory that is held for later; returns False if there is none, which keeps the error.
    """
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or not release():
            raise
    free_cached()  # here, where no traceback holds the tensors of what failed
    return work()


@contextmanager
def shortage_explained(subject: str, remedy: str) -> Iterator[None]:
    """Turn an error in the block that says that memory ran out into a ModelError.

    Args:
        subject, remedy: see short_of_memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise short_of_memory(subject, remedy, error) from error


def short_of_memory(subject: str, remedy: str, error: BaseException) -> ModelError:
    """Return the error that something does not fit into memory beside the model.

    Args:
        subject: what does not fit, with the verb, e.g. ``one sample does``; "not fit into memory" follows.
        remedy: what the user can give instead, e.g. ``shorter samples``.
    """
    lines = str(error).strip().splitlines()
    return ModelError(
        f"{subject} not fit into memory beside the model{_free()}: {lines[0] if lines else type(error).__name__}",
        hint=f"give {remedy}, a smaller dtype, or a device with more memory",
    )


def cache_bytes(device: torch.device, most: int) -> int:
    """Return how many bytes may be cached on a device: ``most``, but on a GPU at most 1/8 of its free memory."""
    return most if device.type != "cuda" else min(most, torch.cuda.mem_get_info(device)[0] // 8)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let glibc reuse freed memory for later tensors during the block, and return it at the end.

    By default glibc maps new memory for each tensor above 32 MiB, such as logits, and the system clears its pages.
    That took almost half of the time of a forward pass of a model with a vocabulary of 49,152 tokens.
    """
    _set_malloc(_KEPT, _KEPT)
    try:
        yield
    finally:
        _set_malloc(*_GLIBC)
        free_cached()


def _set_malloc(mapped: int, trimmed: int) -> None:
    with suppress(AttributeError, OSError, TypeError):  # another C library, or Windows
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(_M_MMAP_THRESHOLD, mapped):  # older ones allow no more
            mallopt(_M_MMAP_THRESHOLD, _GLIBC[0])
        mallopt(_M_TRIM_THRESHOLD, trimmed)


def free_cached() -> None:
    """Return to the system the freed memory that torch (GPU) or the C library (CPU) still holds.

    On a GPU a smaller batch can then get it in one piece. glibc takes tensors below 32 MiB from its heap, and keeps
    the gigabytes that many of them have freed until it is told to trim.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(AttributeError, OSError, TypeError):  # another C library, or Windows
        ctypes.CDLL(None).malloc_trim(0)


def _free() -> str:
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    return f" ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free on the GPU)"
