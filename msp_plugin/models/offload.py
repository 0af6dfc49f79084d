"""Models whose weights accelerate or compressed-tensors keeps on disk or in another memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

from msp_plugin.errors import ModelError
from msp_plugin.runtime.disk import check_free
from msp_plugin.runtime.files import cache_directory

AnyModule = TypeVar("AnyModule", bound=torch.nn.Module)


def linear(model: torch.nn.Module, layer: str) -> torch.nn.Linear:
    """Return the linear of that name in a model; its weight may be offloaded."""
    module = model.get_submodule(layer)
    assert isinstance(module, torch.nn.Linear), f"{layer} is a {type(module).__name__}"
    return module


def offload_hook(module: torch.nn.Module) -> Any:
    """Return accelerate's hook that loads a module's own weights for each forward pass, or None."""
    hook = getattr(module, "_hf_hook", None)
    return hook if getattr(hook, "offload", False) else None


def offload_cache(module: torch.nn.Module) -> Any:
    """Return compressed-tensors' cache, which stands in for a module's parameters and loads them, or None."""
    return None if isinstance(module._parameters, dict) else module._parameters


def is_offloaded(module: torch.nn.Module) -> bool:
    """Return True if a module's own weights are kept elsewhere and loaded whenever it needs them."""
    return offload_hook(module) is not None or offload_cache(module) is not None


def own_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """Return a module's own parameters by name, without loading offloaded ones."""
    cache = offload_cache(module)
    parameters: dict[str, torch.nn.Parameter | None]
    parameters = module._parameters if cache is None else cache.offloaded_values
    return parameters


def named_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Parameter]]:
    """Yield (name, module, parameter) once for each parameter, without loading offloaded ones."""
    seen = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in own_parameters(module).items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield f"{prefix}.{leaf}" if prefix else leaf, module, parameter


def offloaded_module(model: torch.nn.Module) -> str | None:
    """Return the name of the first module whose weights are offloaded; None if all are in memory."""
    for name, module in model.named_modules():
        if is_offloaded(module) or _is_away(module):
            return name or "the model"
    return None


def _is_away(module: torch.nn.Module) -> bool:
    return any(p is not None and p.device.type == "meta" for p in own_parameters(module).values())


@contextmanager
def onloaded(module: AnyModule) -> Iterator[AnyModule]:
    """Yield the module with its own weights in memory during the block; offloaded ones are read first."""
    if offload_hook(module) is not None:
        from accelerate.utils import align_module_device

        with align_module_device(module):
            yield module
    elif offload_cache(module) is not None:
        with offload_cache(module).disable_offloading():  # each weight is read once in the block
            yield module
    else:
        yield module


def weight_device(module: torch.nn.Module) -> torch.device:
    """Return the device on which a module computes with its weight, wherever the weight is kept."""
    hook, cache = offload_hook(module), offload_cache(module)
    if cache is not None:
        return torch.device(cache.onload_device)
    if hook is not None:
        return torch.device(hook.execution_device)
    weight = module.weight
    assert isinstance(weight, torch.Tensor), f"{type(module).__name__} has no weight"
    return weight.device


def input_embeddings(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module that turns a transformers model's token ids into hidden states."""
    get_input_embeddings: Any = model.get_input_embeddings  # a method of transformers' models
    embeddings: torch.nn.Module = get_input_embeddings()
    return embeddings


def input_device(model: torch.nn.Module) -> torch.device:
    """Return the device for token ids: the one on which the embeddings compute."""
    embeddings = input_embeddings(model)
    return weight_device(embeddings) if is_offloaded(embeddings) else next(model.parameters()).device


def check_loadable(model: torch.nn.Module) -> None:
    """Raise unless all weights can be read and swapped: in memory, or by a known hook or cache.

    Raises:
        ModelError: some cannot; the message names the first such module.
    """
    for name, module in model.named_modules():
        if _is_away(module) and not is_offloaded(module):
            raise ModelError(
                f"the weights of {name} are offloaded, and no hook of accelerate on the module itself "
                "loads them",
                hint="load the model again with transformers, with device_map or without",
            )
        if getattr(offload_cache(module), "offloading_disabled", False):
            raise ModelError(
                f"the weights of {name} stay loaded once they are read, so they cannot be exchanged",
                hint="call it outside of compressed-tensors' disable_offloading",
            )


def check_room(model: torch.nn.Module, cache: str | None) -> None:
    """Raise if a model is offloaded and the disk of the cache has no room for the weights of a pruned copy.

    Raises:
        OutputError: there is too little room; the message gives the need, the free space and the place.
    """
    if offloaded_module(model) is None:
        return
    need = sum(p.numel() * p.element_size() for _, _, p in named_parameters(model))
    what = "the pruned weights of an offloaded model need"
    check_free(cache_directory(cache), need, what, "set cache (or MSP_CACHE) to a larger disk")


@contextmanager
def quantized_forward(model: torch.nn.Module) -> Iterator[None]:
    """Keep the weights of each quantized module in memory while it runs, during the block.

    compressed-tensors quantizes the weight that it has read, and the linear layer then reads its weight
    again. Without this the layer would use the unquantized weight.
    """
    modules = [
        module
        for module in model.modules()
        if offload_cache(module) is not None and getattr(module, "quantization_scheme", None) is not None
    ]
    forwards = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = partial(_onloaded_forward, module, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, forwards, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _onloaded_forward(module: torch.nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with onloaded(module):
        return forward(*args, **kwargs)
