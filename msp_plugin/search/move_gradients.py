"""How the loss of a pruned model changes when one unit moves to another level, from gradients.

Shape legend: S samples, U units, K levels, T tokens of a sample, V vocabulary, O out_features, I in_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from msp_plugin.passes.gradients import activation_gradients

#: Forward passes that one sample's slopes count as: one forward, and two backward passes of two each
#: (the gradients of the activations, and those of the weights).
FORWARD_EQUIVALENT = 5

#: Of a layer's name: its unit, and the change of its weight [O, I], in its dtype, for each level that is asked about.
Changes = Callable[[str], tuple[int, Mapping[int, torch.Tensor]]]


def measure_slopes(
    model: torch.nn.Module,
    layers: Sequence[str],
    samples: Sequence[torch.Tensor],
    loss: Callable[[int, torch.Tensor], torch.Tensor],
    changes: Changes,
    shape: tuple[int, int],
    generator: torch.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (slopes, draws), each float64[S, U, K] for S samples, NaN where nothing was asked.

    For a change D of the weights the loss grows by about <g, D> + 1/2 D^T F D. A slope is <g_s, D> of one
    unit and level, nats per token; it adds up over units. F is the Fisher information of the pruned model
    itself, that is the Gauss-Newton curvature of its KL divergence (Martens, arXiv 1412.1193, section 5):
    with labels drawn from the model's own output, the square of <g_s, D> is T D^T F D on average. A draw is
    <g_s, D> / sqrt(T); draws add up over units too, so that half the mean square of their sum is the
    curvature of a joint move, cross terms included.

    Args:
        samples: token ids int64[T], on the model's device.
        loss: of a sample's number and its logits [T, V] the mean loss, nats per token.
    """
    slopes = np.zeros((len(samples), *shape))
    draws = np.zeros_like(slopes)
    into, asked = slopes[0], np.zeros(shape, dtype=bool)

    def add(name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
        unit, wanted = changes(name)
        for level, change in wanted.items():  # <dY^T X, D> = <dY, X D^T>: no gradient of a weight is made
            into[unit, level] += float((dy.float() * (x @ change.T)).sum())
            asked[unit, level] = True

    with activation_gradients(model, layers, add):
        for number, ids in enumerate(samples):
            logits = model(ids[None], use_cache=False).logits[0].float()
            labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            own = torch.nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum")
            into = slopes[number]
            loss(number, logits).backward(retain_graph=True)
            into = draws[number]
            own.backward()
            into /= math.sqrt(len(ids))
    slopes[:, ~asked] = draws[:, ~asked] = np.nan
    return slopes, draws
