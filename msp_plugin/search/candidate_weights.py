"""The weights of a candidate in a model: exchanged for those of the level database, and put back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from msp_plugin.allocators.base import Choice
from msp_plugin.database.store import LevelDatabase
from msp_plugin.models.offload import (
    input_device,
    is_offloaded,
    offload_cache,
    offload_hook,
    weight_device,
)
from msp_plugin.models.weights import Weights
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.runtime.memory import cache_bytes, free_cached

#: Pruned weights held in memory, so that a level that comes back is not read from disk again.
WEIGHT_BYTES = 4 * 1024**3
#: Pruned weights that are unpacked before what that has freed goes back to the system.
UNPACKED_BYTES = 256 * 1024**2


class CandidateWeights:
    """Puts the weights of a choice into a model, and the model's own back when the block ends.

    Weights are exchanged, not copied: the parameters point at the level database's tensors meanwhile. A layer
    that accelerate or compressed-tensors offloads gets the tensor when it loads its weight; between its passes no
    more than ``held_bytes`` of pruned weights are in memory, and nothing of the dense ones.

    Args:
        held_bytes: of pruned weights that are kept for the next candidates, beside those of the present one that have
            made way; None: WEIGHT_BYTES, or what memory.cache_bytes gives.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        database: LevelDatabase,
        problem: AllocationProblem,
        held_bytes: int | None = None,
    ):
        self.model, self.database, self.problem = model, database, problem
        self._limit = cache_bytes(input_device(model), WEIGHT_BYTES) if held_bytes is None else held_bytes
        self._held: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()
        self._bytes = self._unpacked = 0
        self._places: dict[str, _InMemory | _Hooked | _Cached] = {}
        self._now: list[str] = []

    def __enter__(self) -> CandidateWeights:
        self._places = {a.name: _place(self.model.get_submodule(a.name)) for a in self.problem.table.layers}
        for place in self._places.values():
            place.enter()
        self._now = ["dense"] * len(self.problem.table)
        return self

    def __exit__(self, *error: object) -> None:
        for place in self._places.values():
            place.leave()
        self._places.clear()
        self._held.clear()
        self._bytes = 0

    def set(self, choice: Choice | None) -> None:
        """Let the model hold the weights of a choice; None: its own."""
        menu = self.problem.menu
        names = ["dense"] * len(self._now) if choice is None else [menu[k].name for k in choice]
        for u, (unit, name) in enumerate(zip(self.problem.table, names, strict=True)):
            if self._now[u] != name:
                gives = [self._giver(layer.name, name) for layer in unit.layers]
                self._now[u] = ""  # neither, until all layers of the unit are set
                for layer, give in zip(unit.layers, gives, strict=True):
                    self._places[layer.name].put(give)
                self._now[u] = name

    def _giver(self, layer: str, level: str) -> Callable[[], torch.Tensor] | None:
        """Return what gives a layer's weight at a level; in memory it is read at once, so that it cannot fail."""
        if level == "dense":
            return None
        give = partial(self._stored, layer, level)
        if isinstance(self._places[layer], _InMemory):
            weight = give()
            return lambda: weight
        return give

    def hold_nothing(self) -> bool:
        """Hold no pruned weights for later from now on; return False, and change nothing, if none are held."""
        if not self._held:
            return False
        self._held.clear()
        self._bytes = self._limit = 0
        return True

    def put(self, weights: Mapping[str, torch.Tensor] | Weights) -> None:
        """Let the model hold weights [out, in] from elsewhere, by layer name, until the next ``set``.

        An offloaded layer asks for its weight whenever it runs, the others at once.
        """
        for u, unit in enumerate(self.problem.table):
            self._now[u] = ""
            for layer in unit.layers:
                self._places[layer.name].put(partial(self._given, weights, layer.name))

    def _given(self, weights: Mapping[str, torch.Tensor] | Weights, layer: str) -> torch.Tensor:
        return weights[layer].to(self._places[layer].at, self._places[layer].dtype)

    def weight(self, layer: str, level: str) -> torch.Tensor:
        """Return the weight [out, in] of a layer at a level, on the device that the layer works on."""
        place = self._places[layer]
        found = place.dense() if level == "dense" else self._stored(layer, level)
        return found.to(place.device, place.dtype)

    def _stored(self, layer: str, level: str) -> torch.Tensor:
        """Return a layer's weight at a level that is not dense, where candidates' weights are held."""
        key = (layer, level)
        if key not in self._held:
            place = self._places[layer]
            weight = self.database.weight(layer, level).to(place.at, place.dtype)
            self._held[key] = weight
            self._bytes += weight.nbytes
            self._unpacked += weight.nbytes
            if self._unpacked > UNPACKED_BYTES:
                free_cached()
                self._unpacked = 0
            while self._bytes > self._limit and (len(self._held) > 1 or not self._limit):
                self._bytes -= self._held.popitem(last=False)[1].nbytes
            return weight
        self._held.move_to_end(key)
        return self._held[key]


def _place(module: torch.nn.Module) -> _InMemory | _Hooked | _Cached:
    if not is_offloaded(module):
        return _InMemory(module)
    return _Hooked(module) if offload_cache(module) is None else _Cached(module)


class _InMemory:
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


class _Hooked(Mapping[str, torch.Tensor]):
    """A layer whose weights a hook of accelerate loads: stands in the place of the hook's map of weights.

    Attributes: see _InMemory.
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


class _Cached:
    """A layer whose weights a cache of compressed-tensors loads, each time that they are read.

    Attributes: see _InMemory.
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
