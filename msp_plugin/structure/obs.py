"""Remove columns of an output projection one group at a time, and fit the columns that stay by least squares.

ZipLM (arXiv 2302.04089), which is Optimal Brain Surgeon on groups of columns: with the Gram matrix H of the inputs,
removing group S from W costs tr(W_S ((H^-1)_SS)^-1 W_S^T), and the others make up for it by
W -= W_S ((H^-1)_SS)^-1 (H^-1)_S. Týr (arXiv 2503.09657) and OSSCAR (arXiv 2403.12983) prune the same matrices.
Shape legend: O rows of the weight, I columns, G groups of I / G consecutive columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from msp_plugin.errors import NumericsError


@dataclass(frozen=True)
class Removal:
    """What is left of an output projection.

    Args:
        kept: the groups that stay, in order.
        weight: float64[O, I], zero in the columns that are gone.
    """

    kept: tuple[int, ...]
    weight: torch.Tensor


def remove_groups(
    weight: torch.Tensor, gram: torch.Tensor, groups: int, counts: Sequence[int], at_once: int = 1
) -> dict[int, Removal]:
    """Return by count of kept groups what is left; the least useful group goes first, from one count on to the next.

    Each answer's weight is the exact least squares fit on the columns that stay. Sums and factors are in float64.

    Args:
        weight: [O, I].
        gram: [I, I], the sum of x x^T over inputs, damped so that it is positive definite.
        groups: G, which divides I.
        counts: how many groups stay, each of 0 to G.
        at_once: groups that go before the costs of the others are computed anew, as in Týr's rounds; ZipLM: 1.

    Raises:
        NumericsError: the Gram matrix is not positive definite.
    """
    original, h = weight.double(), gram.double()
    factor, failed = torch.linalg.cholesky_ex(h)
    if int(failed):
        raise NumericsError(
            "the Gram matrix of the inputs is not positive definite", hint="damp it, or use more samples"
        )
    inverse, w = torch.cholesky_inverse(factor), original.clone()
    size, alive = h.shape[0] // groups, torch.ones(groups, dtype=torch.bool, device=h.device)
    order = torch.empty(0, dtype=torch.int64, device=h.device)  # of the removals, the same for all counts
    while groups - len(order) > min(counts, default=groups):
        costs = torch.where(alive, _costs(w, inverse, size), torch.inf)
        worst = costs.argsort(stable=True)[: min(at_once, groups - len(order))]
        columns = (worst[:, None] * size + torch.arange(size, device=w.device)).flatten()
        block = torch.linalg.inv(inverse[columns][:, columns])
        w -= w[:, columns] @ (block @ inverse[columns])
        inverse -= inverse[:, columns] @ (block @ inverse[columns])
        alive[worst] = False
        w[:, columns] = 0
        _clear(inverse, columns)
        order = torch.cat([order, worst])
    found = {}
    for count in sorted(set(counts), reverse=True):
        stays = torch.ones_like(alive)
        stays[order[: groups - count]] = False
        found[count] = _fitted(original, h, stays, size)
    return found


def _clear(inverse: torch.Tensor, columns: torch.Tensor) -> None:
    """Make the rows and columns of groups that are gone those of an identity, so that their blocks stay invertible."""
    inverse[columns] = 0
    inverse[:, columns] = 0
    inverse[columns, columns] = 1


def _costs(w: torch.Tensor, inverse: torch.Tensor, size: int) -> torch.Tensor:
    """Return float64[G], the error that the removal of each group adds: tr(W_S ((H^-1)_SS)^-1 W_S^T)."""
    groups = w.shape[1] // size
    of_group = w.view(w.shape[0], groups, size).transpose(0, 1)
    diagonal = inverse.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return torch.einsum("gos,gst,got->g", of_group, torch.linalg.inv(diagonal), of_group)


def _fitted(original: torch.Tensor, h: torch.Tensor, alive: torch.Tensor, size: int) -> Removal:
    """Return the least squares fit on the columns of the groups that stay: W H[:, S] H[S, S]^-1."""
    columns = torch.nonzero(alive.repeat_interleave(size)).flatten()
    fitted = torch.zeros_like(original)
    if len(columns) == original.shape[1]:
        fitted = original.clone()
    elif len(columns):
        factor = torch.linalg.cholesky(h[columns][:, columns])
        fitted[:, columns] = torch.cholesky_solve(h[columns] @ original.T, factor).T
    return Removal(tuple(torch.nonzero(alive).flatten().tolist()), fitted)
