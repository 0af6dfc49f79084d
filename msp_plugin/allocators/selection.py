"""The best of a search's incumbents, by search text and hold-out together, and what a further round promises."""

from __future__ import annotations

import numpy as np

from msp_plugin.allocators.base import Choice
from msp_plugin.allocators.budgeted_losses import BudgetedLosses

#: Rounds whose mean gain is what the next one promises.
GAIN_ROUNDS = 3


class Selection:
    """The choice that a search would return now, and those that it would have returned before.

    The first choice that is set must be the uniform allocation, which gains are measured from.
    """

    def __init__(self, losses: BudgetedLosses):
        self.losses = losses
        self.best: Choice = ()
        #: (forward tokens, choice) of each choice that was the best.
        self.incumbents: list[tuple[int, Choice]] = []
        #: Selection loss of the best choice after the start and after each round.
        self.history: list[float] = []

    @property
    def uniform(self) -> Choice:
        """The choice that was measured on the hold-out first."""
        return next(iter(self.losses.holdout))

    @property
    def uniform_loss(self) -> float:
        """Selection loss of the uniform allocation."""
        return self.losses.selection_loss(self.uniform)[0]

    def set_best(self, choice: Choice) -> None:
        """Let a choice be the best one; it is measured on the hold-out."""
        self.best = choice
        self.losses.holdout_loss(choice)
        self.incumbents.append((self.losses.forward_tokens, choice))

    def update(self, incumbent: Choice) -> bool:
        """Measure the incumbent on the hold-out; return True if it is the best choice now."""
        losses = self.losses
        losses.holdout_loss(incumbent)
        if better := losses.selection_loss(incumbent) < losses.selection_loss(self.best):
            self.set_best(incumbent)
        self.history.append(losses.selection_loss(self.best)[0])
        return better

    def promised_gain(self) -> float:
        """Return the gain that the next round promises, as a share of the gain over uniform; inf if nobody knows.

        It is the mean gain of the last GAIN_ROUNDS rounds.
        """
        history = self.history
        if len(history) <= GAIN_ROUNDS:
            return np.inf
        total, last = self.uniform_loss - history[-1], history[-1 - GAIN_ROUNDS] - history[-1]
        # rounds that gained nothing are counted by patience
        return last / GAIN_ROUNDS / total if total > 0 < last and np.isfinite(total) else np.inf
