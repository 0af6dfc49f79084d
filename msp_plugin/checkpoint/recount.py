"""Count the zeros of a pruned model, and compare them with its allocation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from msp_plugin.errors import VerificationError
from msp_plugin.models.offload import onloaded
from msp_plugin.plan.allocation import Allocation
from msp_plugin.pruning.masks import recount


@dataclass(frozen=True)
class PruneStats:
    """The zeros and weights of every layer, as counted in the model."""

    zeros: Mapping[str, int]
    weights: Mapping[str, int]

    @property
    def total_zeros(self) -> int:
        """Zeros over all prunable layers."""
        return sum(self.zeros.values())

    @property
    def total_weights(self) -> int:
        """Weights over all prunable layers."""
        return sum(self.weights.values())

    @property
    def sparsity(self) -> float:
        """The achieved share of zeros."""
        return float(Fraction(self.total_zeros, self.total_weights))


#: Share of a layer's kept weights that may round to zero. In float16 a compensated weight below 6e-8 does: about one
#: in a million of a normal distribution with deviation 0.02.
ROUNDED = 1e-4


def count_zeros(model: torch.nn.Module, allocation: Allocation) -> dict[str, int]:
    """Return the current number of zeros of each layer of the allocation."""
    zeros = {}
    for name in allocation.by_layer:
        with _readable(model.get_submodule(name)) as weight:
            zeros[name] = int((weight == 0).sum())
    return zeros


def recount_model(
    model: torch.nn.Module,
    allocation: Allocation,
    *,
    before: Mapping[str, int] | None = None,
    exact: bool = True,
    after: str = "pruning",
) -> PruneStats:
    """Return the zeros of every layer of the allocation, counted in the model.

    No group may keep more weights than its level allows. With ``exact``, zeros beyond the plan must be explained: by
    zeros before pruning, by columns that are zero throughout (dead input features), or by rounding.

    Args:
        before: zeros of each layer before pruning.
        exact: refuse unexplained zeros beyond the plan.
        after: the step that ran last, for the error.

    Raises:
        VerificationError: a layer differs from the plan, or is not finite.
    """
    zeros, weights = {}, {}
    levels = allocation.by_layer
    for layer in allocation.table.layers:
        name, level = layer.name, levels[layer.name]
        with _readable(model.get_submodule(name)) as weight:
            here = replace(layer, out_features=weight.shape[0], in_features=weight.shape[1])
            counted = recount(weight, level, here)
            zeros[name], weights[name] = counted.zeros, weight.numel()
            kept = level.kept(here)
        if not counted.finite:
            raise VerificationError(f"after {after}, {name} holds weights that are not finite")
        plan = f"planned was {level.name} with {weights[name] - kept:,} zeros of {weights[name]:,}"
        if counted.broken:
            raise VerificationError(
                f"after {after}, {name} {counted.broken} and has {counted.zeros:,} zeros; {plan}",
                hint="a method that updates pruned weights (GPTQ, AWQ, SmoothQuant) must come before, "
                "round-to-nearest quantization may come after"
                if after != "pruning"
                else "the layer saw no calibration text, or the host prunes to another pattern",
            )
        explained = (before or {}).get(name, 0) + counted.from_dead_inputs + math.ceil(ROUNDED * kept)
        if exact and counted.zeros - (weights[name] - kept) > explained:
            raise VerificationError(
                f"after {after}, {name} has {counted.zeros:,} zeros; {plan}",
                hint="the method prunes more than it was asked to",
            )
    return PruneStats(zeros, weights)


@contextmanager
def _readable(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield the weight of a module on any device, read if it is offloaded."""
    with onloaded(module):
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        yield weight.detach()
