import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msp_plugin.errors import BudgetError
from msp_plugin.plan.budget import AllocationProblem, Budget
from msp_plugin.plan.levels import DEFAULT_LEVELS, parse_menu
from msp_plugin.plan.units import Layer, Unit, UnitTable

LEVELS = [*DEFAULT_LEVELS, "2:4", "1:4", "1:2", "1:3", "2:3", "5:6"]


@st.composite
def problems(draw):
    menu = parse_menu(draw(st.lists(st.sampled_from(LEVELS), min_size=1, max_size=4, unique=True)))
    units = []
    for u in range(draw(st.integers(1, 4))):
        shapes = draw(
            st.lists(st.tuples(st.integers(1, 5), st.sampled_from([24, 48, 72])), min_size=1, max_size=2)
        )
        layers = tuple(Layer(f"{u}.{i}", out, width) for i, (out, width) in enumerate(shapes))
        units.append(Unit(str(u), u, layers))
    target = draw(st.fractions(0, Fraction(15, 16), max_denominator=48))
    return AllocationProblem(UnitTable(tuple(units)), menu, target)


def choices(problem):
    return itertools.product(range(len(problem.menu)), repeat=len(problem.table))


def naive_kept(problem, choice):
    return sum(
        layer.out_features * layer.in_features * problem.menu[k].n // problem.menu[k].m
        for unit, k in zip(problem.table, choice, strict=True)
        for layer in unit.layers
    )


def within_reach(problem):
    kept = [naive_kept(problem, choice) for choice in choices(problem)]
    return min(kept) <= (1 - problem.target) * problem.table.weights <= max(kept)


@given(problems())
@settings(max_examples=150)
def test_the_budget_is_the_reachable_count_nearest_to_the_target_and_ties_are_sparser(problem):
    kept = sorted({naive_kept(problem, choice) for choice in choices(problem)})
    wanted = (1 - problem.target) * problem.table.weights
    if kept[0] <= wanted <= kept[-1]:
        expected = min(kept, key=lambda count: (abs(count - wanted), count))
        assert problem.budget == Budget(problem.target, problem.table.weights, expected)
        assert problem.budget.exact == (expected == wanted)
        assert problem.budget.zeros == problem.table.weights - expected
        assert problem.budget.sparsity == 1 - Fraction(expected, problem.table.weights)
    else:
        with pytest.raises(BudgetError, match="out of reach"):
            _ = problem.budget


@given(problems(), st.data())
@settings(max_examples=200)
def test_solve_is_the_cheapest_of_all_choices_on_the_budget(problem, data):
    if not within_reach(problem):
        return
    shape = (len(problem.table), len(problem.menu))
    values = data.draw(
        st.lists(st.one_of(st.integers(0, 50), st.just(np.inf)), min_size=shape[0] * shape[1],
                 max_size=shape[0] * shape[1])
    )  # fmt: skip
    cost = np.array(values, dtype=np.float64).reshape(shape)
    on_budget = [
        sum(cost[u, k] for u, k in enumerate(choice))
        for choice in choices(problem)
        if naive_kept(problem, choice) == problem.budget.kept
    ]
    if min(on_budget) == np.inf:
        with pytest.raises(BudgetError, match="exactly"):
            problem.solve(cost)
        return
    choice = problem.solve(cost)
    assert naive_kept(problem, choice) == problem.total_kept(choice) == problem.budget.kept
    assert sum(cost[u, k] for u, k in enumerate(choice)) == min(on_budget)


