"""Weights that accelerate or compressed-tensors hold elsewhere: where they are, and how to read them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from msp_plugin.errors import ModelError

if TYPE_CHECKING:
    pass


def offload_hook(module: torch.nn.Module) -> Any:
    """Return accelerate's hook that loads a module's own weights for each forward pass, None if there is none."""
    hook = getattr(module, "_hf_hook", None)
    return hook if getattr(hook, "offload", False) else None


def offload_cache(module: torch.nn.Module) -> Any:
    """Return what compressed-tensors puts in the place of a module's parameters to load them, None if it does not."""
    return None if isinstance(module._parameters, dict) else module._parameters


def is_offloaded(module: torch.nn.Module) -> bool:
    """Return True if a module's own weights are loaded from elsewhere whenever it needs them."""
    return offload_hook(module) is not None or offload_cache(module) is not None


def own_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """Return a module's parameters as they stay there, by name; reading them loads nothing."""
    cache = offload_cache(module)
    return module._parameters if cache is None else cache.offloaded_values


def named_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Parameter]]:
    """Yield each parameter once, as it stays in its module, with its name and that module."""
    seen = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in own_parameters(module).items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield f"{prefix}.{leaf}" if prefix else leaf, module, parameter


def offloaded_module(model: torch.nn.Module) -> str | None:
    """Return the name of a module whose weights accelerate or a host holds elsewhere, None if there is none."""
    for name, module in model.named_modules():
        if is_offloaded(module) or _is_away(module):
            return name or "the model"
    return None


def _is_away(module: torch.nn.Module) -> bool:
    return any(p is not None and p.device.type == "meta" for p in own_parameters(module).values())


@contextmanager
def onloaded(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield a module whose own weights are in memory, read from where they are offloaded to if they are."""
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
    """Return the device on which a module works with its weight, wherever that is held meanwhile."""
    hook, cache = offload_hook(module), offload_cache(module)
    if cache is not None:
        return torch.device(cache.onload_device)
    return module.weight.device if hook is None else torch.device(hook.execution_device)


def input_device(model: torch.nn.Module) -> torch.device:
    """Return the device that token ids belong on; where weights are offloaded, the one that they run on."""
    embeddings = model.get_input_embeddings()
    return weight_device(embeddings) if is_offloaded(embeddings) else next(model.parameters()).device


def check_loadable(model: torch.nn.Module) -> None:
    """Raise unless all weights can be read and exchanged: in memory, or loaded by what is known here.

    Raises:
        ModelError: they cannot; the first such module is named.
    """
    for name, module in model.named_modules():
        if _is_away(module) and not is_offloaded(module):
            raise ModelError(
                f"the weights of {name} are offloaded, and no hook of accelerate on the module itself loads them",
                hint="load the model anew with transformers, with device_map or without",
            )
        if getattr(offload_cache(module), "offloading_disabled", False):
            raise ModelError(
                f"the weights of {name} stay loaded once they are read, so they cannot be exchanged",
                hint="call it outside of compressed-tensors' disable_offloading",
            )
