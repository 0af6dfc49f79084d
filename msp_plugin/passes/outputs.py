"""Find the layers that end an attention or an MLP."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch

from msp_plugin.models.offload import input_device


@torch.no_grad()
def output_layers(model: torch.nn.Module, layers: Iterable[str]) -> frozenset[str]:
    """Return the names of the layers that a forward pass calls last within their parent module.

    In an attention, an MLP or an expert that is the layer that projects back into the residual stream.
    """
    last: dict[str, str] = {}

    def note(name: str) -> Any:
        def hook(*_: object) -> None:
            last[name.rpartition(".")[0]] = name

        return hook

    with ExitStack() as stack:
        for name in layers:
            stack.callback(model.get_submodule(name).register_forward_hook(note(name)).remove)
        model(torch.zeros(1, 2, dtype=torch.int64, device=input_device(model)), use_cache=False)
    return frozenset(last.values())
