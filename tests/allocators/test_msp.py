import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msp_plugin.allocators.base import AllocationInputs
from msp_plugin.allocators.msp import MSP, crossover, fisher_seeds, mutate
from msp_plugin.errors import BudgetError, NumericsError
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.fractions import parse_sparsity
from msp_plugin.plan.menus import DEFAULT_LEVELS, parse_menu
from msp_plugin.plan.units import Layer, Unit, UnitTable

SMALL = MSP(population=4, generations=3, offspring=4)


class SeparableLoss:
    """A loss that adds up over the units, and remembers what was measured."""

    def __init__(self, values):
        self.values, self.seen, self.forward_tokens = values, [], 0

    def __call__(self, choice):
        self.seen.append(choice)
        self.forward_tokens += 10
        return float(sum(self.values[u, k] for u, k in enumerate(choice)))


def problem_of(shapes, levels=DEFAULT_LEVELS, target="1/2"):
    units = tuple(Unit(str(u), u, (Layer(str(u), *shape),)) for u, shape in enumerate(shapes))
    return AllocationProblem(UnitTable(units), parse_menu(levels), parse_sparsity(target))


def inputs(problem, seed=0, loss=None, progress=lambda done, total: None, errors=True, fisher=None):
    rng = np.random.default_rng(seed)
    shape = (len(problem.table), len(problem.menu))
    error = np.sort(rng.random(shape) * np.array([u.weights for u in problem.table])[:, None], axis=1)
    return AllocationInputs(
        problem, {"fisher": rng.exponential(1.0, shape[0]) if fisher is None else np.asarray(fisher)},
        {"weight": error} if errors else {}, loss or SeparableLoss(rng.random(shape)), seed, progress,
    )  # fmt: skip


@st.composite
def problems(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([24, 48])), min_size=1, max_size=6))
    levels = draw(
        st.lists(st.sampled_from([*DEFAULT_LEVELS, "2:4", "1:3"]), min_size=1, max_size=5, unique=True)
    )
    menu = parse_menu(levels)
    target = draw(st.fractions(menu[0].sparsity, menu[-1].sparsity, max_denominator=32))
    problem = problem_of(shapes, levels)
    return AllocationProblem(problem.table, problem.menu, target)


def kept(problem, choice):
    return sum(
        layer.out_features * layer.in_features // problem.menu[k].m * problem.menu[k].n
        for unit, k in zip(problem.table, choice, strict=True)
        for layer in unit.layers
    )


@given(problems(), st.integers(0, 1000))
@settings(max_examples=30)
def test_the_result_is_on_the_budget_measured_and_never_worse_than_uniform(problem, seed):
    loss = SeparableLoss(np.random.default_rng(seed).random((len(problem.table), len(problem.menu))))
    found = SMALL.allocate(inputs(problem, seed, loss))
    assert {kept(problem, choice) for choice in loss.seen} == {problem.budget.kept}
    assert problem.uniform() == loss.seen[0]
    assert found.choice in loss.seen and len(set(loss.seen)) == len(loss.seen) == found.evaluations
    again = SeparableLoss(loss.values)
    assert found.loss == again(found.choice) == min(again(choice) for choice in set(loss.seen))
    assert found.uniform_loss == again(problem.uniform()) >= found.loss


@given(problems(), st.integers(0, 1000))
@settings(max_examples=12)
def test_the_same_seed_gives_the_same_result(problem, seed):
    first, second = (inputs(problem, seed) for _ in range(2))
    assert SMALL.allocate(first) == SMALL.allocate(second)
    assert first.loss.seen == second.loss.seen


def test_another_seed_searches_elsewhere():
    problem = problem_of([(4, 64), (8, 32), (2, 128), (16, 64), (3, 32)])
    values = np.random.default_rng(0).random((5, 8))
    seen = []
    for seed in (0, 1):
        loss = SeparableLoss(values)
        SMALL.allocate(AllocationInputs(problem, {"fisher": np.ones(5)}, {}, loss, seed, lambda *at: None))
        seen.append(loss.seen)
    assert seen[0] != seen[1]


