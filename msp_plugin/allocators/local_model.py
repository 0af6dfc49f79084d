"""What a search knows of single moves around its incumbent.

Shape legend: S samples, U units, K levels.
"""

from __future__ import annotations

import numpy as np

from msp_plugin.allocators.base import Choice

#: One unit at another level.
Move = tuple[int, int]
#: Share that a move measured alone takes of what was unexpected of moves together, against one that was not.
MEASURED_SHARE = 0.25


class LocalModel:
    """The change of the loss by a move of one unit, to second order, corrected by what was measured.

    A move's cost is the mean of its slopes, half the mean square of its draws (see TrueLoss.slopes), and its
    surprise: what measurements were beyond that. Means run over rounds, newer ones counting more; a unit that
    moved starts anew, for the others what the last rounds found still says much.

    Args:
        decay: weight of what earlier rounds found, per round. The surprise of a move that was measured alone
            stays whole while its slopes go on: newer ones move its cost too.
    """

    def __init__(self, units: int, levels: int, decay: float):
        self.decay = decay
        self.at: Choice | None = None
        self.linear, self.quadratic, self.square = np.zeros((3, units, levels))
        self.surprise, self.weight = np.zeros((2, units, levels))
        #: Moves that were measured alone since their unit moved last.
        self.alone = np.zeros((units, levels), dtype=bool)

    def add(self, choice: Choice, slopes: np.ndarray, draws: np.ndarray) -> None:
        """Add slopes and draws float64[S, U, K], taken at ``choice``; NaN and inf say nothing of a level."""
        if self.at is not None:
            moved = np.not_equal(self.at, choice)
            self.weight[moved] = self.surprise[moved] = 0.0
            self.alone[moved] = False
        self.at = choice
        known = np.isfinite(slopes) & np.isfinite(draws)
        slopes, curvature = np.where(known, slopes, 0.0), 0.5 * np.where(known, draws, 0.0) ** 2
        old, new = self.decay * self.weight, known.sum(axis=0)
        total = np.maximum(old + new, 1e-12)
        self.linear = (old * self.linear + slopes.sum(axis=0)) / total
        self.quadratic = (old * self.quadratic + curvature.sum(axis=0)) / total
        self.square = (old * self.square + ((slopes + curvature) ** 2).sum(axis=0)) / total
        self.weight = old + new
        self.surprise = np.where(self.alone, 1.0, self.decay) * self.surprise

    def cost(self) -> np.ndarray:
        """Return float64[U, K]: the predicted change of the loss, inf where nothing is known."""
        total = self.linear + self.quadratic + self.surprise
        cost = np.where((self.weight > 0) & np.isfinite(total), total, np.inf)
        cost[np.arange(len(self.at)), list(self.at)] = 0.0
        return cost

    def deviation(self) -> np.ndarray:
        """Return float64[U, K]: the standard error of :meth:`cost`, from the spread over samples."""
        variance = np.maximum(self.square - (self.linear + self.quadratic) ** 2, 0.0)
        return np.sqrt(variance / np.maximum(self.weight, 1.0))

    def learn_alone(self, move: Move, change: float) -> None:
        """Take in what a move changes that was measured alone: its cost is that until new slopes; inf rules it out."""
        self.surprise[move] = change - self.linear[move] - self.quadratic[move]
        self.alone[move] = True

    def learn(self, choice: Choice, change: float) -> None:
        """Take in that the moves from the incumbent to ``choice`` changed the loss by ``change``, together.

        What they did beyond the prediction is shared out among them in proportion to their terms; those that
        were measured alone get less of it.
        """
        rows = np.flatnonzero(np.not_equal(self.at, choice))
        levels = np.array(choice)[rows]
        terms = np.abs(self.linear[rows, levels]) + self.quadratic[rows, levels]
        terms *= np.where(self.alone[rows, levels], MEASURED_SHARE, 1.0)
        beyond = change - self.cost()[rows, levels].sum()
        if np.isfinite(beyond) and terms.sum() > 0:
            self.surprise[rows, levels] += beyond * terms / terms.sum()