@given(problems(), st.data())
def test_repair_is_the_nearest_of_all_choices_on_the_budget(problem, data):
    if not within_reach(problem):
        return
    count = len(problem.table)
    wish = np.array(data.draw(st.lists(st.floats(0, 1), min_size=count, max_size=count)))
    give_way = np.array(data.draw(st.lists(st.floats(0.1, 10), min_size=count, max_size=count)))

    def distance(choice):
        return sum(
            give_way[u] * unit.weights * (float(1 - problem.menu[k].sparsity) - wish[u]) ** 2
            for u, (unit, k) in enumerate(zip(problem.table, choice, strict=True))
        )

    best = min(distance(c) for c in choices(problem) if naive_kept(problem, c) == problem.budget.kept)
    choice = problem.repair(wish, give_way)
    assert naive_kept(problem, choice) == problem.budget.kept
    assert distance(choice) == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_a_unit_that_gives_way_easily_moves_first(make_problem):
    problem = make_problem([(4, 8)] * 2, ["dense", "4:8"], 0.25)
    assert problem.repair(np.ones(2), np.array([1.0, 2.0])) == (1, 0)
    assert problem.repair(np.ones(2), np.array([2.0, 1.0])) == (0, 1)


@pytest.mark.parametrize("level", DEFAULT_LEVELS)
def test_uniform_is_the_level_itself_where_it_exists(make_problem, level):
    sparsity = parse_menu([level])[0].sparsity
    problem = make_problem([(3, 8), (7, 64), (5, 16)], DEFAULT_LEVELS, sparsity)
    assert {problem.menu[k].name for k in problem.uniform()} == {level}
    assert problem.budget.exact


def test_uniform_of_two_levels_with_one_sparsity_is_the_freer_one(make_problem):
    problem = make_problem([(3, 8), (7, 64)], ["dense", "2:4", "4:8"], 0.5)
    assert {problem.menu[k].name for k in problem.uniform()} == {"4:8"}


@given(problems())
def test_uniform_is_on_the_budget(problem):
    if within_reach(problem):
        assert naive_kept(problem, problem.uniform()) == problem.budget.kept


@pytest.mark.parametrize("target", [0.2, 0.76])
def test_a_target_out_of_reach_names_the_levels_and_their_range(make_problem, target):
    problem = make_problem([(4, 8), (2, 16)], ["6:8", "2:8", "4:8"], target)
    with pytest.raises(BudgetError) as error:
        _ = problem.budget
    assert f"sparsity {target:g} is out of reach" in error.value.message
    assert "6:8, 4:8, 2:8 reach 0.25 to 0.75" in error.value.message
    assert "add sparser or denser levels" in error.value.hint


def test_forbidden_levels_without_a_way_out_name_the_budget(make_problem):
    problem = make_problem([(4, 8), (4, 8)], ["dense", "4:8"], 0.25)
    with pytest.raises(BudgetError, match="exactly 48 weights") as error:
        problem.solve(np.array([[0.0, np.inf], [0.0, np.inf]]))
    assert "allow more levels" in error.value.hint


def test_sizes_without_a_common_factor_are_refused_before_the_memory_is_full(make_problem):
    problem = make_problem([(10**9 + 7, 8), (10**9 + 9, 8)], ["dense", "1:8"], 0.5)
    with pytest.raises(BudgetError, match="no large factor") as error:
        _ = problem.budget
    assert "same M" in error.value.hint


def test_an_8b_model_meets_its_budget_to_the_weight():
    fused = {"qkv": [(4096, 4096), (1024, 4096), (1024, 4096)], "o": [(4096, 4096)],
             "gate_up": [(14336, 4096)] * 2, "down": [(4096, 14336)]}  # fmt: skip
    units = [
        Unit(f"{b}.{name}", b, tuple(Layer(f"{b}.{name}.{i}", *shape) for i, shape in enumerate(shapes)))
        for b in range(32)
        for name, shapes in fused.items()
    ]
    problem = AllocationProblem(UnitTable(tuple(units)), parse_menu(DEFAULT_LEVELS), Fraction(7, 10))
    rng = np.random.default_rng(0)
    choice = problem.solve(rng.random((len(units), 8)))
    assert naive_kept(problem, choice) == problem.budget.kept
    assert abs(problem.budget.sparsity - Fraction(7, 10)) < Fraction(1, 10000)
