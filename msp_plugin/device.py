"""Where the search runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

log = logging.getLogger(__name__)


@contextmanager
def on_best_device(model: torch.nn.Module) -> Iterator[None]:
    """Move a CPU model to the GPU for the block if it fits there with half as much again to spare.

    A model that is already placed, offloaded or spread over devices stays as it is.
    """
    parameters = list(model.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    movable = not hasattr(model, "hf_device_map") and all(p.device.type == "cpu" for p in parameters)
    if movable and torch.cuda.is_available() and 1.5 * size < torch.cuda.mem_get_info()[0]:
        log.info("search on %s", torch.cuda.get_device_name())
        model.to("cuda")
        try:
            yield
        finally:
            model.to("cpu")
    else:
        yield
