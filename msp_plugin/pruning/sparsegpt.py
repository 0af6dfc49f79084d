"""SparseGPT: prune column by column, and let the columns to the right make up for the error.

Frantar and Alistarh, SparseGPT (arXiv 2301.00774), algorithm 1. The arithmetic is llm-compressor's, so
that ``N:M`` comes out bit for bit as its ``sparsify_weight`` makes it; the Hessian is factored once for
all levels.

Deviations from the paper: a singular Hessian is an error; a share of zeros is exact in every row, where
the paper takes the least of each column block over all rows; ``N:M in 2:4`` is ours.

Shape legend: O out_features, I in_features, B columns of a block. W weight [O, I], H Hessian of the
layer's squared output error [I, I].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from msp_plugin.errors import NumericsError
from msp_plugin.plan.levels import Kind, Level
from msp_plugin.pruning.masks import nm_mask


@dataclass(frozen=True)
class InverseFactor:
    """The upper Cholesky factor float32[I, I] of the damped Hessian's inverse, and bool[I], the dead inputs."""

    upper: torch.Tensor
    dead: torch.Tensor


def factor_inverse(hessian: torch.Tensor, dampening_frac: float, layer: str) -> InverseFactor:
    """Return the factor of a Hessian float32[I, I], which is left as it is.

    Args:
        dampening_frac: share of the mean diagonal that is added to it.
        layer: the layer's name, for the error.

    Raises:
        NumericsError: the damped Hessian is not finite or not positive definite.
    """
    H = hessian.clone()
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    diagonal = torch.arange(H.shape[0], device=H.device)
    H[diagonal, diagonal] += dampening_frac * torch.mean(torch.diag(H))
    finite = bool(torch.isfinite(H).all())
    if finite:
        H, failed = torch.linalg.cholesky_ex(H)
        if not int(failed):
            H, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(H), upper=True)
            if not int(failed):
                return InverseFactor(H, dead)
    raise NumericsError(
        f"the Hessian of {layer} is {'singular' if finite else 'not finite'} with dampening {dampening_frac:g}",
        hint="give more calibration samples, or raise the method's dampening_frac",
    )


def sparsegpt(weight: torch.Tensor, factor: InverseFactor, level: Level, block_size: int) -> torch.Tensor:
    """Return the pruned weight [O, I] in the weight's dtype; the weight is left as it is.

    Args:
        factor: see ``factor_inverse``.
        block_size: columns compressed in one pass; a multiple of the level's M.
    """
    W = weight.detach().to(torch.float32, copy=True)
    W[:, factor.dead] = 0
    quotas = _quotas(level, factor.dead, block_size)
    for b, i1 in enumerate(range(0, W.shape[1], block_size)):
        i2 = min(i1 + block_size, W.shape[1])
        W1, upper = W[:, i1:i2].clone(), factor.upper[i1:i2, i1:i2]
        errors = _prune_block(W1, upper, level, quotas[b])
        W[:, i1:i2] = W1
        W[:, i2:] -= errors.matmul(factor.upper[i1:i2, i2:])
    return W.to(weight.dtype)


def _prune_block(W1: torch.Tensor, upper: torch.Tensor, level: Level, quota: int) -> torch.Tensor:
    """Prune a block W1 [O, B] in place; return the errors [O, B] that the columns after it make up for."""
    columns = W1.t().contiguous()  # [B, O]: a column at a time is read and written
    errors, pruned = torch.zeros_like(columns), torch.zeros_like(columns, dtype=torch.bool)
    count = len(columns)
    period = count if level.kind is Kind.SHARE else level.m
    for i in range(count):
        if i % period == 0:
            group = slice(i, i + period)
            score = columns[group].t().contiguous() ** 2 / torch.diag(upper)[group].reshape(1, -1) ** 2
            pruned[group] = _pruned(score, level, quota).t()
        kept = columns[i].masked_fill(pruned[i], 0)
        torch.div(columns[i] - kept, upper[i, i], out=errors[i])
        columns[i:] -= upper[i, i:, None] * errors[i]
        columns[i] = kept
    W1.copy_(columns.t())
    return errors.t().contiguous()


def _pruned(score: torch.Tensor, level: Level, quota: int) -> torch.Tensor:
    """Return bool like ``score``, True where a group's weights go; N:M settles ties as the host does."""
    if level.kind is Kind.NM_IN_24:
        return ~nm_mask(score, level)
    worst = level.m - level.n if level.kind is Kind.NM else score.shape[1] - quota
    least = torch.topk(score, worst, dim=1, largest=False)[1]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, least, True)


def _quotas(level: Level, dead: torch.Tensor, block_size: int) -> list[int]:
    """Return how many weights of each row every block keeps at a share of zeros; their sum is exact.

    The count is spread over the blocks by their columns that are not dead, so that none has to keep more
    than it has.
    """
    alive = (~dead).cumsum(0)[block_size - 1 :: block_size].tolist()
    total = int((~dead).sum())
    if len(alive) * block_size < len(dead):
        alive.append(total)
    if level.kind is not Kind.SHARE:
        return [0] * len(alive)
    kept = min(level.group(len(dead))[0], total)
    ends = [kept * count // max(total, 1) for count in alive]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
