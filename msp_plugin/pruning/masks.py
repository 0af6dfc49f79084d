"""N:M masks from scores, and the recount of what a weight holds.

Shape legend: O out_features, I in_features, G groups of M along in_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from msp_plugin.errors import NumericsError
from msp_plugin.plan.levels import Level


def nm_mask(score: torch.Tensor, level: Level) -> torch.Tensor:
    """Return bool[O, I], True where a weight is kept: the N best of every M along in_features.

    Exactly N are kept in every group; among equal scores the one further left is kept.

    Args:
        score: float[O, I]; higher is more worth keeping.

    Raises:
        NumericsError: a score is not finite.
    """
    level.kept(*score.shape)
    if not torch.isfinite(score).all():
        raise NumericsError(f"{int((~torch.isfinite(score)).sum())} scores are not finite")
    groups = score.reshape(score.shape[0], -1, level.m)
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., : level.n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
    return mask.reshape(score.shape)


@dataclass(frozen=True)
class Recount:
    """What a pruned weight holds.

    Args:
        zeros: count of zeros.
        most_in_group: the most nonzeros found in one group of M.
        from_dead_inputs: zeros that columns which are zero throughout force beyond the pattern's own: a group
            with j such columns cannot keep more than M - j weights.
        finite: True if no weight is infinite or not a number.
    """

    zeros: int
    most_in_group: int
    from_dead_inputs: int
    finite: bool


def recount(weight: torch.Tensor, level: Level) -> Recount:
    """Return the counts of an [O, I] weight under the groups of ``level``."""
    nonzero = weight != 0
    dead = (~nonzero.any(dim=0)).reshape(-1, level.m).sum(dim=-1)
    per_group = nonzero.reshape(weight.shape[0], -1, level.m).sum(dim=-1)
    return Recount(
        zeros=weight.numel() - int(nonzero.sum()),
        most_in_group=int(per_group.max()),
        from_dead_inputs=weight.shape[0] * int((dead - (level.m - level.n)).clamp(min=0).sum()),
        finite=bool(torch.isfinite(weight if weight.element_size() > 1 else weight.float()).all()),
    )
