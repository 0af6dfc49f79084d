"""Numbers that follow from records: means, deviations, rank correlations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np


def finite_values(values: Iterable[float | None]) -> list[float]:
    """Return the values that are neither None nor infinite nor NaN."""
    return [value for value in values if value is not None and math.isfinite(value)]


def finite_pairs(pairs: Iterable[tuple[float | None, float | None]]) -> list[tuple[float, float]]:
    """Return the pairs whose two values are neither None nor infinite nor NaN."""
    return [
        (x, y) for x, y in pairs if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)
    ]


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the finite values; None if there are none."""
    finite = finite_values(values)
    return sum(finite) / len(finite) if finite else None


def deviation(values: Iterable[float | None]) -> float | None:
    """Return the standard deviation (n - 1) of the finite values; None for fewer than two."""
    finite = finite_values(values)
    return float(np.std(finite, ddof=1)) if len(finite) > 1 else None


def within_noise(value: float, spread: float | None, best: float, best_spread: float | None) -> bool:
    """Return True if a mean is above the best one by at most twice the larger of their spreads over seeds."""
    return value <= best + 2 * max(spread or 0.0, best_spread or 0.0)


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's rho: Pearson's correlation of the ranks, ties sharing their mean rank.

    None for fewer than three pairs, or if either side is constant.
    """
    if len(pairs) < 3:
        return None
    first, second = (_ranks(np.array(side, dtype=np.float64)) for side in zip(*pairs, strict=True))
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value from 1, ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + 1 + ends) / 2)[inverse]


def taken_back(dense: float | None, uniform: float | None, mixed: float | None) -> float | None:
    """Return the share of uniform's added loss that mixed avoids: (log u - log m) / (log u - log d) of perplexities.

    None if a value is missing or not positive, or uniform is not above dense.
    """
    perplexities = finite_values((dense, uniform, mixed))
    if len(perplexities) < 3 or min(perplexities) <= 0:
        return None
    low, high, value = (math.log(perplexity) for perplexity in perplexities)
    return (high - value) / (high - low) if high > low else None
