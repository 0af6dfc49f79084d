"""The error of a greedy removal of weights that is computed without changing the model, per block.

Shape legend: T tokens, O out_features, I in_features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import RecipeError
from msp_plugin.models.offload import linear, onloaded
from msp_plugin.passes.observe import by_block, in_groups, observe_inputs, units_of
from msp_plugin.plan.units import Unit
from msp_plugin.progress import Progress, silent
from msp_plugin.sensitivity.base import Estimator

#: Bytes of the Hessians of one pass over the samples; if there are more, further passes are made.
HESSIAN_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class VirtualRemoval(Estimator):
    """Mean over a block's layers of the error of a virtual greedy removal (LSA, ICLR 2026, BeiYazi0/LSA).

    In each row and group of neighbouring weights, the weight whose removal adds least to the row's squared
    output error is removed first, until ``share`` of the group is gone. Each removal i changes the cost of
    every other weight j by 2 w_j w_i H_ij. The sum of the costs is the error of the layer, here per token. H
    accumulates in float32, the error in float64. Memory: Hessians of HESSIAN_BYTES, or of one layer, and
    three times one layer's weight in float32.

    Deviations: a narrower last group loses ``share`` of its own width, not of a full group. The authors' code
    passes the samples block by block from dense inputs, which gives the same as our single pass. The authors
    take all linears of a block, we take those that targets and ignore leave.

    Args:
        share: share of the weights that are removed; .5 is the authors' default.
        group: columns of a group.
    """

    name = "virtual_removal"
    combine = "mean"
    share: float = 0.5
    group: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise RecipeError(f"virtual_removal: share = {self.share} is outside (0, 1]")
        if self.group < 1:
            raise RecipeError(f"virtual_removal: group = {self.group} must be at least 1")

    def passes(self, model: torch.nn.Module, layers: Sequence[str]) -> int:
        return len(_groups(model, layers))

    @torch.no_grad()
    def layer_sensitivities(
        self,
        model: torch.nn.Module,
        data: CalibrationSet,
        layers: tuple[str, ...],
        progress: Progress = silent,
    ) -> Mapping[str, float]:
        errors: dict[str, float] = {}
        for units in _groups(model, layers):
            hessians = input_hessians(model, data, units)
            for unit in units:
                hessian = hessians.pop(unit.name)
                for layer in unit.layers:
                    with onloaded(linear(model, layer.name)) as module:
                        weight = module.weight.detach().float()
                        errors[layer.name] = removal_error(weight, hessian, self.share, self.group)
                    progress(len(errors), len(layers))
        means: dict[str, float] = {}
        for names in by_block(model, layers).values():
            means.update(dict.fromkeys(names, sum(errors[name] for name in names) / len(names)))
        return means


def input_hessians(
    model: torch.nn.Module, data: CalibrationSet, units: Sequence[Unit]
) -> dict[str, torch.Tensor]:
    """Return H = X^T X / T, float32[I, I], by unit name.

    Raises:
        NumericsError: see observe_inputs.
    """
    sums: dict[str, torch.Tensor] = {}
    tokens = dict.fromkeys((unit.name for unit in units), 0)

    def add(unit: str, x: torch.Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if unit not in sums:
            sums[unit] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        sums[unit].addmm_(x.T, x)
        tokens[unit] += len(x)

    observe_inputs(model, data, units, add)
    return {name: total.div_(tokens[name]) for name, total in sums.items()}


def removal_error(weight: torch.Tensor, hessian: torch.Tensor, share: float, group: int) -> float:
    """Return the squared output error per token of a greedy removal, summed over the rows in float64.

    Args:
        weight: float32[O, I].
        hessian: float32[I, I].
        share, group: see VirtualRemoval.
    """
    width = weight.shape[1]
    cost = weight.square() * hessian.diagonal()  # of removing each weight next
    error = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start in range(0, width, group):
        stop = min(start + group, width)
        inside, cost_inside = weight[:, start:stop], cost[:, start:stop]
        among = hessian[start:stop, start:stop]
        gone = torch.zeros_like(inside)
        for _ in range(math.floor(share * (stop - start) + 1e-9)):
            at = cost_inside.argmin(dim=1, keepdim=True)
            error += cost_inside.gather(1, at).sum(dtype=torch.float64)
            removed = inside.gather(1, at)
            cost_inside += 2 * inside * removed * among[at.squeeze(1)]
            cost_inside.scatter_(1, at, torch.inf)
            gone.scatter_(1, at, removed)
        cost[:, stop:] += 2 * weight[:, stop:] * (gone @ hessian[start:stop, stop:])
    return float(error)


def _groups(model: torch.nn.Module, layers: Sequence[str]) -> list[list[Unit]]:
    """Return the units whose Hessians are in memory together, group by group."""
    return list(in_groups(units_of(model, layers), _hessian_bytes, HESSIAN_BYTES))


def _hessian_bytes(unit: Unit) -> int:
    """Return the bytes of the Hessian of a unit's input in float32."""
    return 4 * unit.layers[0].in_features ** 2
