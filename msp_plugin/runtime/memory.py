"""Memory that does not suffice: recognised, answered with smaller batches; and what is freed given back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

from msp_plugin.errors import ModelError

Part = TypeVar("Part")

#: What torch says in a plain RuntimeError: its allocator on the CPU, CUDA before 2.0's own type, cuBLAS.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
#: Options of glibc's mallopt: bytes from which on a block is mapped by itself, and of free memory at the heap's end
#: from which on it is given back. _GLIBC is what it comes to by itself in a process that has freed large tensors.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_KEPT, _GLIBC = 2**30, (2**25, 2**26)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that memory did not suffice, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def in_parts(measure: Callable[[list[int]], Part], group: list[int], tokens: int) -> list[Part]:
    """Return what ``measure`` gives for a batch, or for its halves where memory does not suffice for it.

    Args:
        group: samples of one length.
        tokens: that length.

    Raises:
        ModelError: a single sample does not fit.
    """
    try:
        return [measure(group)]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if len(group) == 1:
            raise short_of_memory(
                f"one sample of {tokens:,} tokens does", "shorter samples (a smaller length)", error
            ) from error
    free_cached()  # here, where no traceback holds the tensors of the pass that failed
    half = len(group) // 2
    return in_parts(measure, group[:half], tokens) + in_parts(measure, group[half:], tokens)


def short_of_memory(what: str, remedy: str, error: BaseException) -> ModelError:
    """Return the error for what does not fit into memory beside the model, e.g. ``one sample does``."""
    lines = str(error).strip().splitlines()
    return ModelError(
        f"{what} not fit into memory beside the model{_free()}: {lines[0] if lines else type(error).__name__}",
        hint=f"give {remedy}, a smaller dtype, or a device with more memory",
    )


def cache_bytes(device: torch.device, most: int) -> int:
    """Return how much may be held for later on a device: ``most``, on a GPU at most an eighth of what is free."""
    return most if device.type != "cuda" else min(most, torch.cuda.mem_get_info(device)[0] // 8)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let glibc keep what is freed for the next tensor of that size; it goes back to the system at the end.

    Else it maps each tensor beyond 32 MiB, such as logits, anew, and the system clears every page of it again: of a
    forward pass of a model with 49,152 tokens that is almost half of the seconds.
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
    """Give back what is freed, and kept for later: by torch on a GPU, by the C library on the CPU.

    On a GPU a smaller batch finds it in one piece then. glibc takes tensors below 32 MiB from its heap, and keeps
    the gigabytes that a step of many of them has freed, until it is told to let them go.
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
