"""SparseGPT: prune column by column, and change the columns to the right to compensate for the error.

Frantar and Alistarh, SparseGPT (arXiv 2301.00774), algorithm 1. The arithmetic is llm-compressor's, so
that ``N:M`` comes out bit for bit as its ``sparsify_weight`` makes it; the Hessian is factored once for
all levels.

Deviations from the paper: a singular Hessian is an error; a share of zeros is exact in every row, where
the paper takes the least of each column block over all rows; ``N:M in 2:4`` is ours.

Shape legend: O out_features, I in_features, B columns of a block, L levels, M columns of a group.
W weight [O, I], H Hessian of the layer's squared output error [I, I].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.plan.levels import Kind, Pattern
from msp_plugin.plan.units import Layer
from msp_plugin.pruning import masks
from msp_plugin.pruning.base import Pruner
from msp_plugin.pruning.masks import lowest, lowest_by_topk, nm_mask

#: Rows of several levels that go through the column loop together on a CPU. More leave its cache, and are
#: slower.
_ROWS = 4608
#: Columns of a block of the quadratic form.
_FORM_BLOCK = 256


@dataclass(frozen=True)
class InverseFactor:
    """The inverse of a damped Hessian.

    Args:
        upper: float32[I, I], its upper Cholesky factor.
        dead: bool[I], True for inputs that were always zero.
    """

    upper: torch.Tensor
    dead: torch.Tensor


def factor_inverse(hessian: torch.Tensor, dampening_frac: float, layer: str) -> InverseFactor:
    """Return the factor of the inverse of a Hessian float32[I, I], which is not changed.

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
        f"the Hessian of {layer} is {'singular' if finite else 'not finite'} "
        f"with dampening {dampening_frac:g}",
        hint="give more calibration samples, or raise the method's dampening_frac",
    )


def sparsegpt(weight: torch.Tensor, factor: InverseFactor, level: Pattern, block_size: int) -> torch.Tensor:
    """Return the pruned weight [O, I] in the weight's dtype; ``weight`` itself is not changed.

    Args:
        factor: see ``factor_inverse``.
        block_size: columns that are pruned in one pass; a multiple of the level's M.
    """
    return sparsegpt_levels(weight, factor, [level], block_size)[0]


