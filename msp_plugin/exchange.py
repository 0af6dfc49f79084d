"""The weights of a candidate in a model: exchanged for those of the level database, and put back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch

from msp_plugin.allocators.base import Choice
from msp_plugin.database.store import LevelDatabase
from msp_plugin.plan.budget import AllocationProblem

#: Pruned weights held in memory, so that a level that comes back is not read from disk again.
WEIGHT_BYTES = 4 * 1024**3


class CandidateWeights:
    """Puts the weights of a choice into a model, and the model's own back when the block ends.

    Weights are exchanged, not copied: the parameters point at the level database's tensors meanwhile.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        database: LevelDatabase,
        problem: AllocationProblem,
        held_bytes: int = WEIGHT_BYTES,
    ):
        self.model, self.database, self.problem = model, database, problem
        self._limit = held_bytes
        self._held: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._dense: dict[str, torch.Tensor] = {}
        self._now: list[str] = []

    def __enter__(self) -> CandidateWeights:
        layers = [layer.name for layer in self.problem.table.layers]
        self._dense = {name: self.model.get_submodule(name).weight.data for name in layers}
        self._now = ["dense"] * len(self.problem.table)
        return self

    def __exit__(self, *error: object) -> None:
        for name, weight in self._dense.items():
            self.model.get_submodule(name).weight.data = weight
        self._dense.clear()
        self._held.clear()
        self._bytes = 0

    def set(self, choice: Choice | None) -> None:
        """Let the model hold the weights of a choice; None: its own."""
        menu = self.problem.menu
        names = ["dense"] * len(self._now) if choice is None else [menu[k].name for k in choice]
        for u, (unit, name) in enumerate(zip(self.problem.table, names, strict=True)):
            if self._now[u] != name:
                weights = [self.weight(layer.name, name) for layer in unit.layers]
                self._now[u] = ""  # neither, until all layers of the unit are set
                for layer, weight in zip(unit.layers, weights, strict=True):
                    self.model.get_submodule(layer.name).weight.data = weight
                self._now[u] = name

    def put(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Let the model hold weights [out, in] from elsewhere, by layer name, until the next ``set``."""
        for u, unit in enumerate(self.problem.table):
            self._now[u] = ""
            for layer in unit.layers:
                own = self._dense[layer.name]
                self.model.get_submodule(layer.name).weight.data = weights[layer.name].to(
                    own.device, own.dtype
                )

    def weight(self, layer: str, level: str) -> torch.Tensor:
        """Return the weight [out, in] of a layer at a level, on the model's device."""
        own = self._dense[layer]
        if level == "dense":
            return own
        key = (layer, level)
        if key not in self._held:
            weight = self.database.weight(layer, level).to(own.device, own.dtype)
            self._held[key] = weight
            self._bytes += weight.nbytes
            while self._bytes > self._limit and len(self._held) > 1:
                self._bytes -= self._held.popitem(last=False)[1].nbytes
        self._held.move_to_end(key)
        return self._held[key]
