"""Where the search runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from msp_plugin.models.offload import offloaded_module

log = logging.getLogger(__name__)


#: Times the model that a search needs on a GPU: its own weights, a candidate's beside them, and half as much again
#: for activations and what is held for later (see memory.cache_bytes).
ROOM = 2.5


def _movable(model: torch.nn.Module) -> bool:
    if not torch.cuda.is_available() or hasattr(model, "hf_device_map") or offloaded_module(model):
        return False
    parameters = list(model.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    return all(p.device.type == "cpu" for p in parameters) and ROOM * size < torch.cuda.mem_get_info()[0]


@contextmanager
def on_best_device(model: torch.nn.Module) -> Iterator[None]:
    """Move a CPU model to the GPU for the block if it fits there ROOM times.

    A model that is already placed, offloaded or spread over devices stays as it is.
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
