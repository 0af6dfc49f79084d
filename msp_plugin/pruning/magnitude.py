"""Magnitude pruning: keep the weights that are largest in absolute value."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from msp_plugin.pruning.base import LayerwisePruner


@dataclass(frozen=True)
class Magnitude(LayerwisePruner):
    """Keep the largest |w| of every group (Han et al., arXiv 1506.02626). Needs no data."""

    name = "magnitude"
    needs_statistics = False

    def score(self, weight: torch.Tensor, input_norm: torch.Tensor) -> torch.Tensor:
        return weight.abs()
