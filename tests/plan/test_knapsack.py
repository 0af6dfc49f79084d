import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.plan.knapsack import area, cheapest, feasible


@st.composite
def knapsacks(draw):
    """Steps of up to five units in the solver's order, costs, and a goal that is often met."""
    count, levels = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    largest = draw(st.sampled_from([3, 40, 900]))
    sizes = st.lists(st.integers(0, largest), min_size=levels, max_size=levels)
    rows = [sorted(enumerate(draw(sizes)), key=lambda pair: (pair[1], pair[0])) for _ in range(count)]
    kept = st.lists(st.booleans(), min_size=levels, max_size=levels)
    steps = [[pair for pair, stays in zip(row, draw(kept), strict=True) if stays] for row in rows]
    costs = draw(st.lists(st.integers(-9, 9), min_size=count * levels, max_size=count * levels))
    goal = draw(st.integers(0, count * largest))
    if draw(st.booleans()) and all(steps):
        goal = sum(draw(st.sampled_from(row))[1] for row in steps)
    return steps, np.array(costs, dtype=float).reshape(count, levels), goal


def cost_of(cost, choice):
    return sum(cost[u, k] for u, k in enumerate(choice))


def brute_force(steps, cost, goal):
    """The least cost, None if nothing meets the goal."""
    found = [
        cost_of(cost, [k for k, _ in pairs])
        for pairs in itertools.product(*steps)
        if sum(step for _, step in pairs) == goal
    ]
    return min(found, default=None)


@given(knapsacks(), st.sampled_from([0, 10**9]))
def test_the_choice_is_the_cheapest_of_all_with_bounds_and_without(problem, few):
    steps, cost, goal = problem
    choice, least = cheapest(*problem, unbounded=few), brute_force(*problem)
    assert (choice is None) == (least is None)
    if choice is not None:
        assert sum(dict(steps[u])[k] for u, k in enumerate(choice)) == goal
        assert cost_of(cost, choice) == least


@pytest.mark.parametrize("kind", ["convex", "random", "ties", "pinned"])
@pytest.mark.parametrize("seed", range(6))
def test_bounds_find_the_very_choice_of_the_whole_table(kind, seed):
    rng = np.random.default_rng(seed)
    units, levels = 40, 5
    sizes = np.sort(rng.integers(0, 700, (units, levels)), axis=1)
    cost = {
        "convex": rng.gamma(1, 1, (units, 1)) * (700.0 - sizes) ** 2,
        "random": rng.random((units, levels)),
        "ties": rng.integers(0, 3, (units, levels)).astype(float),
        "pinned": rng.exponential(1, (units, 1)) * (sizes - sizes[:, 2:3]) ** 2.0,
    }[kind]
    steps = [[(k, int(size)) for k, size in enumerate(row)] for row in sizes]
    if kind == "pinned":
        steps[3], steps[9] = steps[3][:1], steps[9][4:]
    goal = int(sizes[:, 2].sum()) + int(rng.integers(-50, 50))
    whole = cheapest(steps, cost, goal, unbounded=10**9)
    assert cheapest(steps, cost, goal, unbounded=0) == whole
    assert sum(int(sizes[u, k]) for u, k in enumerate(whole)) == goal


@given(knapsacks())
def test_no_way_to_the_goal_leaves_the_windows(problem):
    steps, _, goal = problem
    windows, ways = feasible(steps, goal), []
    for pairs in itertools.product(*steps):
        sums = np.append(0, np.cumsum([step for _, step in pairs]))
        if sums[-1] == goal:
            ways.append(sums)
    if windows is None:
        assert not ways
        return
    assert all((windows[:, 0] <= sums).all() and (sums <= windows[:, 1]).all() for sums in ways)
    assert area(windows) == sum(b - a + 1 for a, b in windows.tolist())
    assert windows[0].tolist() == [0, 0] and windows[-1].tolist() == [goal, goal]


def test_a_unit_without_a_level_has_no_choice():
    assert cheapest([[(0, 1)], []], np.zeros((2, 1)), 1) is None