def test_the_search_finds_the_best_of_all_choices_of_a_small_problem():
    problem = problem_of([(4, 24), (4, 48), (8, 24), (2, 48)], ["dense", "6:8", "4:8", "2:8", "1:8"])
    values = np.random.default_rng(5).random((4, 5))
    best = min(
        sum(values[u, k] for u, k in enumerate(choice))
        for choice in itertools.product(range(5), repeat=4)
        if kept(problem, choice) == problem.budget.kept
    )
    found = MSP(generations=20).allocate(inputs(problem, 0, SeparableLoss(values)))
    assert found.loss == pytest.approx(best, abs=1e-12) and found.loss < found.uniform_loss


@given(problems(), st.integers(0, 1000), st.integers(1, 5))
def test_a_mutation_stays_on_the_budget(problem, seed, moves):
    rng = np.random.default_rng(seed)
    parent = problem.solve(rng.random((len(problem.table), len(problem.menu))))
    child = mutate(problem, parent, moves, rng)
    assert len(child) == len(parent) and kept(problem, child) == problem.budget.kept


def test_mutations_reach_every_neighbour_of_equal_units():
    problem = problem_of([(4, 8)] * 3, ["6:8", "4:8", "2:8"])
    rng = np.random.default_rng(0)
    children = {mutate(problem, (1, 1, 1), 1, rng) for _ in range(200)}
    assert children - {(1, 1, 1)} == set(itertools.permutations((0, 1, 2)))


def test_a_mutation_without_a_way_back_to_the_budget_gives_the_parent():
    problem = problem_of([(4, 8)], ["6:8", "4:8", "2:8"])
    assert mutate(problem, (1,), 3, np.random.default_rng(0)) == (1,)


@given(problems(), st.integers(0, 1000))
def test_a_crossover_stays_on_the_budget(problem, seed):
    rng = np.random.default_rng(seed)
    a, b = (problem.solve(rng.random((len(problem.table), len(problem.menu)))) for _ in range(2))
    weight = rng.exponential(1.0, len(problem.table)) + 1e-3
    assert kept(problem, crossover(problem, a, b, weight, rng)) == problem.budget.kept
    assert crossover(problem, a, a, weight, rng) == a


def test_a_crossover_takes_units_from_both_parents_and_the_least_sensitive_give_way():
    problem = problem_of([(4, 8)] * 4, ["6:8", "4:8", "2:8"])
    a, b = (0, 2, 0, 2), (2, 0, 2, 0)
    children = {
        crossover(problem, a, b, np.array([9.0, 9.0, 9.0, 1e-3]), np.random.default_rng(s)) for s in range(60)
    }
    assert {(0, 2, 2, 0), (2, 0, 0, 2)} <= children
    off_budget = [child for child in children if 1 in child]
    assert all(child[3] == 1 or sum(k == 1 for k in child) > 1 for child in off_budget)


@given(problems(), st.integers(0, 1000), st.integers(1, 12), st.floats(0, 1), st.booleans())
@settings(max_examples=40)
def test_seeds_are_distinct_on_the_budget_and_begin_with_uniform(problem, seed, count, amplitude, errors):
    seeds = fisher_seeds(inputs(problem, seed, errors=errors), count, amplitude, np.random.default_rng(seed))
    assert seeds[0] == problem.uniform()
    assert len(set(seeds)) == len(seeds) <= max(count, 3)
    assert {kept(problem, choice) for choice in seeds} == {problem.budget.kept}


def test_a_seed_minimises_trace_times_weight_error_exactly():
    problem = problem_of([(4, 24), (4, 48), (8, 24), (2, 48)], ["dense", "6:8", "4:8", "2:8"])
    given_inputs = inputs(problem, 3)
    sizes = np.array([unit.weights for unit in problem.table])
    cost = (given_inputs.sensitivities["fisher"] / sizes)[:, None] * given_inputs.errors["weight"]
    best = min(
        (c for c in itertools.product(range(4), repeat=4) if kept(problem, c) == problem.budget.kept),
        key=lambda c: sum(cost[u, k] for u, k in enumerate(c)),
    )
    assert fisher_seeds(given_inputs, 8, 0.25, np.random.default_rng(0))[1] == best


