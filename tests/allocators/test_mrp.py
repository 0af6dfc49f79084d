import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.allocators.base import AllocationInputs
from msp_plugin.allocators.mrp import MRP, next_levels, on_budget, start_choice
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.fractions import parse_sparsity
from msp_plugin.plan.menus import DEFAULT_LEVELS, parse_menu
from msp_plugin.plan.units import Layer, Unit, UnitTable


def problem_of(blocks, levels=DEFAULT_LEVELS, target=0.75, allowed=None):
    units = tuple(
        Unit(f"layers.{b}.{i}", b, (Layer(f"layers.{b}.{i}", *shape),))
        for b, shapes in enumerate(blocks)
        for i, shape in enumerate(shapes)
    )
    return AllocationProblem(UnitTable(units), parse_menu(levels), parse_sparsity(target), allowed)


class Estimate:
    """Outliers of each unit, from a function of the choice; remembers what was measured."""

    def __init__(self, outliers):
        self.outliers, self.seen = outliers, []

    def __call__(self, name, choice):
        assert name == "outliers"
        self.seen.append(choice)
        return np.array(self.outliers(np.array(choice)), dtype=float)


def allocate(problem, estimate, progress=lambda *at: None, **options):
    return MRP(**options).allocate(
        AllocationInputs(problem, {"outliers": None}, {}, None, 0, progress, estimate=estimate)
    )


def test_each_step_prunes_the_most_redundant_block_one_level():
    problem = problem_of([[(8, 64), (4, 64)]] * 4)
    own = np.repeat([0.41, 0.1, 0.33, 0.22], 2)
    estimate = Estimate(lambda choice: own + 0.15 * choice)  # pruning leaves a larger share of outliers
    result = allocate(problem, estimate)
    assert {problem.menu[k].name for k in estimate.seen[0]} == {"5:8"}
    steps = [*estimate.seen, result.choice]
    for before, after in itertools.pairwise(steps):
        scores = own + 0.15 * np.array(before)
        most = int(np.argmin([scores[2 * b] for b in range(4)]))
        expected = list(before)
        expected[2 * most : 2 * most + 2] = [k + 1 for k in before[2 * most : 2 * most + 2]]
        assert list(after) == expected
    assert problem.total_kept(result.choice) == problem.budget.kept
    assert result.evaluations == len(estimate.seen) == 4 * 3
    left = own + 0.15 * np.array(result.choice)
    assert np.ptp(left) < np.ptp(own)  # about equally redundant


def test_blocks_of_equal_redundancy_are_pruned_in_turn():
    problem = problem_of([[(8, 64)]] * 4)
    result = allocate(problem, Estimate(lambda choice: np.full(4, 0.2)))
    assert result.choice == problem.uniform()


def test_the_last_step_is_cut_to_the_budget_by_its_own_block():
    problem = problem_of([[(8, 64), (8, 64)], [(8, 64), (8, 64)]], target="11/16")
    estimate = Estimate(lambda choice: [0.1, 0.1, 0.9, 0.9])
    result = allocate(problem, estimate, start=0.8)
    assert {problem.menu[k].name for k in estimate.seen[0]} == {"4:8"}
    names = [problem.menu[k].name for k in result.choice]
    assert problem.total_kept(result.choice) == problem.budget.kept
    assert names == ["1:8", "1:8", "4:8", "4:8"]
    odd = problem_of([[(8, 64), (8, 64)], [(8, 64), (8, 64)]], target="21/32")
    cut = [
        odd.menu[k].name
        for k in allocate(odd, Estimate(lambda choice: [0.1, 0.1, 0.9, 0.9]), start=0.8).choice
    ]
    assert sorted(cut[:2]) == ["1:8", "2:8"] and cut[2:] == ["4:8", "4:8"]


def test_a_block_at_the_end_of_the_menu_is_passed_over():
    problem = problem_of([[(8, 64)]] * 2, ["dense", "4:8", "2:8"], "5/8")
    estimate = Estimate(lambda choice: [0.0, 1.0])
    result = allocate(problem, estimate, start=0.0)
    assert estimate.seen == [(0, 0), (1, 0), (2, 0)] and result.choice == (2, 1)


