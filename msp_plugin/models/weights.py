"""Read and swap the weights of layers, whether they are in memory or loaded by a hook or a cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from msp_plugin.models.offload import (
    is_offloaded,
    linear,
    offload_cache,
    offload_hook,
    onloaded,
    own_parameters,
    weight_device,
)

#: Called whenever a layer needs its weight; returns it, [out, in].
GiveWeight = Callable[[], torch.Tensor]


class Weights:
    """The weights [out, in] of a model by layer name; each is read when it is looked up, as it may be offloaded."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def __getitem__(self, layer: str) -> torch.Tensor:
        with onloaded(linear(self.model, layer)) as module:
            return module.weight.detach()


class Place(ABC):
    """The place of one layer's weight, where another weight can stand in for it.

    Attributes:
        device: the device on which the layer computes.
        at: the device on which other weights wait until the layer needs them.
        dtype: of the weight.
    """

    device: torch.device
    at: torch.device
    dtype: torch.dtype

    @abstractmethod
    def enter(self) -> None:
        """Prepare the layer for other weights."""

    @abstractmethod
    def leave(self) -> None:
        """Give the layer its own weight back, and undo ``enter``."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """Return the layer's own weight [out, in]."""

    @abstractmethod
    def put(self, give: GiveWeight | None) -> None:
        """Let the layer use the weight [out, in] that ``give`` returns; None stands for its own weight."""


def weight_place(module: torch.nn.Linear) -> Place:
    """Return the place of a module's weight."""
    if not is_offloaded(module):
        return InMemory(module)
    return Hooked(module) if offload_cache(module) is None else Cached(module)


class InMemory(Place):
    """A weight in memory: the parameter's data is swapped."""

    def __init__(self, module: torch.nn.Linear):
        self.module, self._own = module, module.weight.data
        self.at = self.device = self._own.device
        self.dtype = self._own.dtype

    def enter(self) -> None:
        pass

    def leave(self) -> None:
        self.module.weight.data = self._own

    def dense(self) -> torch.Tensor:
        return self._own

    def put(self, give: GiveWeight | None) -> None:
        self.module.weight.data = self._own if give is None else give()


class Hooked(Place, Mapping[str, torch.Tensor]):
    """A weight that accelerate's hook loads: this object replaces the hook's map of weights."""

    at = torch.device("cpu")

    def __init__(self, module: torch.nn.Linear):
        self.module, self.hook = module, offload_hook(module)
        self.device, self.dtype = weight_device(module), module.weight.dtype
        self._own: Mapping[str, torch.Tensor] = self.hook.weights_map
        self._tied = self.hook.tied_params_map
        self._give: GiveWeight | None = None

    def enter(self) -> None:
        self.hook.weights_map = self
        # Accelerate finds copies of tied weights by address, and another weight may get the address of a
        # freed one.
        self.hook.tied_params_map = {}

    def leave(self) -> None:
        if not self.module.weight.is_meta:  # a forward pass failed before the hook unloaded the weights
            self.hook.post_forward(self.module, None)
        self.hook.weights_map, self.hook.tied_params_map = self._own, self._tied

    def dense(self) -> torch.Tensor:
        return self._own["weight"]

    def put(self, give: GiveWeight | None) -> None:
        self._give = give

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._own[key] if key != "weight" or self._give is None else self._give()

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


class Cached(Place):
    """A weight that compressed-tensors' cache loads each time it is read."""

    at = torch.device("cpu")

    def __init__(self, module: torch.nn.Linear):
        self.cache = offload_cache(module)
        away = own_parameters(module)["weight"]
        assert away is not None, "a linear has a weight"
        self.away = away
        self.device, self.dtype = weight_device(module), away.dtype
        self._own: Callable[[Any], Any] = self.cache.onload
        self._before = vars(self.cache).copy()
        self._give: GiveWeight | None = None

    def enter(self) -> None:
        self.cache.onload = self._onload

    def leave(self) -> None:
        del self.cache.onload  # the class has one
        if "onload" in self._before:
            self.cache.onload = self._before["onload"]

    def dense(self) -> torch.Tensor:
        weight: torch.Tensor = self._own(self.away)
        return weight

    def put(self, give: GiveWeight | None) -> None:
        self._give = give

    def _onload(self, offloaded: torch.Tensor | None) -> Any:
        if offloaded is not self.away or self._give is None:
            return self._own(offloaded)
        weight = self._give().to(self.device, self.dtype)
        return torch.nn.Parameter(weight, requires_grad=self.away.requires_grad)
