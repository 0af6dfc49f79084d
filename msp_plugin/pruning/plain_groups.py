"""Baselines for structured methods: the largest heads and channels, and random ones."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from msp_plugin.pruning import masks, structured
from msp_plugin.pruning.structured import HalfInputs, StructuredPruner


@dataclass(frozen=True)
class L2(StructuredPruner):
    """Keep the heads and channels with the largest sum of squared weights, over all layers of the half."""

    name = "l2"
    arithmetic = (masks, structured)

    def group_scores(self, half: HalfInputs) -> torch.Tensor:
        return torch.stack(
            [part.by_group(part.weight.double().square()).sum(dim=(1, 2)) for part in half.layers]
        ).sum(dim=0)


@dataclass(frozen=True)
class RandomGroups(StructuredPruner):
    """Keep random heads and channels, the same ones at every width that keeps them.

    Args:
        seed: other seeds keep others.
    """

    name = "random"
    arithmetic = (masks, structured)

    seed: int = 0

    def group_scores(self, half: HalfInputs) -> torch.Tensor:
        seed = zlib.crc32(f"{self.seed} {half.name}".encode())
        return torch.rand(half.groups, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
            half.output.weight.device
        )
