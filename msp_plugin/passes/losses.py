"""Measure a model: perplexity, and KL divergence from another model."""

from __future__ import annotations

import math

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import NumericsError
from msp_plugin.models.offload import input_device
from msp_plugin.progress import Progress, silent

#: Logits (tokens times vocabulary) handled at once; bounds the memory of their float32 copies.
_LOGITS = 2**23
#: Rows of an output head that are converted to float32 at once.
_ROWS = 2**14
#: Tokens per position whose logits the KL to the dense model reads one by one (see search.dense_reference).
LIKELY = 32


@torch.no_grad()
def perplexity(
    model: torch.nn.Module, data: CalibrationSet, *, batch_tokens: int = 4096, progress: Progress = silent
) -> float:
    """Return exp of the mean next-token cross entropy over all samples; ``inf`` beyond exp(700).

    Each sample is scored by itself; its first token is context only.

    Raises:
        NumericsError: the loss is not a number.
    """
    device = input_device(model)
    total, count, done = 0.0, 0, 0
    for ids in data.batches(batch_tokens):
        ids = ids.to(device)
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += summed_cross_entropy(logits, ids[:, 1:].flatten().to(logits.device))
        count += ids[:, 1:].numel()
        done += len(ids)
        progress(done, len(data))
    loss = total / count
    if math.isnan(loss):
        raise NumericsError("the model's loss is not a number", hint="try dtype float32")
    return math.exp(loss) if loss < 700 else math.inf


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the cross entropy of logits [N, V] and targets int64[N] in nats, summed in float32 pieces."""
    total = 0.0
    step = max(1, _LOGITS // logits.shape[-1])
    for part, target in zip(logits.split(step), targets.split(step), strict=True):
        total += float(torch.nn.functional.cross_entropy(part.float(), target, reduction="sum").double())
    return total


def summed_kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Return KL(reference || logits) of logits [N, V] in nats, summed over N; float32 logits, float64 sums."""
    total = 0.0
    step = max(1, _LOGITS // logits.shape[-1])
    for p, q in zip(reference.split(step), logits.split(step), strict=True):
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return total


def summed_exponentials(logits: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the summed exponentials of logits [..., V] as float32[...], computed piece by piece."""
    flat = logits.flatten(0, -2)
    parts = flat.split(max(1, _LOGITS // flat.shape[-1]))
    return torch.cat([part.float().logsumexp(-1) for part in parts]).view(logits.shape[:-1])


def likely_tokens(
    logits: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the LIKELY most likely tokens of each position, their probabilities, and the weighted sum of other rows.

    Args:
        logits: [T, V].
        rows: [V, D], e.g. of the output head.

    Returns:
        tokens int64[T, K]; probabilities float32[T, K]; float32[T, D], the sum over all tokens but the K likely ones
        of probability times row.
    """
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for part in logits.split(max(1, _LOGITS // logits.shape[-1])):
        p = part.float().softmax(-1)
        shares, tokens = p.topk(min(LIKELY, p.shape[-1]), -1)
        p.scatter_(-1, tokens, 0.0)
        pieces = zip(p.split(_ROWS, -1), rows.split(_ROWS), strict=True)
        first, *others = (share @ some.float() for share, some in pieces)
        parts.append((tokens, shares, sum(others, start=first)))
    tokens, shares, means = (torch.cat(column) for column in zip(*parts, strict=True))
    return tokens, shares, means


@torch.no_grad()
def mean_kl(
    reference: torch.nn.Module,
    model: torch.nn.Module,
    data: CalibrationSet,
    *,
    batch_tokens: int = 4096,
    progress: Progress = silent,
) -> float:
    """Return the mean KL(reference || model) in nats per token over all positions of all samples.

    Raises:
        NumericsError: it is not a number.
    """
    total, count, done = 0.0, 0, 0
    for ids in data.batches(batch_tokens):
        pair = [m(ids.to(input_device(m)), use_cache=False).logits.flatten(0, 1) for m in (reference, model)]
        total += summed_kl(pair[0], pair[1].to(pair[0].device))
        count += ids.numel()
        done += len(ids)
        progress(done, len(data))
    if math.isnan(total):
        raise NumericsError("the KL divergence is not a number", hint="try dtype float32")
    return total / count
