"""Statistics of A = |W| * ||X||_2 over a decoder block: the share of outliers, and the median.

Shape legend: O out_features, I in_features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.models.offload import onloaded
from msp_plugin.passes.observe import by_block, observe_inputs, units_of
from msp_plugin.sensitivity.base import Estimator, Progress, silent


@dataclass(frozen=True)
class Outliers(Estimator):
    """Share of a block's A = |W| * ||X||_2 beyond ``threshold`` times its mean (OWL, arXiv 2310.05175).

    That is the paper's layerwise outlier distribution D_l, with all prunable layers of a block in one
    set; each layer has its block's number. MRP reads 1 - D_l as the block's redundancy. A weight that was
    pruned counts as an A of zero. Deviations: none in the number; the authors give it in percent. They
    take all linears of a block, we those that targets and ignore leave. Memory: one layer's A.

    Args:
        threshold: M of the paper, which uses 5 and 7; the authors' code has 3 as default.
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
        found = {}
        for names in by_block(model, layers).values():
            parts = [(name, model.get_submodule(name).weight.numel()) for name in names]
            count = sum(size for _, size in parts)
            total = sum(float(saliences(model, name, norms[name]).sum(dtype=torch.float64)) for name in names)
            if not math.isfinite(total):
                raise NumericsError(
                    f"|W| * ||X|| is not finite in the block of {names[0]}",
                    hint="weights or activations overflow: repair the checkpoint, or try dtype float32",
                )
            bound = self.threshold * total / count
            beyond = sum(int((saliences(model, name, norms[name]) > bound).sum()) for name in names)
            found.update(dict.fromkeys(names, beyond / count))
        return found


@dataclass(frozen=True)
class Median(Estimator):
    """Median of a block's A = |W| * ||X||_2 (DLP, arXiv 2505.23807): how unimportant the block is.

    All prunable layers of a block are one set; each layer has its block's number. Of an even count the
    lower of the two middle values is taken, as torch.median does. Deviations: the authors take all linears
    of a block, we those that targets and ignore leave. Memory: the A of one block in float32.
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
        found = {}
        for names in by_block(model, layers).values():
            device = norms[names[0]].device
            block = torch.cat([saliences(model, n, norms[n]).flatten().to(device) for n in names])
            found.update(dict.fromkeys(names, float(block.median())))
        return found


def input_norms(
    model: torch.nn.Module, data: CalibrationSet, layers: Sequence[str], progress: Progress = silent
) -> dict[str, torch.Tensor]:
    """Return by layer ||X_j||_2, the norm of each input feature over all tokens, float32[I].

    Squares are summed in float32 within a batch and in float64 over the batches.

    Raises:
        NumericsError: see observe_inputs.
    """
    units = units_of(model, layers)
    sums: dict[str, torch.Tensor | float] = {unit.name: 0.0 for unit in units}

    def add(unit: str, x: torch.Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1])
        sums[unit] = sums[unit] + x.float().square().sum(dim=0, dtype=torch.float64)

    observe_inputs(model, data, units, add, progress=progress)
    return {layer.name: sums[unit.name].sqrt().float() for unit in units for layer in unit.layers}


def saliences(model: torch.nn.Module, name: str, norm: torch.Tensor) -> torch.Tensor:
    """Return A = |W| * ||X||_2 of a layer, float32[O, I] (Wanda, arXiv 2306.11695, eq. 1)."""
    with onloaded(model.get_submodule(name)) as module:
        return module.weight.detach().float().abs() * norm