def test_bounds_hold_at_the_start_and_at_each_step():
    allowed = np.ones((4, 8), dtype=bool)
    allowed[0, 1:] = False  # dense
    allowed[1, :6] = False  # 2:8 or 1:8
    allowed[2, [4, 5]] = False  # from 5:8 straight to 2:8
    problem = problem_of([[(8, 64)]] * 4, target=0.625, allowed=allowed)
    estimate = Estimate(lambda choice: [0.0, 0.5, 0.1, 0.2])
    result = allocate(problem, estimate)
    assert [problem.menu[k].name for k in estimate.seen[0]] == ["dense", "2:8", "6:8", "6:8"]
    assert all(allowed[range(4), list(choice)].all() for choice in [*estimate.seen, result.choice])
    assert problem.total_kept(result.choice) == problem.budget.kept


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 6), st.sampled_from([24, 48])), min_size=1, max_size=3), min_size=1,
        max_size=4,
    ),
    st.lists(st.sampled_from([*DEFAULT_LEVELS, "2:4", "1:3"]), min_size=1, max_size=5, unique=True),
    st.data(), st.integers(0, 10**6), st.floats(0, 1),
)  # fmt: skip
def test_every_result_is_on_the_budget_and_repeats(blocks, levels, data, seed, start):
    menu = parse_menu(levels)
    target = data.draw(st.fractions(menu[0].sparsity, menu[-1].sparsity, max_denominator=32))
    problem = problem_of(blocks, levels, target)
    noise = np.random.default_rng(seed).random((50, len(problem.table)))
    runs = [
        (
            estimate := Estimate(lambda choice: noise[choice.sum() % 50]),
            allocate(problem, estimate, start=start),
        )
        for _ in range(2)
    ]
    (first, result), (second, again) = runs
    assert problem.total_kept(result.choice) == problem.budget.kept
    assert result == again and first.seen == second.seen and len(set(first.seen)) == len(first.seen)
    kept = [problem.total_kept(choice) for choice in first.seen]
    assert kept == sorted(kept, reverse=True) and all(k > problem.budget.kept for k in kept)


def test_a_start_at_the_target_measures_nothing():
    problem = problem_of([[(8, 64)]] * 3)
    estimate = Estimate(lambda choice: [0.0] * 3)
    assert allocate(problem, estimate, start=1.0).choice == problem.uniform() and not estimate.seen


def test_units_start_at_the_level_below_or_at_their_densest():
    problem = problem_of([[(8, 24)]] * 2, ["6:8", "4:8", "2:4", "2:8"])
    names = [level.name for level in problem.menu]
    assert [names[k] for k in start_choice(problem, 0.5)] == ["4:8", "4:8"]
    assert [names[k] for k in start_choice(problem, 0.1)] == ["6:8", "6:8"]
    assert [names[k] for k in next_levels(problem, (0, 2))] == ["4:8", "2:8"]
    assert next_levels(problem, (3, 3)) == (3, 3)


def test_a_choice_on_the_budget_stays():
    problem = problem_of([[(8, 64)]] * 2)
    assert on_budget(problem, (5, 7), np.array([True, False])) == (5, 7)


def test_a_score_that_is_not_finite_names_its_unit():
    problem = problem_of([[(8, 64)]] * 3)
    with pytest.raises(NumericsError, match="'outliers' of layers.2.0 is nan"):
        allocate(problem, Estimate(lambda choice: [0.1, 0.2, np.nan]))


def test_progress_rises_to_its_total():
    problem, seen = problem_of([[(8, 64)], [(24, 64)]], target=0.7), []
    allocate(problem, Estimate(lambda choice: choice), progress=lambda *at: seen.append(at))
    done, totals = zip(*seen, strict=True)
    assert len(set(totals)) == 1 and list(done) == sorted(done) and done[-1] == totals[0]


@pytest.mark.parametrize("start", [-0.1, 1.1, float("nan")])
def test_a_start_out_of_range_is_refused(start):
    with pytest.raises(RecipeError, match=r"mrp: start = .* is outside \[0, 1\]"):
        MRP(start)


def test_it_asks_for_the_database_and_to_measure_anew():
    assert MRP.needs_database and MRP.remeasures and not MRP.measures and MRP.sensitivities == ("outliers",)
