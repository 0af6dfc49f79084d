"""The multiple-choice knapsack with an equality constraint: one step per unit, a sum that is met exactly.

Dynamic programming over the sums (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, section 11.5).
Where there are many sums, it first finds some choice, and then skips each sum through which the linear
relaxation already costs more than that choice (the bound of section 11.2, applied to both sides of every
unit). The result is exact.

Shape legend: U units, K levels, E edges of the units' lower convex hulls.
"""

from __future__ import annotations

import itertools

import numpy as np

#: For each unit, the levels to choose from as (index of the level, step); of equal choices the earlier one
#: wins.
Steps = list[list[tuple[int, int]]]
#: int64[U+1, 2]: the least and the most sum to consider after 0 to U units.
Windows = np.ndarray

#: Up to so many sums over all units, all are considered; about 5 ms.
_UNBOUNDED = 2**21
#: Half the width of the first window around the relaxation's path, in largest steps; each next one is four
#: times as wide.
_FIRST_WIDTH = 0.1


def cheapest(
    steps: Steps, cost: np.ndarray, goal: int, unbounded: int = _UNBOUNDED
) -> tuple[int, ...] | None:
    """Return the choice, int[U], of least cost whose steps sum to ``goal``; None if there is none.

    Of two choices of equal cost, the last unit that differs takes the earlier of its levels.

    Args:
        cost: float64[U, K], finite for every level in ``steps``.
        unbounded: with more sums than this over all units, the relaxation's bounds are used.
    """
    windows = feasible(steps, goal)
    if windows is None:
        return None
    if area(windows) > unbounded:
        relaxed = _Relaxation(steps, cost)
        path, width = relaxed.path(goal), _FIRST_WIDTH * max(step for row in steps for _, step in row)
        while area(narrow := _meet(windows, path - width, path + width)) < area(windows) / 2:
            choice = _dynamic(steps, cost, goal, narrow)
            if choice is not None:
                known = sum(cost[u, k] for u, k in enumerate(choice))
                windows = relaxed.bounded(windows, goal, known)
                if (windows[:, 0] >= narrow[:, 0]).all() and (windows[:, 1] <= narrow[:, 1]).all():
                    return choice
            width *= 4
    return _dynamic(steps, cost, goal, windows)


def feasible(steps: Steps, goal: int) -> Windows | None:
    """Return the windows of all sums from which ``goal`` can be reached; None if it cannot."""
    if not all(steps):
        return None
    least = np.array([min(step for _, step in row) for row in steps], dtype=np.int64)
    most = np.array([max(step for _, step in row) for row in steps], dtype=np.int64)
    low, high = np.append(0, least.cumsum()), np.append(0, most.cumsum())
    first = np.maximum(low, goal - (high[-1] - high))
    last = np.minimum(high, goal - (low[-1] - low))
    return None if (first > last).any() else np.stack([first, last], axis=1)


def area(windows: Windows) -> int:
    """Return the count of sums in all windows; the choice table takes a byte for each."""
    return int((windows[:, 1] - windows[:, 0] + 1).sum())


def _meet(windows: Windows, low: np.ndarray, high: np.ndarray) -> Windows:
    """Return the windows cut to [low, high], float64[U+1] each, which overlap with all windows."""
    first = np.clip(np.floor(low).astype(np.int64), windows[:, 0], windows[:, 1])
    last = np.clip(np.ceil(high).astype(np.int64), windows[:, 0], windows[:, 1])
    return np.stack([first, last], axis=1)


def _dynamic(steps: Steps, cost: np.ndarray, goal: int, windows: Windows) -> tuple[int, ...] | None:
    """Return the cheapest choice whose sums all lie in the windows; None if there is none."""
    best, taken = np.zeros(1), []
    for u, row in enumerate(steps):
        (a, b), (c, d) = windows[u].tolist(), windows[u + 1].tolist()
        new, level = np.full(d - c + 1, np.inf), np.zeros(d - c + 1, dtype=np.uint8)
        for k, step in row:
            first, last = max(a + step, c), min(b + step, d)
            if first > last:
                continue
            candidate = best[first - step - a : last - step - a + 1] + cost[u, k]
            known = new[first - c : last - c + 1]
            better = candidate < known
            np.copyto(known, candidate, where=better)
            np.copyto(level[first - c : last - c + 1], k, where=better)
        best = new
        taken.append(level)
    if not np.isfinite(best[0]):
        return None
    choice = []
    for u in reversed(range(len(steps))):
        k = int(taken[u][goal - windows[u + 1, 0]])
        choice.append(k)
        goal -= dict(steps[u])[k]
    return tuple(reversed(choice))


