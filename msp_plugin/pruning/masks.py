"""Masks from scores, and the recount of what a weight holds.

Shape legend: O out_features, I in_features, G groups of M along in_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from msp_plugin.errors import NumericsError
from msp_plugin.plan.levels import Kind, Level


def nm_mask(score: torch.Tensor, level: Level) -> torch.Tensor:
    """Return bool[O, I], True where a weight is kept: the N best of every M along in_features.

    Exactly N are kept in every group; among equal scores the one further left is kept. ``N:M in 2:4``
    takes the two best of every four, and the N best of M among those. A share of zeros takes the best of
    each row.

    Args:
        score: float[O, I]; higher is more worth keeping.

    Raises:
        NumericsError: a score is not finite.
    """
    n, m = level.group(score.shape[1])
    if not torch.isfinite(score).all():
        raise NumericsError(f"{int((~torch.isfinite(score)).sum())} scores are not finite")
    if level.kind is Kind.NM_IN_24:
        score = score.masked_fill(~_best(score, 2, 4), -torch.inf)
    return _best(score, n, m)


def _best(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    groups = score.reshape(score.shape[0], -1, m)
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
    return mask.reshape(score.shape)


@dataclass(frozen=True)
class Recount:
    """What a pruned weight holds.

    Args:
        zeros: count of zeros.
        most_in_group: the most nonzeros found in one group of M; for a share of zeros, in one row.
        from_dead_inputs: zeros that columns which are zero throughout force beyond the pattern's own: a group
            with j such columns cannot keep more than M - j weights.
        finite: True if no weight is infinite or not a number.
        broken: how the weight breaks the level's pattern, None if it holds everywhere.
    """

    zeros: int
    most_in_group: int
    from_dead_inputs: int
    finite: bool
    broken: str | None = None


def recount(weight: torch.Tensor, level: Level) -> Recount:
    """Return the counts of an [O, I] weight under the groups of ``level``."""
    n, m = level.group(weight.shape[1])
    nonzero = weight != 0
    alive = nonzero.any(dim=0)
    most, broken = _most(nonzero, m), None
    if most > n:
        broken = f"keeps {most} of {m} in some {'row' if level.kind is Kind.SHARE else 'group'}"
    if level.kind is Kind.NM_IN_24:
        alive = alive.reshape(-1, 4).sum(dim=-1).clamp(max=2).repeat_interleave(4) / 4
        four = _most(nonzero, 4)
        if four > 2 and broken is None:
            broken = f"keeps {four} of 4 in some aligned four"
    capacity = alive.float().reshape(-1, m).sum(dim=-1).round().long()
    return Recount(
        zeros=weight.numel() - int(nonzero.sum()),
        most_in_group=most,
        from_dead_inputs=weight.shape[0] * int((n - capacity).clamp(min=0).sum()),
        finite=bool(torch.isfinite(weight if weight.element_size() > 1 else weight.float()).all()),
        broken=broken,
    )


def _most(nonzero: torch.Tensor, m: int) -> int:
    return int(nonzero.reshape(nonzero.shape[0], -1, m).sum(dim=-1).max())
