"""Recount the zeros of a pruned model against its allocation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import torch

from msp_plugin.errors import VerificationError
from msp_plugin.plan.allocation import Allocation
from msp_plugin.pruning.masks import recount


@dataclass(frozen=True)
class PruneStats:
    """Zeros and weights of every layer, as found in the model."""

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


def recount_model(model: torch.nn.Module, allocation: Allocation, after: str = "pruning") -> PruneStats:
    """Return the recounted zeros of every layer of the allocation.

    A pruned layer must keep at most N of M in every group and exactly N in at least one; a weight
    that was zero before, or whose input feature is always zero, may add zeros to the plan's.

    Args:
        after: what ran last, for the error.

    Raises:
        VerificationError: a layer does not hold its level's pattern, or is not finite.
    """
    zeros, weights = {}, {}
    for name, level in allocation.by_layer.items():
        with _readable(model.get_submodule(name)) as weight:
            found = recount(weight, level)
            zeros[name], weights[name] = found.zeros, weight.numel()
        if not found.finite:
            raise VerificationError(f"after {after}, {name} holds weights that are not finite")
        if not level.is_dense and found.most_in_group != level.n:
            kept = weights[name] - found.zeros
            raise VerificationError(
                f"after {after}, {name} keeps {found.most_in_group} of {level.m} in some group and "
                f"{kept:,} of {weights[name]:,} weights; planned was {level.name}",
                hint="a method that updates pruned weights (GPTQ, AWQ, SmoothQuant) must come before, "
                "round-to-nearest quantization may come after"
                if after != "pruning"
                else "the layer saw no calibration text, or the host's pattern is another one",
            )
    return PruneStats(zeros, weights)


@contextmanager
def _readable(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield the weight of a module on any device, onloaded if a host has offloaded it."""
    try:
        from compressed_tensors.utils import align_module_device
    except ImportError:  # without a host nothing is offloaded in its way
        yield module.weight.detach()
    else:
        with align_module_device(module):
            yield module.weight.detach()
