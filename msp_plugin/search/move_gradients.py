"""Predict from gradients how the loss of a pruned model changes when one unit moves to another level.

Shape legend: S samples, U units, K levels, T tokens of a sample, V vocabulary, O out_features, I in_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from msp_plugin.allocators.base import Choice
from msp_plugin.models.offload import named_parameters
from msp_plugin.passes.gradients import activation_gradients, loss_scale
from msp_plugin.search.candidate_weights import CandidateWeights

#: Numbers of a weight's gradient that are held at a time.
_NUMBERS = 2**20

#: Called with a layer's name; returns the number of its unit and, by level, the change [O, I] of its weight.
Changes = Callable[[str], tuple[int, Mapping[int, torch.Tensor]]]


def changes_within(weights: CandidateWeights, choice: Choice, reach: int) -> Changes:
    """Return the changes of weights when one unit of ``choice`` moves by up to ``reach`` levels (see neighbours).

    A half-block's output is linear in the weights of its last layer alone. In moves to or from a level that narrows, that
    layer says what goes: with the changes of all layers, the first-order change would be counted once for each. Of inner
    layers only rows count that both levels keep. A change that turned out to be zero is not read again.
    """
    problem = weights.problem
    units = {layer.name: (u, layer.inner) for u, unit in enumerate(problem.table) for layer in unit.layers}
    unchanged: set[tuple[str, int]] = set()

    def changes(layer: str) -> tuple[int, dict[int, torch.Tensor]]:
        u, inner = units[layer]
        level, now, found = problem.menu[choice[u]], None, {}
        for k in problem.neighbours(u, choice[u], reach):
            then = problem.menu[k]
            rows_of_both = inner and (level.narrows or then.narrows)
            if (layer, k) in unchanged or (rows_of_both and (level.is_dropped or then.is_dropped)):
                continue
            now = weights.weight(layer, level.name) if now is None else now
            change = _change(weights.weight(layer, then.name), now, rows_of_both)
            if rows_of_both and not bool(change.any()):
                unchanged.add((layer, k))
            else:
                found[k] = change
        return u, found

    return changes


def _change(weight: torch.Tensor, now: torch.Tensor, in_rows_of_both: bool) -> torch.Tensor:
    """Return the change from ``now`` [O, I] to a weight, on request zero in rows that are zero in either."""
    if not in_rows_of_both:
        return weight - now
    rows = (weight != 0).any(dim=1, keepdim=True) & (now != 0).any(dim=1, keepdim=True)
    return (weight - now) * rows


def sample_gradients(
    model: torch.nn.Module,
    ids: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor],
    layers: Iterable[str],
    changes: Changes,
    shape: tuple[int, int],
    seed: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Return (first_order, curvature_sample) of one sample, each float64[U, K], NaN for moves not in ``changes``.

    For a change D of the weights the loss grows by about <g, D> + 1/2 D^T F D. The first-order change is <g, D> of
    one unit and level, nats per token; it adds up over units. F is the Fisher information of the pruned model
    itself, that is the Gauss-Newton curvature of its KL divergence (Martens, arXiv 1412.1193, section 5): with
    labels drawn from the model's own output, the square of <g, D> is T D^T F D on average. A curvature sample is
    this <g, D> / sqrt(T); they add up over units too, so that half the mean square of their sum is the curvature
    of a joint move, cross terms included.

    Args:
        ids: int64[T], on the model's device.
        loss: returns the mean loss of logits [T, V], nats per token, as a node of the graph.
        shape: (U, K).
        seed: (the search's seed, the sample's number), which draw the labels; so any rank draws the same.
    """
    first_order, curvature_sample = np.zeros((2, *shape))
    into, asked = first_order, np.zeros(shape, dtype=bool)

    def add(name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
        unit, wanted = changes(name)
        if not wanted:
            return
        products = _gradient_products(x, dy, list(wanted.values()))
        into[unit, list(wanted)] += products
        asked[unit, list(wanted)] = True

    scale = loss_scale((p for _, _, p in named_parameters(model)), len(ids))
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    with activation_gradients(model, layers, add):
        logits = model(ids[None], use_cache=False).logits[0].float()
        labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        own = torch.nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum")
        (loss(logits) * scale).backward(retain_graph=True)
        into = curvature_sample
        own.backward()
    first_order /= scale
    curvature_sample /= math.sqrt(len(ids))
    first_order[~asked] = curvature_sample[~asked] = np.nan
    return first_order, curvature_sample


def _gradient_products(x: torch.Tensor, dy: torch.Tensor, changes: Sequence[torch.Tensor]) -> list[float]:
    """Return <dY^T X, D> for each change D [O, I].

    Some rows at a time, so that no gradient of a whole weight is held, and sums in float32 stay short.

    Args:
        x, dy: [T, I] and [T, O].
    """
    if x.dtype == torch.float16:  # the sums over tokens could overflow
        x, dy = x.float(), dy.float()
    sums = torch.zeros(len(changes), dtype=torch.float64, device=x.device)
    rows = max(1, _NUMBERS // x.shape[-1])
    for some, *parts in zip(dy.split(rows, dim=1), *(change.split(rows) for change in changes), strict=True):
        gradient = (some.T @ x).float().flatten()
        for i, part in enumerate(parts):
            sums[i] += torch.dot(gradient, part.float().flatten())
    return sums.tolist()


def stack_samples(samples: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return (first_order, curvature_samples) of all samples, each float64[S, U, K].

    If a sample does not reach a unit that others reach, e.g. an expert, its loss does not change: 0 instead of NaN.
    """
    first_order, curvature_samples = (np.stack(arrays) for arrays in zip(*samples, strict=True))
    missed, asked = np.isnan(first_order).all(axis=2), ~np.isnan(first_order).all(axis=0)
    unreached = missed[:, :, None] & asked
    first_order[unreached] = curvature_samples[unreached] = 0.0
    return first_order, curvature_samples
