import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.errors import BudgetError
from msp_plugin.plan.budget import AllocationProblem, Budget
from msp_plugin.plan.menus import DEFAULT_LEVELS, parse_menu
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
    rows = st.lists(st.booleans(), min_size=len(menu), max_size=len(menu)).filter(any)
    masks = st.one_of(st.none(), st.lists(rows, min_size=len(units), max_size=len(units)))
    return AllocationProblem(UnitTable(tuple(units)), menu, target, draw(masks))


def choices(problem):
    levels = range(len(problem.menu))
    rows = [
        [k for k in levels if problem.allowed is None or problem.allowed[u, k]]
        for u in range(len(problem.table))
    ]
    return itertools.product(*rows)


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
        least, most = (1 - Fraction(count, problem.table.weights) for count in (kept[-1], kept[0]))
        with pytest.raises(BudgetError, match="out of reach") as error:
            _ = problem.budget
        said = error.value.message.rpartition(" reach ")[2].split(" to ")
        assert [Fraction(share.split(" (")[0]) for share in said] == [least, most]


@given(problems(), st.data())
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


def test_random_problems_are_solved_as_trying_all_choices_solves_them(make_problem):
    rng, met = np.random.default_rng(5), 0
    for _ in range(1500):
        shapes = [(int(rng.integers(1, 9)), int(rng.choice([24, 48]))) for _ in range(rng.integers(1, 6))]
        menu = [
            str(name) for name in rng.choice(sorted({*LEVELS} - {"1:2"}), rng.integers(1, 6), replace=False)
        ]
        free = make_problem(shapes, menu, Fraction(int(rng.integers(4, 17)), 24))
        allowed = rng.random((len(shapes), len(menu))) < 0.7
        allowed[np.arange(len(shapes)), rng.integers(0, len(menu), len(shapes))] = True
        problem = AllocationProblem(free.table, free.menu, free.target, allowed)
        cost = rng.integers(0, 9, allowed.shape).astype(float)
        cost[rng.random(allowed.shape) < 0.2] = np.inf
        kept, total = np.zeros(1, dtype=int), np.zeros(1)
        for u, (out, width) in enumerate(shapes):
            count = np.array([out * width * level.n // level.m for level in problem.menu])
            kept = (kept[:, None] + count[allowed[u]]).ravel()
            total = (total[:, None] + cost[u, allowed[u]]).ravel()
        wanted = (1 - problem.target) * problem.table.weights
        if not kept.min() <= wanted <= kept.max():
            with pytest.raises(BudgetError, match="out of reach"):
                problem.solve(cost)
            continue
        budget = min(set(kept.tolist()), key=lambda count: (abs(count - wanted), count))
        assert problem.budget.kept == budget
        best = total[kept == budget].min()
        if best == np.inf:
            with pytest.raises(BudgetError, match="exactly"):
                problem.solve(cost)
            continue
        choice = problem.solve(cost)
        assert naive_kept(problem, choice) == budget and allowed[np.arange(len(choice)), choice].all()
        assert sum(cost[u, k] for u, k in enumerate(choice)) == best
        met += 1
    assert met > 400


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


def test_uniform_drops_every_nth_block_of_equal_ones(make_problem):
    problem = make_problem([(4, 8), (12, 8)] * 10, ["dense", "dropped"], 0.2)
    dropped = {u for u, k in enumerate(problem.uniform()) if problem.menu[k].name == "dropped"}
    assert dropped == {4, 5, 14, 15}


def test_uniform_spreads_what_is_dropped_where_sizes_differ(make_problem):
    problem = make_problem([(4, 8), (9, 8)] * 12, ["dense", "dropped"], 0.3)
    dropped = [u for u, k in enumerate(problem.uniform()) if k]
    assert problem.total_kept(problem.uniform()) == problem.budget.kept
    assert all(1 <= sum(6 * third <= u < 6 * third + 6 for u in dropped) <= 3 for third in range(4))


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


@pytest.mark.parametrize("target, met", [("0.7", True), ("0.71", True), ("0.72", False), ("0.69", False)])
def test_a_share_reaches_its_own_sparsity_though_rows_are_rounded(make_problem, target, met):
    problem = make_problem([(4, 24), (2, 16)], ["0.7"], target)  # keeps 7 of 24 and 4 of 16
    if met:
        assert problem.budget.kept == 4 * 7 + 2 * 4 and not problem.budget.exact
        assert problem.uniform() == (0, 0)
    else:
        with pytest.raises(BudgetError, match="the levels 7/10 reach 0.71875 to 0.71875"):
            _ = problem.budget


def test_bounds_narrow_the_range_that_is_named(make_problem):
    free = make_problem([(4, 8), (2, 8)], ["dense", "4:8", "2:8"], 0.5)
    allowed = [[True, False, False], [True, True, True]]
    problem = AllocationProblem(free.table, free.menu, free.target, np.array(allowed))
    with pytest.raises(BudgetError) as error:
        _ = problem.budget
    assert error.value.message.endswith(
        "the levels dense, 4:8, 2:8, within bounds and protect, reach 0 to 0.25"
    )
    assert "widen the bounds" in error.value.hint
    within = AllocationProblem(free.table, free.menu, Fraction(1, 6), np.array(allowed))
    assert within.budget.exact and within.uniform() == (0, 1)


def test_a_range_that_no_short_decimal_gives_is_named_as_a_fraction(make_problem):
    problem = make_problem([(1, 24)], ["2:3", "1:3"], 0.9)
    with pytest.raises(BudgetError, match=r"reach 1/3 \(0.3333\) to 2/3 \(0.6667\)"):
        _ = problem.budget


def test_problems_with_other_allowed_levels_are_others(make_problem):
    free = make_problem([(4, 8)], ["dense", "4:8"], 0.5)

    def problem(allowed):
        return AllocationProblem(free.table, free.menu, free.target, allowed)

    mask = np.array([[False, True]])
    held = problem(mask)
    assert held == problem([[False, True]]) and hash(held) == hash(problem([[False, True]]))
    assert held != free and held != problem([[True, True]]) and free == problem(None)
    mask[0, 1] = False
    assert held.allowed[0, 1] and not held.allowed.flags.writeable


@pytest.mark.parametrize("allowed, found", [
    ([[True, True]], r"shape \(1, 2\), units and levels \(2, 2\)"),
    ([[True, True], [False, False]], "no level of dense, 4:8 is allowed for layers.1.proj"),
])  # fmt: skip
def test_a_mask_that_does_not_fit_or_leaves_nothing_is_refused(make_problem, allowed, found):
    free = make_problem([(4, 8)] * 2, ["dense", "4:8"], 0.5)
    with pytest.raises(BudgetError, match=found):
        AllocationProblem(free.table, free.menu, free.target, np.array(allowed))


EIGHT_B = {
    "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096),
    "gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336),
}  # fmt: skip
AWKWARD = ["dense", "63:64", "5:8", "2:4", "3:8", "5:16", "1:16", "3:32", "17:32"]


@pytest.mark.parametrize("levels", [DEFAULT_LEVELS, AWKWARD], ids=["default", "awkward"])
def test_an_8b_model_meets_its_budget_to_the_weight(levels):
    units = [
        Unit(f"{b}.{name}", b, (Layer(f"{b}.{name}", *shape),))
        for b in range(32)
        for name, shape in EIGHT_B.items()
    ]
    menu = parse_menu(levels)
    problem = AllocationProblem(UnitTable(tuple(units)), menu, Fraction(7, 10))
    rng = np.random.default_rng(0)
    choice = problem.solve(rng.random((len(units), len(menu))))
    assert naive_kept(problem, choice) == problem.budget.kept
    assert abs(problem.budget.sparsity - Fraction(7, 10)) < Fraction(1, 10000)


@pytest.mark.parametrize(("target", "kept"), [(0.3, 80), (0.5, 64), (0.75, 32)])
def test_dropped_serves_only_targets_that_the_other_levels_are_too_dense_for(make_problem, target, kept):
    # 96 + 0 is nearer to 0.7 * 128 = 89.6 than 32 + 48; no allocation could keep both units then.
    problem = make_problem([(4, 8), (12, 8)], ["dense", "2:4", "dropped"], target)
    assert problem.budget.kept == kept
    assert problem.total_kept(problem.solve(np.zeros(problem.kept.shape))) == kept


def test_uniform_drops_nothing_where_the_other_levels_meet_the_budget(make_problem):
    for target in (0.25, 0.3, 0.5):
        problem = make_problem([(4, 8), (12, 8)] * 4, ["dense", "6:8", "2:4", "dropped"], target)
        plain = make_problem([(4, 8), (12, 8)] * 4, ["dense", "6:8", "2:4"], target)
        assert problem.uniform() == plain.uniform()
