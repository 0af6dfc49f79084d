"""A local model of the loss: what a search knows of moves of single units around its incumbent.

Shape legend: S samples, U units, K levels.
"""

from __future__ import annotations

import numpy as np

from msp_plugin.allocators.base import Choice

#: One unit at another level: (unit, level).
Move = tuple[int, int]
#: Share of the unpredicted change of a joint move that is charged to a move that was measured by itself, against
#: one that was not.
MEASURED_SHARE = 0.25


class LocalModel:
    """The change of the loss by a move of one unit, to second order, corrected by measurements.

    The cost of a move is the mean of its first-order changes, half the mean square of its curvature samples (see
    TrueLoss.move_gradients), and a correction: the part of measured changes that those two did not predict. Means
    run over rounds, newer ones counting more. A unit that moved starts anew; for the others, earlier rounds still
    say much.

    Args:
        decay: weight of what earlier rounds found, per round. The correction of a move that was measured by itself
            does not decay while its first-order changes go on: newer ones move its cost too.
    """

    def __init__(self, units: int, levels: int, decay: float):
        self.decay = decay
        self.incumbent: Choice = ()
        #: float64[U, K] each: means over rounds, and the mean square of first order and curvature together.
        self.first_order, self.curvature, self.square = np.zeros((3, units, levels))
        self.correction, self.weight = np.zeros((2, units, levels))
        #: bool[U, K]: moves that were measured by themselves since their unit moved last.
        self.measured = np.zeros((units, levels), dtype=bool)

    def add(self, choice: Choice, first_order: np.ndarray, curvature_samples: np.ndarray) -> None:
        """Add the move gradients float64[S, U, K] at ``choice``; NaN and inf say nothing of a level."""
        if self.incumbent:
            moved = np.not_equal(self.incumbent, choice)
            self.weight[moved] = self.correction[moved] = 0.0
            self.measured[moved] = False
        self.incumbent = choice
        known = np.isfinite(first_order) & np.isfinite(curvature_samples)
        first_order = np.where(known, first_order, 0.0)
        curvature = 0.5 * np.where(known, curvature_samples, 0.0) ** 2
        old, new = self.decay * self.weight, known.sum(axis=0)
        total = np.maximum(old + new, 1e-12)
        self.first_order = (old * self.first_order + first_order.sum(axis=0)) / total
        self.curvature = (old * self.curvature + curvature.sum(axis=0)) / total
        self.square = (old * self.square + ((first_order + curvature) ** 2).sum(axis=0)) / total
        self.weight = old + new
        self.correction = np.where(self.measured, 1.0, self.decay) * self.correction

    def cost(self) -> np.ndarray:
        """Return float64[U, K]: the predicted change of the loss, inf where nothing is known."""
        total = self.first_order + self.curvature + self.correction
        cost = np.where((self.weight > 0) & np.isfinite(total), total, np.inf)
        cost[np.arange(len(self.incumbent)), list(self.incumbent)] = 0.0
        return cost

    def deviation(self) -> np.ndarray:
        """Return float64[U, K]: the standard error of :meth:`cost`, from the spread over samples."""
        variance = np.maximum(self.square - (self.first_order + self.curvature) ** 2, 0.0)
        return np.sqrt(variance / np.maximum(self.weight, 1.0))

    def correct_move(self, move: Move, change: float) -> None:
        """Let a move cost the change that it made by itself, until new gradients are added; inf rules it out."""
        self.correction[move] = change - self.first_order[move] - self.curvature[move]
        self.measured[move] = True

    def correct_joint_move(self, choice: Choice, change: float) -> None:
        """Correct the moves from the incumbent to ``choice`` by the change of the loss that they made together.

        The part beyond the prediction is shared out among them in proportion to their terms; those that were
        measured by themselves get less of it.
        """
        rows = np.flatnonzero(np.not_equal(self.incumbent, choice))
        levels = np.array(choice)[rows]
        terms = np.abs(self.first_order[rows, levels]) + self.curvature[rows, levels]
        terms *= np.where(self.measured[rows, levels], MEASURED_SHARE, 1.0)
        beyond = change - self.cost()[rows, levels].sum()
        if np.isfinite(beyond) and terms.sum() > 0:
            self.correction[rows, levels] += beyond * terms / terms.sum()
