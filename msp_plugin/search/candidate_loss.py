"""The loss of candidates on a model.

Shape legend: B samples, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch

from msp_plugin.allocators.base import Choice
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import NumericsError
from msp_plugin.models.offload import input_device, onloaded
from msp_plugin.passes.losses import likely_tokens, summed_cross_entropy, summed_exponentials, summed_kl
from msp_plugin.passes.prefix import Prefix, last_outputs, run_tail, tail_is_exact
from msp_plugin.runtime.memory import (
    Part,
    cache_bytes,
    free_cached,
    in_parts,
    is_out_of_memory,
    short_of_memory,
)
from msp_plugin.runtime.ranks import ALONE, Ranks
from msp_plugin.search.candidate_weights import CandidateWeights
from msp_plugin.search.move_gradients import FORWARD_EQUIVALENT, measure_slopes

log = logging.getLogger(__name__)

#: Activations of the kept choice held in memory.
ACTIVATION_BYTES = 4 * 1024**3
#: Batches come in multiples of this: one, two, four or eight ranks get as many each.
SHARES = 8


@dataclass(frozen=True)
class _Reference:
    """What the KL to the dense model needs of one sample.

    ``kept`` is the dense input of the head where the head is a plain linear; else the output of the last block
    where the model makes the same logits of it again, e.g. if it scales or caps them; else the logits. With a plain
    head no dense logits are made again. With h the input of the head, z the logits, p the dense model's probabilities,
    K its likeliest tokens and w_v the rows of the head,
    KL_t = logsumexp z_t - logsumexp z_t(dense) - sum_{v in K} p_tv (z_tv - z_tv(dense)) - (h_t - h_t(dense)) . e_t,
    e_t = sum_{v not in K} p_tv w_v; a bias of the head cancels. The likely tokens come from the logits, because in 16
    bits these are rounded, in the logsumexp as well; over the many others the rounding averages out.
    """

    kept: torch.Tensor
    logsumexp: torch.Tensor | None = None
    expected: torch.Tensor | None = None
    likely: torch.Tensor | None = None
    shares: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class CandidateLoss:
    """The mean loss of a choice over samples of text, nats per token.

    ``kl``: KL(dense || candidate); ``perplexity``: the next-token cross entropy, the logarithm of the
    perplexity. The model holds the last candidate's weights until the next one.

    Args:
        weights: an entered CandidateWeights.
        reuse: run a candidate from the first block that differs from the kept choice.
        activation_bytes: of the kept choice's activations; None: ACTIVATION_BYTES, or what memory.cache_bytes gives.
        ranks: share the batches; each has the model, the data and the database.
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
    ):
        self.weights, self.data, self.objective, self.ranks = weights, data, objective, ranks
        self.model, self.problem = weights.model, weights.problem
        self.batch_tokens = batch_tokens
        self.lengths = tuple(len(sample) for sample in data.samples)
        self.forward_tokens = 0
        self._ids = [s.to(input_device(self.model)) for s in data.samples]
        self._head: torch.nn.Module | None = None
        #: True if logits are made of the last block's output again.
        self._tail = False
        self._reference: list[_Reference] = []
        if activation_bytes is None:
            activation_bytes = cache_bytes(input_device(self.model), ACTIVATION_BYTES)
        self._prefix = Prefix(self.model, activation_bytes // max(data.tokens, 1)) if reuse else None
        self._kept: Choice | None = None
        #: Tokens of a batch that fit into memory; batches stay as they are, so that ranks have the same ones.
        self._fits = max(batch_tokens, *self.lengths)
        self._halved = False

    @property
    def block_tokens(self) -> int:
        """Tokens times the share of the blocks that they really went through, so far."""
        return self.forward_tokens - (self._prefix.saved_tokens if self._prefix else 0)

    @torch.no_grad()
    def prepare(self) -> CandidateLoss:
        """Measure the dense model, which the KL compares with; not counted in ``forward_tokens``.

        Raises:
            NumericsError: its logits are not finite.
        """
        self._set(None)
        if self.objective == "kl":
            (self._head,) = self._fitting([0], lambda _: self._plain_head())
            if self._head is None:
                (self._tail,) = self._fitting([0], lambda _: tail_is_exact(self.model, self._ids[0][None]))
            self._reference = [None] * len(self._ids)  # type: ignore[list-item]
            for group in self._batches(range(len(self._ids))):
                self._fitting(group, self._prepare)
        prefix = self._prefix
        if prefix is not None and not self._fitting([0], lambda _: prefix.is_exact(self._ids[0][None]))[0]:
            log.info("activations cannot be reused in %s: every candidate runs all blocks", type(self.model))
            self._prefix = None
        return self

    def _prepare(self, group: list[int]) -> None:
        with last_outputs(self.model) as outputs:
            hidden, logits = self._forward(group)
        if self._tail:
            hidden = outputs[0]
        if not torch.isfinite(logits).all():
            raise NumericsError(
                "the dense model's logits on the search text are not finite",
                hint="the activations overflow: try dtype float32",
            )
        with nullcontext() if self._head is None else onloaded(self._head):
            for row, i in enumerate(group):
                self._reference[i] = self._refer(None if hidden is None else hidden[row], logits[row])

    def set_incumbent(self, choice: Choice) -> None:
        """Keep the activations of ``choice`` from its next measurement on (see TrueLoss.set_incumbent)."""
        if self._prefix is not None and choice != self._kept:
            self._prefix.forget(0 if self._kept is None else self._first_difference(choice))
            self._kept = choice

    @torch.no_grad()
    def __call__(self, choice: Choice, samples: Sequence[int] | None = None) -> float:
        """Return the mean loss of a choice over the samples (default: all); ``inf`` if it is not a number."""
        self._set(choice)
        first = self._first_difference(choice)
        samples = range(len(self._ids)) if samples is None else samples

        def measure(group: list[int]) -> list[tuple[float, int]]:
            return self._fitting(group, lambda some: self._measure(some, first, choice))

        found = [part for parts in self.ranks.spread(list(self._batches(samples)), measure) for part in parts]
        self.forward_tokens += sum(self.lengths[i] for i in samples)
        loss = sum(part for part, _ in found) / sum(count for _, count in found)
        if not math.isfinite(loss):
            log.warning("a candidate's loss is not a number; it is rejected: %s", self._describe(choice))
            return math.inf
        return loss

    def _measure(self, group: list[int], first: int, choice: Choice) -> tuple[float, int]:
        if self._prefix is None or self._kept is None:
            return self._loss(group, *self._forward(group))
        with self._prefix.use(group, first, record=choice == self._kept):
            hidden, logits = self._forward(group)
        return self._loss(group, hidden, logits)

    def _set(self, choice: Choice | None) -> None:
        """Let the model hold the weights of a choice.

        Raises:
            ModelError: they do not fit beside the model's own.
        """
        try:
            self._relieved(lambda: self.weights.set(choice))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise short_of_memory("a candidate's weights do", "offloaded weights", error) from error

    def _relieved(self, work: Callable[[], Part]) -> Part:
        """Return what ``work`` does; where memory does not suffice, after letting go of what is held for later.

        That is pruned weights and activations, and none are held any more then.
        """
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or not self._hold_nothing():
                raise
        free_cached()  # here, where no traceback holds the tensors of what failed
        return work()

    def _hold_nothing(self) -> bool:
        activations = self._prefix is not None and self._prefix.holds
        if activations:
            self._prefix = None
        if held := self.weights.hold_nothing() or activations:
            log.warning("memory is short: no weights or activations are held for later candidates any more")
        return held

    def _fitting(self, group: list[int], measure: Callable[[list[int]], Any]) -> list[Any]:
        """Return what ``measure`` gives for a batch, or for the parts of it that fit into memory, then and later.

        Raises:
            ModelError: a single sample does not fit.
        """
        length = self.lengths[group[0]]
        size = max(1, min(len(group), self._fits // length))
        found: list[Any] = []
        for first in range(0, len(group), size):
            batch = group[first : first + size]
            parts = in_parts(lambda some: self._relieved(lambda: measure(some)), batch, length)
            found += parts
            if len(parts) > 1:
                self._fits = -(-len(batch) // len(parts)) * length
                if not self._halved:
                    log.warning(
                        "%d samples of %d tokens do not fit into memory at once, %d do: losses may differ by "
                        "rounding from those of a run with more memory",
                        len(batch), length, self._fits // length,
                    )  # fmt: skip
                self._halved = True
        return found

    @torch.no_grad()
    def quality(self) -> tuple[float, float]:
        """Return (KL, perplexity) of the weights that the model holds, whatever they are; for ``kl`` only."""
        kl = cross_entropy = 0.0
        positions = targets = 0
        for group in self._batches(range(len(self._ids))):
            for part, count, more, asked in self._fitting(group, self._qualities):
                kl, positions = kl + part, positions + count
                cross_entropy, targets = cross_entropy + more, targets + asked
        mean = cross_entropy / targets
        return kl / positions, math.exp(mean) if mean < 700 else math.inf

    def _qualities(self, group: list[int]) -> tuple[float, int, float, int]:
        hidden, logits = self._forward(group)
        ids = torch.stack([self._ids[i] for i in group])
        more = summed_cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return *self._loss(group, hidden, logits), more, ids[:, 1:].numel()

    def move_gradients(
        self, choice: Choice, samples: Sequence[int], reach: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return how the loss changes when one unit moves by up to ``reach`` levels (see TrueLoss.move_gradients)."""
        self._set(choice)
        units = {layer.name: u for u, unit in enumerate(self.problem.table) for layer in unit.layers}

        def changes(layer: str) -> tuple[int, dict[int, torch.Tensor]]:
            u = units[layer]
            now = self.weights.weight(layer, self.problem.menu[choice[u]].name)
            near = range(max(0, choice[u] - reach), min(len(self.problem.menu), choice[u] + reach + 1))
            return u, {
                k: self.weights.weight(layer, self.problem.menu[k].name) - now for k in near if k != choice[u]
            }

        def loss(number: int, logits: torch.Tensor) -> torch.Tensor:
            return self._graph_loss(samples[number], logits)

        def measure(number: int) -> tuple[np.ndarray, np.ndarray]:
            return measure_slopes(
                self.model, list(units), [self._ids[samples[number]]], lambda _, logits: loss(number, logits),
                changes, (len(choice), len(self.problem.menu)), _generator(seed, number),
            )  # fmt: skip

        def alone(number: int) -> tuple[np.ndarray, np.ndarray]:
            length = self.lengths[samples[number]]
            return in_parts(lambda some: self._relieved(lambda: measure(*some)), [number], length)[0]

        self.forward_tokens += FORWARD_EQUIVALENT * sum(self.lengths[i] for i in samples)
        parts = self.ranks.spread(range(len(samples)), alone)
        slopes, draws = (np.concatenate(found) for found in zip(*parts, strict=True))
        # Where a sample does not reach a unit that others do, e.g. an expert, its loss does not change.
        missed, asked = np.isnan(slopes).all(axis=2), ~np.isnan(slopes).all(axis=0)
        slopes[missed[:, :, None] & asked] = draws[missed[:, :, None] & asked] = 0.0
        return slopes, draws

    def _graph_loss(self, i: int, logits: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a sample's logits [T, V] as a node of the graph."""
        if self.objective != "kl":
            return torch.nn.functional.cross_entropy(logits[:-1], self._ids[i][1:])
        return torch.nn.functional.kl_div(
            logits.log_softmax(-1), self._dense_logp(i), reduction="sum", log_target=True
        ) / len(logits)

    def _describe(self, choice: Choice) -> str:
        return " ".join(self.problem.menu[k].name for k in choice)

    def _first_difference(self, choice: Choice) -> int:
        """Return the first block in which the choice differs from the kept one; beyond all if none does."""
        if self._kept is None:
            return 0
        pairs = zip(self.problem.table, self._kept, choice, strict=True)
        return min((unit.block for unit, a, b in pairs if a != b), default=1 << 30)

    def _batches(self, samples: Sequence[int]) -> Iterator[list[int]]:
        """Yield groups of neighbouring samples of equal length, of ``batch_tokens`` at most if they can.

        Their number is a multiple of SHARES where there are as many samples, and their sizes differ by one at
        most, so that ranks get equal shares. It does not depend on how many ranks there are.
        """
        for length, run in groupby(samples, key=lambda i: self.lengths[i]):
            same = list(run)
            least = -(-len(same) // max(1, self.batch_tokens // length))
            count = min(len(same), -(-least // SHARES) * SHARES)
            ends = [len(same) * n // count for n in range(count + 1)]
            yield from (same[a:b] for a, b in pairwise(ends))

    def _forward(self, group: list[int]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return (input of the head [B, T, D] where it is plain, logits [B, T, V])."""
        ids = torch.stack([self._ids[i] for i in group])
        with _head_input(self.model, self._head) as seen:
            logits = self.model(ids, use_cache=False).logits
        return (seen[0] if seen else None), logits

    def _plain_head(self) -> torch.nn.Module | None:
        """Return the output head if the logits are its output and nothing more."""
        head = self.model.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear):
            return None
        with _head_input(self.model, head) as seen:
            logits = self.model(self._ids[0][None], use_cache=False).logits
        return head if seen and torch.equal(head(seen[0]), logits) else None

    def _refer(self, hidden: torch.Tensor | None, logits: torch.Tensor) -> _Reference:
        if self._head is None:
            return _Reference((hidden if self._tail else logits).clone())
        likely, shares, expected = likely_tokens(logits, self._head.weight)
        own = logits.gather(-1, likely)
        return _Reference(hidden.clone(), summed_exponentials(logits), expected, likely, shares, own)

    def _dense_logp(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            return self._logits(self._reference[i].kept[None])[0].float().log_softmax(-1)

    def _logits(self, kept: torch.Tensor) -> torch.Tensor:
        """Return the dense logits [B, T, V] of what was kept of them."""
        if self._tail:
            return run_tail(self.model, kept)
        return kept if self._head is None else self._head(kept)

    def _loss(self, group: list[int], hidden: torch.Tensor | None, logits: torch.Tensor) -> tuple[float, int]:
        """Return the summed loss of a batch and the count of positions that it sums over."""
        if self.objective != "kl":
            ids = torch.stack([self._ids[i] for i in group])
            return (
                summed_cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
                ids[:, 1:].numel(),
            )
        references = [self._reference[i] for i in group]
        if references[0].expected is not None:
            expected, shares = (
                torch.stack([getattr(r, n) for r in references]) for n in ("expected", "shares")
            )
            moved = hidden.float() - torch.stack([r.kept for r in references]).float()
            own = logits.gather(-1, torch.stack([r.likely for r in references])).float()
            own -= torch.stack([r.logits for r in references]).float()
            grown = summed_exponentials(logits) - torch.stack([r.logsumexp for r in references])
            kl = grown.double() - (shares * own).sum(-1, dtype=torch.float64)
            kl -= (moved * expected).sum(-1, dtype=torch.float64)
            return float(kl.sum()), kl.numel()
        dense = self._logits(torch.stack([r.kept for r in references]))
        return summed_kl(dense.flatten(0, 1), logits.flatten(0, 1)), logits[..., 0].numel()


def _generator(seed: int, number: int) -> torch.Generator:
    """Return the generator of one sample's labels: it does not depend on who measures the others."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, number)).generate_state(1)[0]))


@contextmanager
def _head_input(model: torch.nn.Module, head: torch.nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """Yield a list that receives the input of the output head in each forward pass."""
    seen: list[torch.Tensor] = []
    if head is None:
        yield seen
        return
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
