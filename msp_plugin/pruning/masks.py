"""Masks from scores, and the count of zeros in a pruned weight.

Shape legend: O out_features, I in_features, M scores that compete with each other, C columns of such scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from msp_plugin.errors import NumericsError
from msp_plugin.plan.levels import Kind, Level, Pattern
from msp_plugin.plan.units import Layer

#: From scores [M, C] and a count to bool[M, C], True for exactly so many lowest of each column, however many
#: are equal.
TieBreaker = Callable[[torch.Tensor, int], torch.Tensor]
#: Up to so many extremes are found one by one; for more, sorting is faster.
_EXTREMES = 4


def nm_mask(score: torch.Tensor, level: Pattern) -> torch.Tensor:
    """Return bool[O, I], True where a weight is kept (see nm_masks)."""
    return nm_masks(score, [level])[0]


def nm_masks(
    score: torch.Tensor, levels: Sequence[Pattern], tie_breaker: TieBreaker | None = None
) -> list[torch.Tensor]:
    """Return bool[O, I] for each level, True for kept weights: the N highest scores of every M in a row.

    Exactly N are kept in every group. ``N:M in 2:4`` takes the two highest of every four, and the N highest
    of M among those. A share of zeros takes the highest of each row. Plain ``N:M`` levels of one M share one
    pass.

    Args:
        score: float[O, I]; higher for weights to keep.
        tie_breaker: decides between equal scores at plain ``N:M`` levels; by default, and at all other
            levels, the weight further left is kept.

    Raises:
        NumericsError: a score is not finite.
    """
    if not torch.isfinite(score).all():
        raise NumericsError(f"{int((~torch.isfinite(score)).sum())} scores are not finite")
    masks: dict[Pattern, torch.Tensor] = {}
    width = score.shape[1]
    for m in dict.fromkeys(level.m for level in levels if level.kind is Kind.NM):
        same_m = [level for level in dict.fromkeys(levels) if level.kind is Kind.NM and level.m == m]
        counts = [level.group(width)[0] for level in same_m]
        masks |= zip(same_m, _highest(score, counts, m, tie_breaker or _keep_leftmost), strict=True)
    for level in levels:
        if level.kind is not Kind.NM:
            n, m = level.group(width)
            allowed = score
            if level.kind is Kind.NM_IN_24:
                allowed = score.masked_fill(~_highest(score, [2], 4, _keep_leftmost)[0], -torch.inf)
            masks[level] = _highest(allowed, [n], m, _keep_leftmost)[0]
    return [masks[level] for level in levels]


def _highest(
    score: torch.Tensor, counts: Sequence[int], m: int, tie_breaker: TieBreaker
) -> list[torch.Tensor]:
    """Return bool[O, I] for each count, True for so many highest scores of every m in a row."""
    lowest = lowest_of_each(score.reshape(-1, m).t(), [m - n for n in counts], tie_breaker)
    return [~mask.t().reshape(score.shape) for mask in lowest]


def _keep_leftmost(score: torch.Tensor, count: int) -> torch.Tensor:
    """Break ties (see TieBreaker) so that of equal scores the first ones are not among the lowest."""
    rows = score.t().contiguous()
    lowest = rows.argsort(dim=-1, descending=True, stable=True)[:, len(score) - count :]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, lowest, True).t()


def lowest_by_topk(score: torch.Tensor, count: int) -> torch.Tensor:
    """Break ties (see TieBreaker) as torch.topk does, and with it llm-compressor."""
    rows = score.t().contiguous()
    lowest = torch.topk(rows, count, dim=1, largest=False)[1]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, lowest, True).t()


def lowest(score: torch.Tensor, count: int, tie_breaker: TieBreaker = lowest_by_topk) -> torch.Tensor:
    """Return bool[M, C], True for the ``count`` lowest scores of each column (see lowest_of_each)."""
    return lowest_of_each(score, [count], tie_breaker)[0]


def lowest_of_each(
    score: torch.Tensor, counts: Sequence[int], tie_breaker: TieBreaker = lowest_by_topk
) -> list[torch.Tensor]:
    """Return bool[M, C] for each count, True for so many lowest scores of each column.

    On a CPU the extremes are found one by one, the lowest scores or the highest, whichever are fewer: for a
    small M several times faster than sorting each column. One pass from either end serves all counts.

    Args:
        score: float[M, C].
        tie_breaker: decides in the columns where equal scores, or NaN, leave more than one answer.
    """
    from_top: dict[int, int] = {}
    from_bottom: dict[int, int] = {}
    for count in counts:
        extremes = min(count, len(score) - count)
        if 0 < extremes <= _EXTREMES and not score.is_cuda:
            (from_top if extremes < count else from_bottom)[extremes] = count
    masks: dict[int, torch.Tensor] = {}
    for top, wanted in ((True, from_top), (False, from_bottom)):
        if wanted:
            masks |= _by_extremes(score.contiguous(), wanted, top, tie_breaker)
    return [masks[count] if count in masks else tie_breaker(score, count) for count in counts]


def _by_extremes(
    score: torch.Tensor, wanted: Mapping[int, int], top: bool, tie_breaker: TieBreaker
) -> dict[int, torch.Tensor]:
    """Return, by count, bool[M, C], True for so many lowest scores of each column.

    Args:
        wanted: count of lowest scores, by the count of extremes that tell them.
        top: the extremes are the highest scores, and all others the lowest; else they are the lowest
            themselves.
    """
    masks: dict[int, torch.Tensor] = {}
    extreme, rest = torch.zeros_like(score, dtype=torch.bool), score
    for count in range(1, max(wanted) + 1):
        new = rest == (rest.amax(dim=0) if top else rest.amin(dim=0))
        if count < max(wanted):
            rest = rest.masked_fill(new, -torch.inf if top else torch.inf)
        extreme |= new
        if count in wanted:
            mask = ~extreme if top else extreme.clone()
            tied = extreme.sum(dim=0, dtype=torch.int32) != count
            if tied.any():
                mask[:, tied] = tie_breaker(score[:, tied], wanted[count])
            masks[wanted[count]] = mask
    return masks


@dataclass(frozen=True)
class Recount:
    """The counts of a pruned weight.

    Args:
        zeros: count of zeros.
        from_dead_inputs: zeros beyond the pattern's own that are due to columns of zeros: a group with j such
            columns cannot keep more than M - j weights.
        finite: True if no weight is infinite or NaN.
        broken: how the weight breaks the level, None if it does not.
    """

    zeros: int
    from_dead_inputs: int
    finite: bool
    broken: str | None = None


def recount(weight: torch.Tensor, level: Level, layer: Layer | None = None) -> Recount:
    """Return the counts of a weight [O, I], and if it obeys a level.

    Args:
        layer: with its groups, for a width.
    """
    layer, nonzero = layer or Layer("weight", *weight.shape), weight != 0
    finite = bool(torch.isfinite(weight if weight.element_size() > 1 else weight.float()).all())
    dead, broken, part, limits = 0, None, nonzero, level.limits(layer)
    kept, most = int(nonzero.sum()), level.kept(layer)
    if kept > most:
        broken = f"keeps {kept:,} weights instead of {most:,}"
    if (width := level.width(layer)) and layer.groups:
        part, used = _used(nonzero, layer)
        if used > width[0]:
            broken = f"keeps {used} of {layer.groups.count} heads or channels instead of {width[0]}"
        elif used == width[0] or (
            used and layer.inner
        ):  # else a column that stays is zero: it is not known which
            limits = width[1].limits(Layer(layer.name, *part.shape))
    alive = part.any(dim=0).float()
    for n, m, place in reversed(limits):
        capacity = alive.reshape(-1, m).sum(dim=-1).round()
        dead = int((n - capacity).clamp(min=0).sum())
        alive = (capacity.clamp(max=n) / m).repeat_interleave(m)
        if (largest := _most(part, m)) > n:
            broken = f"keeps {largest} of {m} in some {place}"
    return Recount(weight.numel() - kept, part.shape[0] * dead, finite, broken)


def _used(nonzero: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, int]:
    """Return (the rows or columns of bool[O, I] of the groups of a layer that have a weight, count of these groups)."""
    used = groups_of(nonzero, layer).any((1, 2))
    dim = 0 if layer.inner else 1
    places = used.repeat_interleave(nonzero.shape[dim] // len(used))
    return nonzero.index_select(dim, places.nonzero().flatten()), int(used.sum())


def groups_of(matrix: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Return [G, size, other], the rows or columns of a layer's matrix [O, I] by the group that they belong to."""
    assert layer.groups is not None
    by_channel = matrix if layer.inner else matrix.t()
    return by_channel.reshape(layer.groups.count, -1, by_channel.shape[1])


def _most(nonzero: torch.Tensor, m: int) -> int:
    """Return the most True of bool[O, I] in any m neighbours of a row."""
    return int(nonzero.reshape(nonzero.shape[0], -1, m).sum(dim=-1).max())
