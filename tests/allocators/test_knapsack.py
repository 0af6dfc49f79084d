"""The allocator that minimises an additive surrogate; the solver itself is tested in tests/plan."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msp_plugin.allocators.base import AllocationInputs
from msp_plugin.allocators.knapsack import SURROGATES, Knapsack
from msp_plugin.errors import RecipeError
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.menus import DEFAULT_LEVELS, parse_menu
from msp_plugin.plan.units import Layer, Unit, UnitTable


@st.composite
def problems(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([24, 48])), min_size=2, max_size=5))
    levels = draw(
        st.lists(st.sampled_from([*DEFAULT_LEVELS, "2:4", "0.7"]), min_size=2, max_size=4, unique=True)
    )
    menu = parse_menu(levels)
    target = draw(st.fractions(menu[0].sparsity, menu[-1].sparsity, max_denominator=32))
    units = tuple(Unit(str(u), u, (Layer(str(u), *shape),)) for u, shape in enumerate(shapes))
    return AllocationProblem(UnitTable(units), menu, target)


def allocate(problem, allocator, errors):
    return allocator.allocate(AllocationInputs(problem, {}, errors, None, 0, lambda *at: None))


def total(errors, choice):
    return sum(errors[u, k] for u, k in enumerate(choice))


@given(problems(), st.integers(0, 10**6))
@settings(max_examples=40)
def test_each_surrogate_equals_brute_force_on_its_own_error(problem, seed):
    rng = np.random.default_rng(seed)
    errors = {name: rng.exponential(1.0, (len(problem.table), len(problem.menu))) for name in SURROGATES}
    on_budget = [
        choice
        for choice in itertools.product(range(len(problem.menu)), repeat=len(problem.table))
        if problem.total_kept(choice) == problem.budget.kept
    ]
    for surrogate, error in errors.items():
        found = allocate(problem, Knapsack(surrogate), errors)
        assert found.choice in on_budget and (found.loss, found.evaluations, found.curve) == (None, 0, ())
        best = min(total(error, choice) for choice in on_budget)
        assert total(error, found.choice) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_each_surrogate_asks_for_its_error_alone_and_only_kl_measures(surrogate):
    allocator = Knapsack(surrogate, tokens=512)
    assert allocator.errors == (surrogate,) and allocator.needs_database and not allocator.seeded
    assert allocator.measures == (surrogate == "kl") and allocator.stopping_tokens == 0
    assert allocator.held_out_tokens == (512 if surrogate == "kl" else 0) and allocator.objective == "kl"


def test_the_fisher_weighted_error_is_the_default():
    assert Knapsack().errors == ("fisher",)


@pytest.mark.parametrize(
    "options, found", [({"surrogate": "hessian"}, "'hessian' is unknown"), ({"tokens": 0}, "tokens = 0")]
)
def test_options_out_of_range_are_refused(options, found):
    with pytest.raises(RecipeError, match=f"knapsack: .*{found}"):
        Knapsack(**options)
