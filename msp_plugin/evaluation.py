"""Measured quality: perplexity of a model, and the loss of a candidate allocation.

Shape legend: B samples, T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from msp_plugin.calibration import CalibrationSet
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import NumericsError
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.sensitivity.base import Progress, silent

#: Logits compared at once, in numbers; bounds the float32 copies of [tokens, V].
_LOGITS = 2**23


@torch.no_grad()
def perplexity(
    model: torch.nn.Module, data: CalibrationSet, *, batch_tokens: int = 4096, progress: Progress = silent
) -> float:
    """Return exp of the mean next-token cross entropy over all samples; ``inf`` beyond exp(700).

    Each sample is scored on its own, its first token is context only.

    Raises:
        NumericsError: the loss is not a number.
    """
    device = next(model.parameters()).device
    total, count, done = 0.0, 0, 0
    for ids in data.batches(batch_tokens):
        ids = ids.to(device)
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += _cross_entropy(logits, ids[:, 1:].flatten().to(logits.device))
        count += ids[:, 1:].numel()
        done += len(ids)
        progress(done, len(data))
    loss = total / count
    if math.isnan(loss):
        raise NumericsError("the model's loss is not a number", hint="try dtype float32")
    return math.exp(loss) if loss < 700 else math.inf


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the summed cross entropy of logits [N, V] in nats, in float32 pieces."""
    total = 0.0
    step = max(1, _LOGITS // logits.shape[-1])
    for part, target in zip(logits.split(step), targets.split(step), strict=True):
        total += float(torch.nn.functional.cross_entropy(part.float(), target, reduction="sum").double())
    return total


def _kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Return the summed KL(reference || logits) of [N, V] logits in nats, in float32 pieces."""
    total = 0.0
    step = max(1, _LOGITS // logits.shape[-1])
    for p, q in zip(reference.split(step), logits.split(step), strict=True):
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return total


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
        pair = [
            m(ids.to(next(m.parameters()).device), use_cache=False).logits.flatten(0, 1)
            for m in (reference, model)
        ]
        total += _kl(pair[0], pair[1].to(pair[0].device))
        count += ids.numel()
        done += len(ids)
        progress(done, len(data))
    if math.isnan(total):
        raise NumericsError("the KL divergence is not a number", hint="try dtype float32")
    return total / count


class CandidateLoss:
    """Measures choices on a model: sets the candidate's weights, runs the text, compares.

    Use it as a context manager: the model's original weights are back when the block ends, however
    it ends. The dense model's outputs are kept as the input of the output head, [B, T, D], where the
    head is a plain linear, and as logits where it is not.

    Args:
        objective: ``kl``: mean KL(dense || candidate) in nats per token; ``perplexity``: mean next-token
            cross entropy in nats per token, the logarithm of the perplexity.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        database: LevelDatabase,
        problem: AllocationProblem,
        data: CalibrationSet,
        objective: str = "kl",
        batch_tokens: int = 4096,
    ):
        self.model, self.database, self.problem = model, database, problem
        self.data, self.objective = data, objective
        self.forward_tokens = 0
        self._device = next(model.parameters()).device
        self._batches = [ids.to(self._device) for ids in data.batches(batch_tokens)]
        self._now: list[str] = ["dense"] * len(problem.table)
        self._reference: list[torch.Tensor] = []
        self._head: torch.nn.Module | None = None

    @torch.no_grad()
    def __enter__(self) -> CandidateLoss:
        if self.objective == "kl":
            for ids in self._batches:
                with _head_input(self.model) as seen:
                    logits = self.model(ids, use_cache=False).logits
                head = self.model.get_output_embeddings()
                if not self._reference and seen and torch.equal(head(seen[0]), logits):
                    self._head = head
                self._reference.append(seen[0] if self._head is not None else logits)
                if not torch.isfinite(logits).all():
                    raise NumericsError(
                        "the dense model's logits on the search text are not finite",
                        hint="the activations overflow: try dtype float32",
                    )
        return self

    def __exit__(self, *error: object) -> None:
        self._set(["dense"] * len(self._now))

    @torch.no_grad()
    def __call__(self, choice: tuple[int, ...]) -> float:
        """Return the loss of a choice; ``inf`` if it is not a number.

        Side effect: the model holds the candidate's weights until the next call.
        """
        self._set([self.problem.menu[k].name for k in choice])
        total, count = 0.0, 0
        for i, ids in enumerate(self._batches):
            logits = self.model(ids, use_cache=False).logits
            if self.objective == "kl":
                reference = self._reference[i]
                reference = reference if self._head is None else self._head(reference)
                total += _kl(reference.flatten(0, 1), logits.flatten(0, 1))
                count += ids.numel()
            else:
                total += _cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                count += ids[:, 1:].numel()
            self.forward_tokens += ids.numel()
        loss = total / count
        return loss if math.isfinite(loss) else math.inf

    @torch.no_grad()
    def _set(self, names: list[str]) -> None:
        for u, (unit, name) in enumerate(zip(self.problem.table, names, strict=True)):
            if self._now[u] != name:
                weights = [self.database.weight(layer.name, name) for layer in unit.layers]
                self._now[u] = ""  # neither, until all layers of the unit are set
                for layer, weight in zip(unit.layers, weights, strict=True):
                    self.model.get_submodule(layer.name).weight.copy_(weight)
                self._now[u] = name


@contextmanager
def _head_input(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yield a list that receives the input of the output head in each forward pass."""
    seen: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    if head is None:
        yield seen
        return
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
