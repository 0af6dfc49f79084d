"""Losses of a search's candidates, each measured once, within a budget of forward tokens and seconds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from msp_plugin.allocators.base import AllocationInputs, Choice, SpentError


class BudgetedLosses:
    """The losses that a search measured so far, in nats per token.

    Args:
        max_tokens: most forward tokens, over search text and hold-out; 0 sets no limit.
        seconds: after which nothing more is measured; 0 sets no limit.
        report: called after each measurement.
    """

    def __init__(self, inputs: AllocationInputs, max_tokens: int, seconds: float, report: Callable[[], None]):
        self.inputs, self.max_tokens, self.seconds, self._report = inputs, max_tokens, seconds, report
        self.began = inputs.clock() if seconds else 0.0
        #: On the whole search text; on some of its samples; on the hold-out.
        self.search: dict[Choice, float] = {}
        self.screening: dict[tuple[Choice, tuple[int, ...]], float] = {}
        self.holdout: dict[Choice, float] = {}
        self.single_moves = 0
        #: (forward tokens, loss): whenever the search loss fell; whenever the hold-out loss was measured.
        self.curve: list[tuple[int, float]] = []
        self.holdout_curve: list[tuple[int, float]] = []

    @property
    def forward_tokens(self) -> int:
        """Forward tokens of all measurements so far, move gradients included."""
        holdout = self.inputs.holdout
        return self.inputs.true_loss.forward_tokens + (holdout.forward_tokens if holdout else 0)

    @property
    def evaluations(self) -> int:
        """Candidates measured so far."""
        return len(self.search) + len(self.screening) + self.single_moves

    def tokens(self, samples: tuple[int, ...]) -> int:
        """Return the tokens of some samples of the search text."""
        return sum(self.inputs.true_loss.lengths[i] for i in samples)

    def draw_samples(self, share: float, rng: np.random.Generator) -> tuple[int, ...]:
        """Return the numbers of a random share of the search text's samples, one at least, sorted."""
        count = len(self.inputs.true_loss.lengths)
        take = max(1, min(count, round(share * count)))
        return tuple(int(i) for i in np.sort(rng.choice(count, take, replace=False)))

    def check_budget(self, tokens: int) -> None:
        """Raise SpentError if the budget does not allow a measurement of so many forward tokens."""
        if self.max_tokens and self.forward_tokens + tokens > self.max_tokens:
            raise SpentError
        if self.seconds and self.inputs.clock() - self.began >= self.seconds:
            raise SpentError

    def search_loss(self, choice: Choice, *, free: bool = False) -> float:
        """Return the loss on the whole search text; a new best becomes a point of the curve.

        Samples that the choice was measured on are not measured again, where all have one length: then the mean of
        both parts is exact.

        Args:
            free: measure it whatever the budget says.
        """
        if choice not in self.search:
            lengths = self.inputs.true_loss.lengths
            done = (on for by, on in self.screening if by == choice and len(set(lengths)) == 1)
            known = max(done, key=len, default=())
            rest = tuple(i for i in range(len(lengths)) if i not in known)
            if not free:
                self.check_budget(self.tokens(rest))
            best = min(self.search.values(), default=np.inf)
            loss = self.inputs.true_loss(choice, rest if known else None)
            if known:
                loss = (self.screening[choice, known] * len(known) + loss * len(rest)) / len(lengths)
            self.search[choice] = loss
            if self.search[choice] < best:
                self.curve.append((self.forward_tokens, self.search[choice]))
            self._report()
        return self.search[choice]

    def screening_loss(self, choice: Choice, samples: tuple[int, ...]) -> float:
        """Return the loss on some samples of the search text."""
        if len(samples) == len(self.inputs.true_loss.lengths):
            return self.search_loss(choice)
        if (choice, samples) not in self.screening:
            self.check_budget(self.tokens(samples))
            self.screening[choice, samples] = self.inputs.true_loss(choice, samples)
            self._report()
        return self.screening[choice, samples]

    def single_move_loss(self, choice: Choice, samples: tuple[int, ...]) -> float:
        """Return the loss on some samples of a choice that need not keep the budget of weights."""
        self.check_budget(self.tokens(samples))
        loss = self.inputs.true_loss(choice, samples)
        self.single_moves += 1
        self._report()
        return loss

    def holdout_loss(self, choice: Choice, *, free: bool = False) -> float:
        """Return the loss on the hold-out, on the search text where there is none."""
        if choice not in self.holdout:
            holdout = self.inputs.holdout
            if holdout and not free:
                self.check_budget(sum(holdout.lengths))
            self.holdout[choice] = holdout(choice) if holdout else self.search_loss(choice)
            self.holdout_curve.append((self.forward_tokens, self.holdout[choice]))
            self._report()
        return self.holdout[choice]

    def selection_loss(self, choice: Choice) -> tuple[float, float]:
        """Return the mean loss per token over search text and hold-out, then that over search text alone.

        The second decides where the first cannot: where no choice has a finite loss on the hold-out.
        """
        search, holdout = self.search_loss(choice), self.holdout_loss(choice)
        tokens = sum(self.inputs.true_loss.lengths)
        more = sum(self.inputs.holdout.lengths) if self.inputs.holdout else 0
        mean = (search * tokens + holdout * more) / (tokens + more) if np.isfinite(holdout) else np.inf
        return mean, search
