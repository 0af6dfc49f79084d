"""Find the layers that end an attention or an MLP."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from msp_plugin.models.offload import input_device
from msp_plugin.plan.units import UnitTable

#: By model and names of layers, what _last_layers has found: a run checks its model several times.
_KNOWN: WeakKeyDictionary[torch.nn.Module, dict[tuple[str, ...], dict[str, str]]] = WeakKeyDictionary()


def with_inner(model: torch.nn.Module, table: UnitTable) -> UnitTable:
    """Return the table with ``inner`` set for all layers but those that a forward pass calls last within their parent module.

    In an attention, an MLP or an expert the last one is the layer that projects back into the residual stream. No layer
    of an expert that the pass does not reach is inner.
    """
    names = tuple(layer.name for layer in table.layers)
    known = _KNOWN.setdefault(model, {})
    if names not in known:
        known[names] = _last_layers(model, names)
    last = known[names]
    return UnitTable(
        tuple(
            replace(
                unit,
                layers=tuple(
                    replace(layer, inner=last.get(_parent(layer.name), layer.name) != layer.name)
                    for layer in unit.layers
                ),
            )
            for unit in table
        )
    )


def _parent(layer: str) -> str:
    return layer.rpartition(".")[0]


@torch.no_grad()
def _last_layers(model: torch.nn.Module, names: tuple[str, ...]) -> dict[str, str]:
    """Return by parent module the layer of these that a forward pass calls last; only parents that it calls."""
    last: dict[str, str] = {}

    def note(name: str) -> Any:
        def hook(*_: object) -> None:
            last[_parent(name)] = name

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(note(name)).remove)
        model(torch.zeros(1, 2, dtype=torch.int64, device=input_device(model)), use_cache=False)
    return last