def test_the_seeds_keep_the_most_sensitive_unit_densest():
    problem = problem_of([(8, 64)] * 6)
    fisher = [1.0, 2.0, 100.0, 3.0, 4.0, 0.1]
    seeds = fisher_seeds(inputs(problem, errors=False, fisher=fisher), 4, 0.25, np.random.default_rng(0))
    assert len(seeds) == 4
    for choice in seeds[1:]:
        sparsity = [problem.menu[k].sparsity for k in choice]
        assert sparsity[2] == min(sparsity) < max(sparsity) == sparsity[5]


@pytest.mark.parametrize("fisher", [[0.0] * 4, [0.0, 0.0, 0.0, 1e30], [1e-300] * 4, [-1.0, 0.0, 1.0, 2.0]])
def test_odd_sensitivities_still_give_a_result(fisher):
    problem = problem_of([(4, 24), (4, 48), (8, 24), (2, 48)])
    found = SMALL.allocate(inputs(problem, fisher=fisher))
    assert kept(problem, found.choice) == problem.budget.kept


@pytest.mark.parametrize(
    "shapes, levels", [([(4, 8)], DEFAULT_LEVELS), ([(4, 8)] * 3, ["4:8"]), ([(4, 8)], ["4:8"])]
)
def test_a_problem_with_one_choice_gives_that_choice(shapes, levels):
    problem = problem_of(shapes, levels)
    found = SMALL.allocate(inputs(problem))
    assert (found.choice, found.evaluations) == (problem.uniform(), 1) and found.loss == found.uniform_loss


def test_no_generations_choose_among_the_seeds():
    problem = problem_of([(4, 24), (4, 48), (8, 24), (2, 48)])
    given_inputs = inputs(problem)
    found = MSP(population=5, generations=0).allocate(given_inputs)
    assert found.evaluations == len(given_inputs.loss.seen) == 5


def test_candidates_that_cannot_be_measured_lose():
    problem = problem_of([(4, 8)] * 4)

    class OnlyUniform(SeparableLoss):
        def __call__(self, choice):
            super().__call__(choice)
            return 1.0 if choice == problem.uniform() else np.inf

    found = SMALL.allocate(inputs(problem, loss=OnlyUniform(np.zeros((4, 8)))))
    assert found.choice == problem.uniform() and found.loss == found.uniform_loss == 1.0


def test_the_curve_falls_from_uniform_to_the_result():
    problem = problem_of([(4, 24), (4, 48), (8, 24), (2, 48), (6, 24)])
    given_inputs = inputs(problem, 2)
    found = MSP(generations=10).allocate(given_inputs)
    tokens, losses = zip(*found.curve, strict=True)
    assert losses[0] == found.uniform_loss and losses[-1] == found.loss and len(losses) > 2
    assert list(losses) == sorted(set(losses), reverse=True) and list(tokens) == sorted(set(tokens))
    assert tokens[0] == 10 and tokens[-1] <= given_inputs.loss.forward_tokens


def test_progress_rises_to_its_total():
    seen = []
    problem = problem_of([(4, 24), (4, 48), (8, 24), (2, 48)])
    SMALL.allocate(inputs(problem, progress=lambda *at: seen.append(at)))
    done = [at for at, _ in seen]
    assert {total for _, total in seen} == {16} and done == sorted(done) and done[-1] == 16


def test_levels_out_of_reach_come_out_as_such():
    with pytest.raises(BudgetError, match="out of reach"):
        SMALL.allocate(inputs(problem_of([(4, 8)] * 2, ["dense", "6:8"])))


@given(st.integers(0, 10**6))
def test_a_mutation_never_trades_a_pattern_for_a_stricter_one_of_equal_count(seed):
    problem = problem_of([(4, 48)] * 5, ["dense", "4:8", "2:4", "2:8", "1:4"], "1/2")
    four_of_eight = [level.name for level in problem.menu].index("4:8")
    parent = (four_of_eight,) * 5
    child = mutate(problem, parent, 1, np.random.default_rng(seed))
    assert sum(problem.menu[k].name == "2:4" for k in child) <= 1  # the one that was to move


def test_a_search_without_a_finite_loss_is_an_error():
    class Broken(SeparableLoss):
        def __call__(self, choice):
            return float("inf")

    problem = problem_of([(4, 48)] * 3)
    with pytest.raises(NumericsError, match="candidates has a finite loss"):
        SMALL.allocate(inputs(problem, loss=Broken(np.zeros((3, 8)))))
