"""The share of outliers and the median of A = |W| * ||X||_2 over a decoder block.

Shape legend: O out_features, I in_features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.models.offload import linear, onloaded
from msp_plugin.passes.observe import by_block, observe_inputs, units_of
from msp_plugin.progress import Progress, silent
from msp_plugin.sensitivity.base import Estimator


@dataclass(frozen=True)
class Outliers(Estimator):
    """Share of a block's A = |W| * ||X||_2 beyond ``threshold`` times its mean (OWL, arXiv 2310.05175).

    It is the paper's layerwise outlier distribution D_l over all prunable layers of a block together; each
    layer gets the number of its block. MRP reads 1 - D_l as the block's redundancy. Pruned weights count with
    A = 0. Sums are float64. Memory: the A of one layer.

    Deviations: a share, where the authors give percent. The authors take all linears of a block, we take
    those that targets and ignore leave.

    Args:
        threshold: M of the paper, which uses 5 and 7; the default of the authors' code is 3.
    """

    name = "outliers"
    combine = "mean"
    threshold: float = 5.0

    def __post_init__(self) -> None:
        if not (self.threshold > 0 and math.isfinite(self.threshold)):
            raise RecipeError(f"outliers: threshold = {self.threshold} must be a positive number")

    def layer_sensitivities(
        self,
        model: torch.nn.Module,
        data: CalibrationSet,
        layers: tuple[str, ...],
        progress: Progress = silent,
    ) -> Mapping[str, float]:
        norms = input_norms(model, data, layers, progress)
        shares: dict[str, float] = {}
        for names in by_block(model, layers).values():
            count = sum(linear(model, name).weight.numel() for name in names)
            total = sum(float(saliences(model, name, norms[name]).sum(dtype=torch.float64)) for name in names)
            if not math.isfinite(total):
                raise NumericsError(
                    f"|W| * ||X|| is not finite in the block of {names[0]}",
                    hint="weights or activations overflow: repair the checkpoint, or try dtype float32",
                )
            bound = self.threshold * total / count
            outliers = sum(int((saliences(model, name, norms[name]) > bound).sum()) for name in names)
            shares.update(dict.fromkeys(names, outliers / count))
        return shares


@dataclass(frozen=True)
class Median(Estimator):
    """Median of a block's A = |W| * ||X||_2, which DLP (arXiv 2505.23807) reads as the block's unimportance.

    It is taken over all prunable layers of a block together; each layer gets the number of its block. Of an
    even count it is the lower of the two middle values, as in torch.median. Memory: the A of one block in
    float32.

    Deviation: the authors take all linears of a block, we take those that targets and ignore leave.
    """

    name = "median"
    combine = "mean"

    def layer_sensitivities(
        self,
        model: torch.nn.Module,
        data: CalibrationSet,
        layers: tuple[str, ...],
        progress: Progress = silent,
    ) -> Mapping[str, float]:
        norms = input_norms(model, data, layers, progress)
        medians: dict[str, float] = {}
        for names in by_block(model, layers).values():
            device = norms[names[0]].device
            block = torch.cat([saliences(model, n, norms[n]).flatten().to(device) for n in names])
            medians.update(dict.fromkeys(names, float(block.median())))
        return medians


def input_norms(
    model: torch.nn.Module, data: CalibrationSet, layers: Sequence[str], progress: Progress = silent
) -> dict[str, torch.Tensor]:
    """Return, by layer, the norm ||X_j||_2 of each input feature over all tokens, float32[I].

    Squares are float32 and summed in float64.

    Raises:
        NumericsError: see observe_inputs.
    """
    units = units_of(model, layers)
    sums: dict[str, torch.Tensor] = {}

    def add(unit: str, x: torch.Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1])
        squares = x.float().square().sum(dim=0, dtype=torch.float64)
        sums[unit] = sums[unit] + squares if unit in sums else squares

    observe_inputs(model, data, units, add, progress=progress)
    return {layer.name: sums[unit.name].sqrt().float() for unit in units for layer in unit.layers}


def saliences(model: torch.nn.Module, name: str, norm: torch.Tensor) -> torch.Tensor:
    """Return A = |W| * ||X||_2 of a layer, float32[O, I] (Wanda, arXiv 2306.11695, eq. 1)."""
    with onloaded(linear(model, name)) as module:
        return module.weight.detach().float().abs() * norm
