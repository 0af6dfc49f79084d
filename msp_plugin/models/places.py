"""Exchange the weight of a layer, wherever it is held: in memory, or loaded by a hook or a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from msp_plugin.models.offload import is_offloaded, offload_cache, offload_hook, weight_device


def weight_place(module: torch.nn.Module) -> Place:
    """Return the place that holds the weight of a module."""
    if not is_offloaded(module):
        return InMemory(module)
    return Hooked(module) if offload_cache(module) is None else Cached(module)


class InMemory:
    """A layer whose weight is on its device: the parameter's data is exchanged.

    Attributes:
        device: where the layer works; at: where candidates' weights are held for it.
    """

    def __init__(self, module: torch.nn.Module):
        self.module, self._own = module, module.weight.data
        self.at = self.device = self._own.device
        self.dtype = self._own.dtype

    def enter(self) -> None:
        pass

    def leave(self) -> None:
        self.module.weight.data = self._own

    def dense(self) -> torch.Tensor:
        return self._own

    def put(self, give: Callable[[], torch.Tensor] | None) -> None:
        """Let the layer have the weight [out, in] that ``give`` returns; None: its own."""
        self.module.weight.data = self._own if give is None else give()


class Hooked(Mapping[str, torch.Tensor]):
    """A layer whose weights a hook of accelerate loads: stands in the place of the hook's map of weights.

    Attributes: see InMemory.
    """

    at = torch.device("cpu")

    def __init__(self, module: torch.nn.Module):
        self.module, self.hook = module, offload_hook(module)
        self.device, self.dtype = weight_device(module), module.weight.dtype
        self._own, self._tied = self.hook.weights_map, self.hook.tied_params_map
        self._give: Callable[[], torch.Tensor] | None = None

    def enter(self) -> None:
        self.hook.weights_map = self
        # Accelerate finds copies of tied weights by address. A candidate's may lie where a tied one lay before.
        self.hook.tied_params_map = {}

    def leave(self) -> None:
        if not self.module.weight.is_meta:  # a forward pass failed before the weights went away again
            self.hook.post_forward(self.module, None)
        self.hook.weights_map, self.hook.tied_params_map = self._own, self._tied

    def dense(self) -> torch.Tensor:
        return self._own["weight"]

    def put(self, give: Callable[[], torch.Tensor] | None) -> None:
        """Let the layer load the weight [out, in] that ``give`` returns; None: its own."""
        self._give = give

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._own[key] if key != "weight" or self._give is None else self._give()

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


class Cached:
    """A layer whose weights a cache of compressed-tensors loads, each time that they are read.

    Attributes: see InMemory.
    """

    at = torch.device("cpu")

    def __init__(self, module: torch.nn.Module):
        self.cache = offload_cache(module)
        self.away = self.cache.offloaded_values["weight"]
        self.device, self.dtype = weight_device(module), self.away.dtype
        self._own, self._before = self.cache.onload, vars(self.cache).copy()
        self._give: Callable[[], torch.Tensor] | None = None

    def enter(self) -> None:
        self.cache.onload = self._onload

    def leave(self) -> None:
        del self.cache.onload  # its class has one
        if "onload" in self._before:
            self.cache.onload = self._before["onload"]

    def dense(self) -> torch.Tensor:
        return self._own(self.away)

    def put(self, give: Callable[[], torch.Tensor] | None) -> None:
        """Let the layer load the weight [out, in] that ``give`` returns; None: its own."""
        self._give = give

    def _onload(self, offloaded: torch.Tensor | None) -> torch.Tensor | None:
        if offloaded is not self.away or self._give is None:
            return self._own(offloaded)
        weight = self._give().to(self.device, self.dtype)
        return torch.nn.Parameter(weight, requires_grad=self.away.requires_grad)


Place = InMemory | Hooked | Cached
