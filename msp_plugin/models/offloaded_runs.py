"""Runs on models whose weights stay on disk: the room that pruned ones need there, and quantized ones that run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from msp_plugin.models.offload import named_parameters, offload_cache, offloaded_module, onloaded
from msp_plugin.runtime.disk import check_free
from msp_plugin.runtime.files import cache_directory


def check_room(model: torch.nn.Module, cache: str | None) -> None:
    """Raise if the weights of a model are offloaded and the cache has no room for a pruned model's.

    Raises:
        OutputError: it has not; the need, what is free and where are named.
    """
    if offloaded_module(model) is None:
        return
    need = sum(p.numel() * p.element_size() for _, _, p in named_parameters(model))
    what = "the pruned weights of an offloaded model need"
    check_free(cache_directory(cache), need, what, "set cache (or MSP_CACHE) to a larger disk")


@contextmanager
def quantized_forward(model: torch.nn.Module) -> Iterator[None]:
    """Hold a quantized module's weights in memory while it runs, for the block.

    compressed-tensors quantizes the weight that it has read, and the linear layer then reads its weight again:
    what runs without this is the weight that was not quantized.
    """
    found = [
        module
        for module in model.modules()
        if offload_cache(module) is not None and getattr(module, "quantization_scheme", None) is not None
    ]
    own = [module.__dict__.get("forward") for module in found]
    for module in found:
        module.forward = partial(_onloaded_forward, module, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(found, own, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _onloaded_forward(module: torch.nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with onloaded(module):
        return forward(*args, **kwargs)
