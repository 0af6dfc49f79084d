"""How much the heads and channels of a layer matter by gradients: LLM-Pruner's scores.

Shape legend: G groups of the layer, C channels of a group (rows, or columns of the last layer of a half), X the other side.
"""

from __future__ import annotations

import torch

from msp_plugin.errors import RecipeError, nearest

#: LLM-Pruner's importances (arXiv 2305.11627), with the second-order terms that they need of the gradients.
TAYLOR = {"vector": 1, "first": 1, "second": 2, "mixed": 2}


def gradient_order(score: str) -> int:
    """Return 2 for a score that reads squared gradients, else 1.

    Raises:
        RecipeError: there is no such score.
    """
    if score not in TAYLOR:
        raise RecipeError(f"Taylor score {score!r} is unknown", hint=nearest(score, TAYLOR))
    return TAYLOR[score]


def taylor_scores(
    weight: torch.Tensor, gradient: torch.Tensor, squares: torch.Tensor, score: str
) -> torch.Tensor:
    """Return float64[G], what removing each group of a layer changes in the loss, estimated by a Taylor series.

    A channel i has weights W_ij with gradients g_ij: ``vector`` |sum_j W_ij g_ij|, ``first`` sum_j |W_ij g_ij|,
    ``second`` sum_j |W_ij^2 F_ij| and ``mixed`` sum_j |W_ij g_ij - W_ij^2 F_ij / 2|, whose Hessian's diagonal is the
    Fisher information F (sections 3.2 and A of the paper; ``second`` is its code's element^2, without the half). The
    channels of a group are added up, as its experiments do; those of a half's layers are added up by the caller.

    Deviation: a KV head is scored with its own query heads. The authors' code adds the scores of query heads j, j + G,
    j + 2G, ... to KV head j, which belong to other KV heads.

    Args:
        weight, gradient: [G, C, X]; the gradient of the mean loss.
        squares: [G, C, X], the mean over samples of the squared gradient of each sample's loss.
    """
    first = weight.double() * gradient.double()
    if score == "vector":
        return first.sum(dim=2).abs().sum(dim=1)
    if score == "first":
        return first.abs().sum(dim=(1, 2))
    second = weight.double().square() * squares.double()
    return (second if score == "second" else (first - second / 2).abs()).sum(dim=(1, 2))
