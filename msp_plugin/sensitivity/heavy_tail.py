"""The heavy tails of the spectra of a block's weights: the Hill estimate of their power law."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.models.offload import linear, onloaded
from msp_plugin.passes.observe import by_block
from msp_plugin.progress import Progress, silent
from msp_plugin.sensitivity.base import Estimator

#: Bins of the histogram of log10 eigenvalues whose fullest one is the peak (the authors' default).
BINS = 100


@dataclass(frozen=True)
class HeavyTail(Estimator):
    """Mean over a block's layers of the power-law exponent of the spectrum of W^T W (arXiv 2410.10912).

    AlphaPruning's PL_Alpha_Hill: a small exponent means a heavy tail, which is typical of well-trained
    layers. It needs no text. Eigenvalues are squared singular values in float32; the fit is in float64.

    Deviations: eigenvalues of zero, which have no logarithm, are left out (the authors keep them, and get
    NaN). If no tail can be fitted it is an error (the authors take 0). The authors take all linears of a
    block, we take those that targets and ignore leave.

    Args:
        xmin: the smallest eigenvalue of the tail. ``peak``, the authors' default, takes the one near the peak
            of the spectrum whose fit has the least Kolmogorov-Smirnov distance; ``mid`` takes the median.
    """

    name = "heavy_tail"
    combine = "mean"
    needs_data = False
    xmin: str = "peak"

    def __post_init__(self) -> None:
        if self.xmin not in ("peak", "mid"):
            raise RecipeError(f"heavy_tail: xmin {self.xmin!r} is unknown", hint="use peak or mid")

    @torch.no_grad()
    def layer_sensitivities(
        self,
        model: torch.nn.Module,
        data: CalibrationSet | None,
        layers: tuple[str, ...],
        progress: Progress = silent,
    ) -> Mapping[str, float]:
        sensitivities: dict[str, float] = {}
        for names in by_block(model, layers).values():
            exponents = [self._exponent(model, name) for name in names]
            sensitivities.update(dict.fromkeys(names, sum(exponents) / len(exponents)))
            progress(len(sensitivities), len(layers))
        return sensitivities

    def _exponent(self, model: torch.nn.Module, name: str) -> float:
        """Return the exponent of one layer.

        Raises:
            NumericsError: no power law can be fitted.
        """
        with onloaded(linear(model, name)) as module:
            values = torch.linalg.svdvals(module.weight.detach().float())
        exponent = power_law_exponent(values.double().square().cpu().numpy(), self.xmin)
        if exponent is None:
            raise NumericsError(
                f"no power law fits the {len(values)} eigenvalues of {name}",
                hint="add the layer to ignore, or use another allocator",
            )
        return exponent


def power_law_exponent(eigenvalues: np.ndarray, xmin: str) -> float | None:
    """Return 1 + n / sum_i ln(lambda_i / lambda_min) over the tail's n eigenvalues; None without a tail.

    Args:
        eigenvalues: float64, in any order.
        xmin: ``peak`` or ``mid`` (see HeavyTail).
    """
    tail = np.sort(eigenvalues[eigenvalues > 0])
    if len(tail) < 2:
        return None
    # The authors' code compares an eigenvalue with the *logarithm* of the lower bound, which is therefore
    # seldom reached. We do the same, because the published numbers come from that code.
    starts = [len(tail) // 2]
    if xmin == "peak":
        counts, edges = np.histogram(np.log10(tail), bins=BINS)
        peak = 10 ** edges[int(counts.argmax())]
        near = (tail[:-1] >= np.log10(0.95 * peak)) & (tail[:-1] <= 1.5 * peak)
        starts = list(np.flatnonzero(near))
    fits = [fit for fit in (_hill(tail[start:]) for start in starts) if fit is not None]
    return min(fits)[1] if fits else None


def _hill(tail: np.ndarray) -> tuple[float, float] | None:
    """Return (Kolmogorov-Smirnov distance, exponent) of ascending eigenvalues; None if all are equal."""
    ratio = tail / tail[0]
    total = float(np.log(ratio).sum())
    if total == 0:
        return None
    exponent = 1 + len(tail) / total
    expected = 1 - ratio ** (1 - exponent)
    return float(np.abs(expected - np.arange(len(tail)) / len(tail)).max()), exponent
