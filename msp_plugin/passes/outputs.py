"""Find the layers that end an attention or an MLP."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from msp_plugin.models.offload import input_device
from msp_plugin.plan.units import UnitTable


@torch.no_grad()
def with_inner(model: torch.nn.Module, table: UnitTable) -> UnitTable:
    """Return the table with ``inner`` set for all layers but those that a forward pass calls last within their parent module.

    In an attention, an MLP or an expert the last one is the layer that projects back into the residual stream.
    """
    last: dict[str, str] = {}

    def note(name: str) -> Any:
        def hook(*_: object) -> None:
            last[name.rpartition(".")[0]] = name

        return hook

    with ExitStack() as stack:
        for layer in table.layers:
            stack.callback(model.get_submodule(layer.name).register_forward_hook(note(layer.name)).remove)
        model(torch.zeros(1, 2, dtype=torch.int64, device=input_device(model)), use_cache=False)
    ends = set(last.values())
    return UnitTable(
        tuple(
            replace(unit, layers=tuple(replace(layer, inner=layer.name not in ends) for layer in unit.layers))
            for unit in table
        )
    )