def sparsegpt_levels(
    weight: torch.Tensor, factor: InverseFactor, levels: Sequence[Pattern], block_size: int
) -> list[torch.Tensor]:
    """Return the pruned weight [O, I] at each level, in the weight's dtype; ``weight`` itself is not changed.

    Several levels of a small layer go through the column loop together, which is faster. The products with
    the columns to the right are made level by level, because a matrix product of another shape may round
    differently. Memory: O * I float32 per level.

    Args:
        factor: see ``factor_inverse``.
        block_size: columns that are pruned in one pass; a multiple of every level's M.
    """
    together = len(levels) if weight.is_cuda else max(1, _ROWS // weight.shape[0])
    weights: list[torch.Tensor] = []
    for first in range(0, len(levels), max(together, 1)):
        part = levels[first : first + together]
        W = weight.detach().float().repeat(len(part), 1, 1)  # [L, O, I]
        W[..., factor.dead] = 0
        _prune_columns(W, factor, part, block_size)
        weights += W.to(weight.dtype).unbind()
    return weights


def _prune_columns(
    W: torch.Tensor, factor: InverseFactor, levels: Sequence[Pattern], block_size: int
) -> None:
    """Prune W [L, O, I] in place, each matrix to its level."""
    quotas = [_quotas(level, factor.dead, block_size) for level in levels]
    for b, i1 in enumerate(range(0, W.shape[-1], block_size)):
        i2 = min(i1 + block_size, W.shape[-1])
        columns = torch.stack([own[:, i1:i2].contiguous().t().contiguous() for own in W])  # [L, B, O]
        upper = factor.upper[i1:i2, i1:i2].contiguous()
        errors = _prune_block(columns, upper, levels, [quota[b] for quota in quotas])
        for own, block, error in zip(W, columns, errors, strict=True):
            own[:, i1:i2] = block.t().contiguous()
            own[:, i2:] -= error.t().contiguous().matmul(factor.upper[i1:i2, i2:])


def _prune_block(
    columns: torch.Tensor, upper: torch.Tensor, levels: Sequence[Pattern], quotas: Sequence[int]
) -> torch.Tensor:
    """Prune a block [L, B, O] in place; return its errors [L, B, O], for which later columns compensate."""
    count = columns.shape[1]
    errors, change = torch.empty_like(columns), torch.empty_like(columns)
    pruned, kept = (torch.zeros_like(columns, dtype=torch.bool) for _ in range(2))
    square, diagonal = torch.diag(upper)[:, None] ** 2, torch.diag(upper).unbind()
    periods = [count if level.kind is Kind.SHARE else level.m for level in levels]
    for i in range(count):
        for k, (level, period) in enumerate(zip(levels, periods, strict=True)):
            if i % period == 0:
                group = slice(i, i + period)
                pruned[k, group] = _pruned(columns[k, group] ** 2 / square[group], level, quotas[k])
                torch.logical_not(pruned[k, group], out=kept[k, group])
        torch.div(columns[:, i].masked_fill(kept[:, i], 0), diagonal[i], out=errors[:, i])
        rest = slice(i + 1, None)
        columns[:, rest] -= torch.mul(upper[i, rest, None], errors[:, i, None], out=change[:, rest])
    columns.masked_fill_(pruned, 0)
    return errors


def _pruned(score: torch.Tensor, level: Pattern, quota: int) -> torch.Tensor:
    """Return bool[M, O], True for the weights of a group to prune; N:M breaks ties as llm-compressor does."""
    if level.kind is Kind.NM_IN_24:
        return ~nm_mask(score.t().contiguous(), level).t()
    if level.kind is Kind.NM:
        return lowest(score, level.m - level.n)
    return lowest_by_topk(score, len(score) - quota)


def _quotas(level: Pattern, dead: torch.Tensor, block_size: int) -> list[int]:
    """Return how many weights of each row each block keeps at a share of zeros; the sum is exact.

    Each block keeps in proportion to its columns that are not dead.
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


def quadratic_form(delta: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return d H d^T for each row d, float64[O], for delta float32[O, I] and a symmetric H float32[I, I].

    Products are float32, and summed in float64. Only the blocks of H on and above the diagonal are read,
    which halves the work.
    """
    total = torch.zeros(len(delta), dtype=torch.float64, device=delta.device)
    for i1 in range(0, delta.shape[1], _FORM_BLOCK):
        own, after = delta[:, i1 : i1 + _FORM_BLOCK], delta[:, i1 + _FORM_BLOCK :]
        rows = hessian[i1 : i1 + _FORM_BLOCK, i1:]
        product = own @ rows[:, : own.shape[1]]
        if after.shape[1]:
            product += 2 * (after @ rows[:, own.shape[1] :].t())
        total += product.mul_(own).sum(dim=1, dtype=torch.float64)
    return total


@dataclass
class InputHessian:
    """The Hessian of one input: float32[I, I], 2 / samples * sum of x x^T over all tokens.

    ``factor`` is made of it when the first layer is pruned; the layers that share the input share it.
    """

    hessian: torch.Tensor
    samples: int = 0
    tokens: int = 0
    factor: InverseFactor | None = None

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs [B, T, I], as llm-compressor's ``accumulate_hessian`` does, bit for bit."""
        added = inputs.shape[0]
        self.hessian *= self.samples / (self.samples + added)
        self.samples += added
        self.tokens += inputs[..., 0].numel()
        columns = inputs.reshape(-1, inputs.shape[-1]).t().float() * math.sqrt(2 / self.samples)
        self.hessian += columns.matmul(columns.t())
        self.factor = None


@dataclass(frozen=True)
class SparseGPT(Pruner):
    """SparseGPT (arXiv 2301.00774): the weights that stay make up for those that go.

    Args:
        block_size: columns compressed in one pass; a multiple of every M.
        dampening_frac: share of the Hessian's mean diagonal that is added to it.
    """

    name = "sparsegpt"
    arithmetic = (masks,)

    block_size: int = 128
    dampening_frac: float = 0.01

    def __post_init__(self) -> None:
        if self.block_size < 1 or not self.dampening_frac >= 0:
            raise RecipeError("sparsegpt: block_size must be at least 1 and dampening_frac at least 0")

    def check_level(self, level: Pattern) -> None:
        if level.kind is not Kind.SHARE and self.block_size % level.m:
            raise RecipeError(
                f"sparsegpt: block_size {self.block_size} is no multiple of the M of level {level}",
                hint="the pattern would break at the block's edge; change block_size",
            )

    def statistic_bytes(self, layer: Layer) -> int:
        return 4 * layer.in_features**2

    def new_statistic(self, module: torch.nn.Linear) -> InputHessian:
        width = module.in_features
        return InputHessian(torch.zeros(width, width, device=module.weight.device))

    def observe(self, module: torch.nn.Linear, inputs: torch.Tensor, statistic: InputHessian) -> InputHessian:
        statistic.add(inputs.to(statistic.hessian.device))
        return statistic

    def prune_levels(
        self, module: torch.nn.Linear, statistic: InputHessian, levels: Sequence[Pattern], layer: str
    ) -> Iterator[torch.Tensor]:
        weight = module.weight.detach()
        if statistic.factor is None:  # else another layer of this input left it
            statistic.factor = factor_inverse(statistic.hessian, self.dampening_frac, layer)
        sparse = [level for level in levels if not level.is_dense]
        pruned = iter(sparsegpt_levels(weight, statistic.factor, sparse, self.block_size))
        for level in levels:
            yield weight.clone() if level.is_dense else next(pruned)

    def output_error(self, delta: torch.Tensor, statistic: InputHessian) -> float:
        """Return the mean squared change of the output per token, exact over the calibration tokens."""
        return float(self.row_errors(delta, statistic).sum())

    def row_errors(self, delta: torch.Tensor, statistic: InputHessian) -> torch.Tensor:
        return quadratic_form(delta, statistic.hessian) * (statistic.samples / (2 * statistic.tokens))
