"""Masks from scores, and the recount of what a weight holds.

Shape legend: O out_features, I in_features, G groups of M along in_features, N columns
of scores that are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from msp_plugin.errors import NumericsError
from msp_plugin.plan.levels import Kind, Level

#: Of scores [M, N] and a count bool[M, N], True for so many least of each column, whatever is equal.
Settle = Callable[[torch.Tensor, int], torch.Tensor]
#: So many extremes are found one by one; for more, sorting is faster.
_EXTREMES = 4


def nm_mask(score: torch.Tensor, level: Level) -> torch.Tensor:
    """Return bool[O, I], True where a weight is kept (see nm_masks)."""
    return nm_masks(score, [level])[0]


def nm_masks(
    score: torch.Tensor, levels: Sequence[Level], settle: Settle | None = None
) -> list[torch.Tensor]:
    """Return bool[O, I] for each level, True where a weight is kept: the N best of every M along in_features.

    Exactly N are kept in every group. ``N:M in 2:4`` takes the two best of every four, and the N best of M among
    those. A share of zeros takes the best of each row. Plain ``N:M`` levels of one M are made in one pass.

    Args:
        score: float[O, I]; higher is more worth keeping.
        settle: decides among equal scores at plain ``N:M`` levels (see ``least``); by default, and at all other
            levels, the one further left is kept.

    Raises:
        NumericsError: a score is not finite.
    """
    if not torch.isfinite(score).all():
        raise NumericsError(f"{int((~torch.isfinite(score)).sum())} scores are not finite")
    found: dict[Level, torch.Tensor] = {}
    width = score.shape[1]
    for m in dict.fromkeys(level.m for level in levels if level.kind is Kind.NM):
        same = [level for level in dict.fromkeys(levels) if level.kind is Kind.NM and level.m == m]
        kept = [level.group(width)[0] for level in same]
        found |= zip(same, _best(score, kept, m, settle or _leftmost_kept), strict=True)
    for level in levels:
        if level.kind is not Kind.NM:
            n, m = level.group(width)
            own = score
            if level.kind is Kind.NM_IN_24:
                own = score.masked_fill(~_best(score, [2], 4, _leftmost_kept)[0], -torch.inf)
            found[level] = _best(own, [n], m, _leftmost_kept)[0]
    return [found[level] for level in levels]


def _best(score: torch.Tensor, counts: Sequence[int], m: int, settle: Settle) -> list[torch.Tensor]:
    gone = least_of_each(score.reshape(-1, m).t(), [m - n for n in counts], settle)
    return [~own.t().reshape(score.shape) for own in gone]


def _leftmost_kept(score: torch.Tensor, worst: int) -> torch.Tensor:
    rows = score.t().contiguous()
    gone = rows.argsort(dim=-1, descending=True, stable=True)[:, len(score) - worst :]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, gone, True).t()


def least_by_topk(score: torch.Tensor, worst: int) -> torch.Tensor:
    """Return bool like ``score`` [M, N], True for the ``worst`` least of each column as topk finds them.

    Among equals torch's topk decides: it is what llm-compressor asks.
    """
    rows = score.t().contiguous()
    found = torch.topk(rows, worst, dim=1, largest=False)[1]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, found, True).t()


def least(score: torch.Tensor, worst: int, settle: Settle = least_by_topk) -> torch.Tensor:
    """Return bool like ``score`` [M, N], True for the ``worst`` least of each column (see least_of_each)."""
    return least_of_each(score, [worst], settle)[0]


def least_of_each(
    score: torch.Tensor, counts: Sequence[int], settle: Settle = least_by_topk
) -> list[torch.Tensor]:
    """Return bool like ``score`` [M, N] for each count, True for so many least of each column.

    On a CPU, by as many extremes as there are to find of the kept or of the others, whichever are fewer: several
    times faster than sorting each column for a small M. One pass from either end serves all counts.

    Args:
        settle: decides the columns in which equal scores, or NaN, leave more than one answer.
    """
    sides: dict[bool, dict[int, int]] = {True: {}, False: {}}
    for worst in counts:
        few = min(worst, len(score) - worst)
        if 0 < few <= _EXTREMES and not score.is_cuda:
            sides[few < worst][few] = worst
    found: dict[int, torch.Tensor] = {}
    for keep, wanted in sides.items():
        if not wanted:
            continue
        found |= _by_extremes(score.contiguous(), wanted, keep, settle)
    return [found[worst] if worst in found else settle(score, worst) for worst in counts]


def _by_extremes(
    score: torch.Tensor, wanted: Mapping[int, int], keep: bool, settle: Settle
) -> dict[int, torch.Tensor]:
    """Return by count of least ones bool like ``score`` [M, N], from the greatest (``keep``) or the least found in turn.

    Args:
        wanted: by count of extremes that of the least ones.
    """
    hit, rest, found = torch.zeros_like(score, dtype=torch.bool), score, {}
    for few in range(1, max(wanted) + 1):
        now = rest == (rest.amax(dim=0) if keep else rest.amin(dim=0))
        rest = rest.masked_fill(now, -torch.inf if keep else torch.inf) if few < max(wanted) else rest
        hit |= now
        if few in wanted:
            own = ~hit if keep else hit.clone()
            tied = hit.sum(dim=0, dtype=torch.int32) != few
            if tied.any():
                own[:, tied] = settle(score[:, tied], wanted[few])
            found[wanted[few]] = own
    return found


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
