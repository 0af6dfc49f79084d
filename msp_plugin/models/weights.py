"""Read a model's weights by layer name."""

from __future__ import annotations

import torch

from msp_plugin.models.offload import (
    onloaded,
)


class Weights:
    """The weights [out, in] of a model by layer name, read when they are asked for: they may be offloaded."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def __getitem__(self, layer: str) -> torch.Tensor:
        with onloaded(self.model.get_submodule(layer)) as module:
            return module.weight.detach()
