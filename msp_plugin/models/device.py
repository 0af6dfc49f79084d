"""Choose the device that a search runs on, and tell of a number type that is slow there."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from msp_plugin.models.offload import offloaded_module

log = logging.getLogger(__name__)

#: Free memory that a search needs on a GPU, as a multiple of the model's size: the model, a candidate's weights, and
#: half as much again for activations and caches (see cache_bytes).
ROOM = 2.5
#: Weights from which a type is looked at, and how many times slower than in float32 its products may be.
LARGE = 1_000_000
SLOW = 3.0


def _movable(model: torch.nn.Module) -> bool:
    """Return True if a model is in CPU memory and the GPU has room for a search on it."""
    if not torch.cuda.is_available() or hasattr(model, "hf_device_map") or offloaded_module(model):
        return False
    parameters = list(model.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    return all(p.device.type == "cpu" for p in parameters) and ROOM * size < torch.cuda.mem_get_info()[0]


@contextmanager
def on_best_device(model: torch.nn.Module) -> Iterator[None]:
    """Move a CPU model to the GPU for the block if the GPU has ROOM times its size free.

    A model that is offloaded, or on other devices already, stays where it is.
    """
    if _movable(model):
        log.info("search on %s", torch.cuda.get_device_name())
        model.to("cuda")
        try:
            yield
        finally:
            model.to("cpu")
    else:
        yield


def warn_if_slow(model: torch.nn.Module) -> None:
    """Log a warning, once for each dtype, if the CPU is to run a large model in a dtype that it multiplies slowly.

    Processors without instructions for bfloat16 or float16 take about ten times as long as for float32.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if torch.cuda.is_available() or dtype not in (torch.bfloat16, torch.float16):
        return
    if sum(p.numel() for p in model.parameters()) >= LARGE:
        _warn_of(dtype)


@cache
def _warn_of(dtype: torch.dtype) -> None:
    """Log the warning if it is due; the measurement takes a tenth of a second."""
    times = slowness(dtype)
    if times >= SLOW:
        name = str(dtype).removeprefix("torch.")
        log.warning(
            "this CPU multiplies %s %.0f times as slowly as float32: dtype float32 is faster here, and takes twice the memory",
            name,
            times,
        )


def slowness(dtype: torch.dtype) -> float:
    """Return how many times as long as in float32 a matrix product takes on this CPU."""

    def seconds(dtype: torch.dtype) -> float:
        matrix, found = torch.ones(256, 512, dtype=dtype), []
        for _ in range(4):
            began = time.perf_counter()
            matrix @ matrix.T
            found.append(time.perf_counter() - began)
        return min(found)

    return seconds(dtype) / seconds(torch.float32)