class _Relaxation:
    """The linear relaxation: a unit may take any step, at the cost on the lower convex hull of its levels.

    Attributes:
        base: float64[U, 2], the least step of each unit and its cost.
        unit, edges: int64[E] and float64[E, 2], the unit of each edge of a hull, and its step and cost, by
            rising slope.
        slack: bound on the rounding error of sums of these costs.
    """

    def __init__(self, steps: Steps, cost: np.ndarray):
        edges = []
        self.base = np.zeros((len(steps), 2))
        for u, row in enumerate(steps):
            hull = _lower_hull([(step, float(cost[u, k])) for k, step in row])
            self.base[u] = hull[0]
            edges += [(u, x1 - x0, y1 - y0) for (x0, y0), (x1, y1) in itertools.pairwise(hull)]
        edges.sort(key=lambda edge: edge[2] / edge[1])
        self.unit = np.array([edge[0] for edge in edges], dtype=np.int64)
        self.edges = np.array([edge[1:] for edge in edges], dtype=np.float64).reshape(-1, 2)
        self.slack = 1e-9 * float(np.abs(self.edges[:, 1]).sum() + np.abs(self.base[:, 1]).sum())

    def path(self, goal: int) -> np.ndarray:
        """Return float64[U+1], the sum after each unit on the relaxation's cheapest path to ``goal``."""
        length = self.edges[:, 0]
        left = goal - self.base[:, 0].sum() - (length.cumsum() - length)
        moved = self.base[:, 0].copy()
        np.add.at(moved, self.unit, np.clip(left, 0, length))
        return np.append(0, moved.cumsum())

    def bounded(self, windows: Windows, goal: int, known: float) -> Windows:
        """Return the windows without the sums through which every relaxed path costs more than ``known``."""
        result = windows.copy()
        for u in range(len(windows)):
            before = self._curve(self.unit < u, slice(0, u))
            after = self._curve(self.unit >= u, slice(u, None))
            at = np.concatenate([before[0], goal - after[0], windows[u]])
            at = np.unique(np.clip(at, *windows[u]))
            least = np.interp(at, *before) + np.interp(goal - at, *after) - known - self.slack
            inside = np.flatnonzero(least <= 0)
            result[u] = _crossings(at, least, inside[0], inside[-1]) if len(inside) else windows[u]
        return _meet(windows, result[:, 0], result[:, 1])

    def _curve(self, edges: np.ndarray, units: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return (sums, costs), the corners of the convex curve of some units' least relaxed cost by sum.

        Args:
            edges: bool[E], the edges of these units.
        """
        start = self.base[units].sum(axis=0)
        corners = start + np.concatenate([np.zeros((1, 2)), self.edges[edges].cumsum(axis=0)])
        return corners[:, 0], corners[:, 1]


def _crossings(at: np.ndarray, height: np.ndarray, first: int, last: int) -> tuple[float, float]:
    """Return the two sums, rounded outwards, where a convex curve crosses zero.

    Args:
        at, height: the corners of the curve.
        first, last: the first and the last corner that is not above zero.
    """
    low, high = at[first], at[last]
    if first > 0:
        low -= (low - at[first - 1]) * height[first] / (height[first] - height[first - 1])
    if last < len(at) - 1:
        high += (at[last + 1] - high) * height[last] / (height[last] - height[last + 1])
    return np.floor(low), np.ceil(high)


def _lower_hull(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the corners of the lower convex hull from left to right (Andrew's monotone chain)."""
    hull: list[tuple[int, float]] = []
    for x, y in sorted(points):
        if hull and hull[-1][0] == x:
            continue
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull
