"""Memory in which packed weights of a CPU lie one behind the other, in huge pages where the system has them."""

from __future__ import annotations

import mmap
import threading
import weakref
from dataclasses import replace

import torch

from msp_plugin.serving.cpu.kernel import PackedWeight

_HUGE = 2 << 20
#: Bytes of address space taken at a time; a page of it is memory only when something is written there.
_CHUNK = 64 << 20
_LINE = 64


class _Memory:
    """Gives out memory from chunks. A chunk goes back to the system when the last tensor in it is gone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: weakref.ref[mmap.mmap] | None = None
        self._next = 0

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a contiguous tensor in this memory, or itself where the system has no huge pages."""
        advice = getattr(mmap, "MADV_HUGEPAGE", None)
        if advice is None or not tensor.numel():
            return tensor
        with self._lock:
            chunk = self._chunk() if self._chunk is not None else None
            if chunk is None or self._next + tensor.nbytes > len(chunk):
                size = max(_CHUNK, -(-tensor.nbytes // _HUGE) * _HUGE + _HUGE)
                try:  # private: a process that this one forks has memory of its own
                    chunk = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                    chunk.madvise(advice)
                except OSError:  # a kernel without huge pages, or no more address space
                    return tensor
                self._chunk = weakref.ref(chunk)
                self._next = -torch.frombuffer(chunk, dtype=torch.uint8).data_ptr() % _HUGE
            place = self._next
            self._next += -(-tensor.nbytes // _LINE) * _LINE
        held = torch.frombuffer(chunk, dtype=tensor.dtype, count=tensor.numel(), offset=place)
        return held.view(tensor.shape).copy_(tensor)


_memory = _Memory()


def in_huge_pages(weight: PackedWeight) -> PackedWeight:
    """Return a packed weight with values and bitmask copied to huge pages.

    A product with one token reads each weight once. In pages of 4 KiB it waits for the address of every page.
    """
    return replace(weight, values=_memory.hold(weight.values), bitmask=_memory.hold(weight.bitmask))
