"""Wanda: keep the weights with the largest product of magnitude and input norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from msp_plugin.plan.levels import Pattern
from msp_plugin.plan.units import Layer
from msp_plugin.pruning.base import Pruner
from msp_plugin.pruning.masks import lowest_by_topk, nm_masks


@dataclass
class InputSquares:
    """The squares of one input by feature: float32[I], the sum over all tokens divided by the samples."""

    mean: torch.Tensor
    samples: int = 0
    tokens: int = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs [B, T, I], as llm-compressor's ``accumulate_row_scalars`` does, bit for bit."""
        added = inputs.shape[0]
        self.mean *= self.samples / (self.samples + added)
        self.samples += added
        self.tokens += inputs[..., 0].numel()
        columns = inputs.reshape(-1, inputs.shape[-1]).t().float()
        self.mean += torch.norm(columns, p=2, dim=1) ** 2 / self.samples


@dataclass(frozen=True)
class Wanda(Pruner):
    """Wanda (arXiv 2306.11695): score |weight| times the norm of its input; kept weights do not change."""

    name = "wanda"

    def statistic_bytes(self, layer: Layer) -> int:
        return 4 * layer.in_features

    def new_statistic(self, module: torch.nn.Linear) -> InputSquares:
        return InputSquares(torch.zeros(module.in_features, device=module.weight.device))

    def observe(self, module: torch.nn.Linear, inputs: torch.Tensor, statistic: InputSquares) -> InputSquares:
        statistic.add(inputs.to(statistic.mean.device))
        return statistic

    def prune_levels(
        self, module: torch.nn.Linear, statistic: InputSquares, levels: Sequence[Pattern], layer: str
    ) -> Iterator[torch.Tensor]:
        weight = module.weight.detach()
        score = weight.float().abs() * statistic.mean.sqrt()
        for mask in nm_masks(score, levels, tie_breaker=lowest_by_topk):  # among equals as llm-compressor
            yield weight.masked_fill(~mask, 0)

    def output_error(self, delta: torch.Tensor, statistic: InputSquares) -> float:
        """Return the mean squared change of the output per token; features are taken as uncorrelated."""
        return float(self.row_errors(delta, statistic).sum())

    def row_errors(self, delta: torch.Tensor, statistic: InputSquares) -> torch.Tensor:
        return delta.double().square() @ statistic.mean.double() * (statistic.samples / statistic.tokens)
