"""Measurements of a model whose samples several ranks share out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import NumericsError
from msp_plugin.passes import losses
from msp_plugin.progress import Progress, silent
from msp_plugin.runtime.ranks import Ranks


def perplexity(
    model: torch.nn.Module, data: CalibrationSet, ranks: Ranks, *, progress: Progress = silent
) -> float:
    """Return losses.perplexity of all samples, on every rank.

    Raises:
        NumericsError: the loss is not a number.
    """
    if ranks.size == 1:
        return losses.perplexity(model, data, progress=progress)
    loss = _mean(
        data,
        ranks,
        lambda part: part.tokens - len(part),
        lambda part: math.log(losses.perplexity(model, part, progress=progress)),
    )
    return math.exp(loss) if loss < 700 else math.inf


def mean_kl(
    reference: torch.nn.Module,
    model: torch.nn.Module,
    data: CalibrationSet,
    ranks: Ranks,
    *,
    batch_tokens: int = 4096,
    progress: Progress = silent,
) -> float:
    """Return losses.mean_kl over all samples, on every rank.

    Raises:
        NumericsError: it is not a number.
    """

    def measure(part: CalibrationSet) -> float:
        return losses.mean_kl(reference, model, part, batch_tokens=batch_tokens, progress=progress)

    return measure(data) if ranks.size == 1 else _mean(data, ranks, lambda part: part.tokens, measure)


def _mean(
    data: CalibrationSet,
    ranks: Ranks,
    count: Callable[[CalibrationSet], int],
    measure: Callable[[CalibrationSet], float],
) -> float:
    """Return the mean of what is measured of each rank's samples, weighted by their counts."""

    def own() -> tuple[int, float]:
        part = data.of_rank(ranks)
        try:
            return (count(part), measure(part)) if part else (0, 0.0)
        except NumericsError:
            return count(part), math.nan

    parts = ranks.gather(own)
    value = sum(weight * part for weight, part in parts) / sum(weight for weight, _ in parts)
    if math.isnan(value):
        raise NumericsError("the model's loss is not a number", hint="try dtype float32")
    return value
