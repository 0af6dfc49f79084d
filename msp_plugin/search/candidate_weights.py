"""Put the weights of a candidate from the level database into a model, and the model's own back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial

import torch

from msp_plugin.allocators.base import Choice
from msp_plugin.database.store import LevelDatabase
from msp_plugin.models.offload import input_device, linear, onloaded
from msp_plugin.models.weights import InMemory, Place, Weights, weight_place
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.levels import DENSE, Level
from msp_plugin.plan.units import UnitTable
from msp_plugin.runtime.memory import cache_bytes, free_cached

#: Bytes of pruned weights kept in memory, so that a level is not read from disk each time.
WEIGHT_BYTES = 4 * 1024**3
#: After unpacking this many bytes of weights, freed memory is returned to the system.
UNPACKED_BYTES = 256 * 1024**2


def with_dense_rows(pruned: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Return a pruned weight [O, I] with the dense rows in place of those that are zero."""
    return torch.where((pruned != 0).any(dim=1, keepdim=True), pruned, dense)


def weight_for_errors(
    model: torch.nn.Module, database: LevelDatabase, table: UnitTable
) -> Callable[[str, str], torch.Tensor]:
    """Return a function that returns a layer's weight [O, I] at a level, as errors of single layers are measured with it.

    What a level takes out of an attention or MLP is the error of its last layer: the others keep their dense rows.
    """
    inner = {layer.name for layer in table.layers if layer.inner}
    narrow = {level.name for level in database.menu if level.narrows}

    def weight(layer: str, level: str) -> torch.Tensor:
        pruned = database.weight(layer, level)
        if layer not in inner or level not in narrow:
            return pruned
        with onloaded(linear(model, layer)) as module:
            dense = module.weight.detach()
            return with_dense_rows(pruned.to(dense.device), dense)

    return weight


class CandidateWeights:
    """A context manager that puts the weights of a choice into a model, and the model's own back at its end.

    Weights are swapped, not copied: the parameters point at the level database's tensors. A layer that accelerate or
    compressed-tensors offloads gets the tensor when it loads its weight; between its passes at most ``held_bytes`` of
    pruned weights are in memory, and no dense ones.

    Args:
        held_bytes: memory for pruned weights kept for later candidates; None: WEIGHT_BYTES, less on a GPU (see
            cache_bytes).
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
        self._places: dict[str, Place] = {}
        self._now: list[str] = []

    def __enter__(self) -> CandidateWeights:
        self._places = {a.name: weight_place(linear(self.model, a.name)) for a in self.problem.table.layers}
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

    def set(self, choice: Choice | None, *, inner_dense: bool = False) -> None:
        """Give the model the weights of a choice, or its own for None.

        Args:
            inner_dense: of heads, channels and halves that are gone, only the last layers hold zeros, and the inner ones
                their dense rows. The loss is the same, but its gradient is not zero, as it would be with zeros in all.
        """
        menu = self.problem.menu
        levels = [DENSE] * len(self._now) if choice is None else [menu[k] for k in choice]
        for u, (unit, level) in enumerate(zip(self.problem.table, levels, strict=True)):
            inner = [inner_dense and level.narrows and layer.inner for layer in unit.layers]
            now = f"inner dense {level.name}" if any(inner) else level.name
            if self._now[u] != now:
                gives = [
                    self._giver(layer.name, level, dense_rows)
                    for layer, dense_rows in zip(unit.layers, inner, strict=True)
                ]
                self._now[u] = ""  # neither, until all layers of the unit are set
                for layer, give in zip(unit.layers, gives, strict=True):
                    self._places[layer.name].put(give)
                self._now[u] = now

    def _giver(self, layer: str, level: Level, dense_rows: bool) -> Callable[[], torch.Tensor] | None:
        """Return a function that returns a layer's weight at a level; None for the layer's own.

        The weight of a layer in memory is read at once, so that the function cannot fail.

        Args:
            dense_rows: give the dense rows in place of those that are zero.
        """
        if level.is_dense or (dense_rows and level.is_dropped):
            return None
        give = partial(self._with_dense_rows if dense_rows else self._stored, layer, level.name)
        if isinstance(self._places[layer], InMemory):
            weight = give()
            return lambda: weight
        return give

    def _with_dense_rows(self, layer: str, level: str) -> torch.Tensor:
        place = self._places[layer]
        return with_dense_rows(self._stored(layer, level), place.dense().to(place.at, place.dtype))

    @property
    def bytes_held(self) -> int:
        """Bytes of the pruned weights in memory."""
        return self._bytes

    def release(self) -> bool:
        """Drop all pruned weights kept for later, and keep none from now on.

        If there are none, changes nothing and returns False.
        """
        if not self._held:
            return False
        self._held.clear()
        self._bytes = self._limit = 0
        return True

    def put(self, weights: Mapping[str, torch.Tensor] | Weights) -> None:
        """Give the model other weights [out, in], by layer name, until the next ``set``.

        The weight of an offloaded layer is read whenever the layer runs, the others at once.
        """
        for u, unit in enumerate(self.problem.table):
            self._now[u] = ""
            for layer in unit.layers:
                self._places[layer.name].put(partial(self._given, weights, layer.name))

    def _given(self, weights: Mapping[str, torch.Tensor] | Weights, layer: str) -> torch.Tensor:
        return weights[layer].to(self._places[layer].at, self._places[layer].dtype)

    def weight(self, layer: str, level: str) -> torch.Tensor:
        """Return the weight [out, in] of a layer at a level, on the device on which the layer computes."""
        place = self._places[layer]
        weight = place.dense() if level == "dense" else self._stored(layer, level)
        return weight.to(place.device, place.dtype)

    def _stored(self, layer: str, level: str) -> torch.Tensor:
        """Return a layer's weight at a level that is not dense, from memory or else from the database."""
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
