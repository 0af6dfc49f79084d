"""Measure the loss of candidates on a model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from msp_plugin.allocators.base import MOVE_GRADIENT_PASSES, Choice
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.models.offload import input_device
from msp_plugin.passes.losses import summed_cross_entropy
from msp_plugin.passes.prefix import Prefix
from msp_plugin.runtime.memory import cache_bytes, retried, shortage_explained
from msp_plugin.runtime.ranks import ALONE, Ranks
from msp_plugin.search.batches import SHORTER, Batches
from msp_plugin.search.candidate_weights import CandidateWeights
from msp_plugin.search.dense_reference import OutputReference, Passed, PlainHeadReference, make_reference
from msp_plugin.search.move_gradients import changes_within, sample_gradients, stack_samples

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Bytes of the incumbent's activations kept in memory.
ACTIVATION_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class DenseReference:
    """The outputs of the dense model on a text, and what fits into memory with them.

    Args:
        batch_tokens: most tokens of a batch.
        reuse: activations are reused.
    """

    terms: PlainHeadReference | OutputReference | CrossEntropy
    batch_tokens: int
    reuse: bool


class CandidateLoss:
    """The mean loss of a choice over samples of text, nats per token.

    The model keeps the last candidate's weights until the next one.

    Args:
        weights: an entered CandidateWeights.
        objective: ``kl``: KL(dense || candidate); ``perplexity``: the next-token cross entropy, which is the logarithm
            of the perplexity.
        batch_tokens: most tokens of a batch; ``prepare`` lowers it if memory runs out.
        reuse: start a candidate at the first block that differs from the incumbent.
        activation_bytes: memory for the incumbent's activations; None: ACTIVATION_BYTES, less on a GPU (see
            cache_bytes).
        ranks: share the batches; each has the model, the data and the database.
        measured: called after each batch of a measurement.
    """

    def __init__(
        self,
        weights: CandidateWeights,
        data: CalibrationSet,
        objective: str = "kl",
        batch_tokens: int = 4096,
        *,
        reuse: bool = True,
        activation_bytes: int | None = None,
        ranks: Ranks = ALONE,
        measured: Callable[[], None] = lambda: None,
    ):
        self._measured = measured
        self.weights, self.data, self.objective, self.ranks = weights, data, objective, ranks
        self.model, self.problem = weights.model, weights.problem
        self.lengths = tuple(len(sample) for sample in data.samples)
        self.forward_tokens = 0
        device = input_device(self.model)
        self._ids = [sample.to(device) for sample in data.samples]
        self._batches = Batches(self.lengths, batch_tokens)
        self._terms: PlainHeadReference | OutputReference | CrossEntropy
        if activation_bytes is None:
            activation_bytes = cache_bytes(device, ACTIVATION_BYTES)
        self._reuse = reuse
        self._prefix = Prefix(self.model, activation_bytes // max(data.tokens, 1) if reuse else 0)
        self._incumbent: Choice | None = None

    @property
    def block_tokens(self) -> int:
        """Tokens times the share of blocks that they went through, summed so far."""
        return self.forward_tokens - self._prefix.saved_tokens

    @torch.no_grad()
    def prepare(self, reference: DenseReference | None = None) -> CandidateLoss:
        """Measure the dense model, which the KL compares with, and find batches that fit into memory.

        ``forward_tokens`` does not count this. Returns itself.

        Args:
            reference: of a prepared loss of the same model, samples and objective, instead of new measurements.

        Raises:
            NumericsError: the dense model's logits are not finite.
            ModelError: a single sample does not fit into memory.
        """
        if reference is not None:
            self._terms, self._batches.tokens = reference.terms, reference.batch_tokens
            if not reference.reuse:
                self._run_all_blocks()
            return self
        self._set(None)
        if self.objective == "kl":
            self._terms = self._run([0], lambda: make_reference(self.model, self._ids))
        else:
            self._terms = CrossEntropy(self.model, self._ids)
        fit = partial(self._batches.fit, lambda group: retried(lambda: self._trial(group), self._release))
        self._batches.tokens = min(self.ranks.gather(fit))  # all ranks have the same batches
        for group in self._batches.of(range(len(self._ids))):
            self._run(group, partial(self._terms.measure_dense, group))
        if self._reuse and not self._run([0], lambda: self._prefix.is_exact(self._ids[0][None])):
            log.info("activations cannot be reused in %s: every candidate runs all blocks", type(self.model))
            self._run_all_blocks()
        return self

    @property
    def reference(self) -> DenseReference:
        """The result of ``prepare``, for another loss."""
        return DenseReference(self._terms, self._batches.tokens, self._reuse)

    def _run_all_blocks(self) -> None:
        """Reuse no activations."""
        self._reuse, self._prefix = False, Prefix(self.model, 0)

    def _trial(self, group: list[int]) -> None:
        """Measure some samples in each way that needs memory, only to see if they fit."""
        self._terms.measure_dense(group)
        self._quality(group)

    def set_incumbent(self, choice: Choice) -> None:
        """Keep the activations of ``choice`` from its next measurement on (see TrueLoss.set_incumbent)."""
        if choice != self._incumbent:
            self._prefix.forget(0 if self._incumbent is None else self._first_difference(choice))
            self._incumbent = choice

    @torch.no_grad()
    def __call__(self, choice: Choice, samples: Sequence[int] | None = None) -> float:
        """Return the mean loss of a choice over the samples (default: all); ``inf`` if it is not a number.

        Raises:
            ModelError: the candidate's weights, or a batch, do not fit into memory.
        """
        self._set(choice)
        first = self._first_difference(choice)
        samples = range(len(self._ids)) if samples is None else samples

        def measure(group: list[int]) -> tuple[float, int]:
            part = self._run(group, lambda: self._measure(group, first, choice == self._incumbent))
            self._measured()
            return part

        parts = self.ranks.map(measure, list(self._batches.of(samples)))
        self.forward_tokens += sum(self.lengths[i] for i in samples)
        loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
        if not math.isfinite(loss):
            names = " ".join(self.problem.menu[k].name for k in choice)
            log.warning("a candidate's loss is not a number; it is rejected: %s", names)
            return math.inf
        return loss

    def _measure(self, group: list[int], first: int, record: bool) -> tuple[float, int]:
        """Return (the summed loss of a batch, its number of positions); with ``record``, keep its activations."""
        with self._prefix.use(group, first, record=record):
            passed = self._terms.forward(group)
        return self._terms.summed(group, passed)

    @torch.no_grad()
    def quality(self) -> tuple[float, float]:
        """Return (KL, perplexity) of the model with its present weights; only for the objective ``kl``."""
        groups = list(self._batches.of(range(len(self._ids))))
        parts = [self._run(group, partial(self._quality, group)) for group in groups]
        kl, positions, cross_entropy, targets = (sum(column) for column in zip(*parts, strict=True))
        mean = cross_entropy / targets
        return kl / positions, math.exp(mean) if mean < 700 else math.inf

    def _quality(self, group: list[int]) -> tuple[float, int, float, int]:
        """Return (summed loss, positions, summed cross entropy, positions) of a batch."""
        passed = self._terms.forward(group)
        cross_entropy = CrossEntropy(self.model, self._ids).summed(group, passed)
        return *self._terms.summed(group, passed), *cross_entropy

    def move_gradients(
        self, choice: Choice, samples: Sequence[int], reach: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the predicted changes of the loss by moves of one unit (see TrueLoss.move_gradients)."""
        layers = [layer.name for layer in self.problem.table.layers]
        self._set(choice, inner_dense=True)
        changes = changes_within(self.weights, choice, reach)
        shape = (len(choice), len(self.problem.menu))

        def measure(number: int) -> tuple[np.ndarray, np.ndarray]:
            i = samples[number]
            loss = partial(self._terms.mean, i)
            gradients = self._run(
                [i],
                lambda: sample_gradients(
                    self.model, self._ids[i], loss, layers, changes, shape, (seed, number)
                ),
            )
            self._measured()
            return gradients

        self.forward_tokens += MOVE_GRADIENT_PASSES * sum(self.lengths[i] for i in samples)
        return stack_samples(self.ranks.map(measure, range(len(samples))))

    def _first_difference(self, choice: Choice) -> int:
        """Return the first block in which the choice differs from the incumbent; a huge number if none does."""
        if self._incumbent is None:
            return 0
        pairs = zip(self.problem.table, self._incumbent, choice, strict=True)
        return min((unit.block for unit, a, b in pairs if a != b), default=1 << 30)

    def _set(self, choice: Choice | None, *, inner_dense: bool = False) -> None:
        """Give the model the weights of a choice (see CandidateWeights.set).

        Raises:
            ModelError: they do not fit into memory beside the model's own.
        """
        with shortage_explained("a candidate's weights do", "offloaded weights"):
            retried(lambda: self.weights.set(choice, inner_dense=inner_dense), self._release)

    def _run(self, group: Sequence[int], work: Callable[[], T]) -> T:
        """Return the result of ``work`` on some samples; if memory runs out, try again after ``_release``."""
        with shortage_explained(self._batches.describe(group), SHORTER):
            return retried(work, self._release)

    def _release(self) -> bool:
        """Drop weights and activations that were kept for later, and keep none from now on; True if there were any."""
        released = any([self._prefix.release(), self.weights.release()])
        if released:
            log.warning("memory is short: weights and activations are no longer kept for later candidates")
        return released


class CrossEntropy:
    """The next-token cross entropy of samples; it needs no dense model."""

    def __init__(self, model: torch.nn.Module, ids: Sequence[torch.Tensor]):
        self.model, self._ids = model, ids

    def measure_dense(self, group: Sequence[int]) -> None:
        """Do nothing: there is no reference."""

    def forward(self, group: Sequence[int]) -> Passed:
        """Return the output of the model with its present weights on some samples."""
        return Passed(self.model(torch.stack([self._ids[i] for i in group]), use_cache=False).logits)

    def summed(self, group: Sequence[int], passed: Passed) -> tuple[float, int]:
        """Return (the cross entropy of some samples in nats, summed over positions in float64, their number)."""
        targets = torch.stack([self._ids[i] for i in group])[:, 1:].flatten()
        return summed_cross_entropy(passed.logits[:, :-1].flatten(0, 1), targets), targets.numel()

    def mean(self, sample: int, logits: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy of a sample's logits [T, V], nats per token, as a node of the graph."""
        return torch.nn.functional.cross_entropy(logits[:-1], self._ids[sample][1:])
