"""Retry with less held in memory when it runs out, and give freed memory back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

from msp_plugin.errors import ModelError

T = TypeVar("T")

#: Parts of the messages of torch's plain RuntimeErrors about memory: of its CPU allocator, of CUDA and of
#: cuBLAS.
_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
#: Options of glibc's mallopt (mallopt(3)), in bytes: a block of this size is mapped by itself, and this much
#: free memory at the heap's end is given back. _GLIBC: its own values in a process that has freed large
#: tensors.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_KEPT, _GLIBC = 2**30, (2**25, 2**26)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _MESSAGES)


def retried(work: Callable[[], T], release: Callable[[], bool]) -> T:
    """Return the result of ``work``; where memory does not suffice for it, of a second try after ``release``.

    Args:
        release: lets go of what is held for later; False if there was nothing, so that the error stands.
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
    """Raise a ModelError in the place of an error in the block that says that memory does not suffice.

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
        subject: it, with its verb, e.g. ``one sample does``.
        remedy: something to give instead, e.g. ``shorter samples``.
    """
    lines = str(error).strip().splitlines()
    return ModelError(
        f"{subject} not fit into memory beside the model{_free()}: {lines[0] if lines else type(error).__name__}",
        hint=f"give {remedy}, a smaller dtype, or a device with more memory",
    )


def cache_bytes(device: torch.device, most: int) -> int:
    """Return how many bytes may be cached on a device: ``most``, on a GPU at most 1/8 of what is free."""
    return most if device.type != "cuda" else min(most, torch.cuda.mem_get_info(device)[0] // 8)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let glibc reuse freed memory for later tensors during the block, and give it back at the end.

    By default glibc maps each tensor beyond 32 MiB, such as logits, anew, and the system clears all of its
    pages: almost half of the seconds of a forward pass of a model with 49,152 tokens.
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
    """Give freed memory that torch (on a GPU) or the C library (on the CPU) has kept back to the system.

    On a GPU a smaller batch then gets it in one piece. glibc takes tensors below 32 MiB from its heap, and
    keeps the gigabytes that a step with many of them has freed until it is asked to trim.
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
