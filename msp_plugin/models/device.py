"""Choose the device that a search runs on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from msp_plugin.models.offload import offloaded_module

log = logging.getLogger(__name__)

#: Free memory that a search needs on a GPU, as a multiple of the model's size: the model, a candidate's weights, and
#: half as much again for activations and caches (see cache_bytes).
ROOM = 2.5


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
