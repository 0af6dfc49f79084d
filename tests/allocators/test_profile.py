"""The allocators that turn one score per block, or per unit, into a profile of densities."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.allocators.alphapruning import AlphaPruning
from msp_plugin.allocators.base import AllocationInputs
from msp_plugin.allocators.dlp import DLP
from msp_plugin.allocators.hessian import OneShot, mean_ranks
from msp_plugin.allocators.lsa import LSA
from msp_plugin.allocators.owl import OWL
from msp_plugin.allocators.profile import block_means, blocks_of, nearest_choice
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.fractions import parse_sparsity
from msp_plugin.plan.menus import DEFAULT_LEVELS, parse_menu
from msp_plugin.plan.units import Layer, Unit, UnitTable

FINE = [f"{n}:32" for n in range(1, 32)]
BY_BLOCK = (OWL(), DLP(), LSA(), AlphaPruning())
ALL = (*BY_BLOCK, OneShot())


def problem_of(blocks, levels=DEFAULT_LEVELS, target=0.75, first=0):
    """A problem from the (out, in) shapes of the units of each block."""
    units = tuple(
        Unit(f"layers.{b}.{i}", b, (Layer(f"layers.{b}.{i}", *shape),))
        for b, shapes in enumerate(blocks, first)
        for i, shape in enumerate(shapes)
    )
    return AllocationProblem(UnitTable(units), parse_menu(levels), parse_sparsity(target))


def allocate(allocator, problem, scores):
    """Scores are per unit, or per block, which then each of its units has."""
    if len(scores) != len(problem.table):
        scores = np.asarray(scores, dtype=float)[[u.block - problem.table[0].block for u in problem.table]]
    return allocator.allocate(
        AllocationInputs(
            problem, {allocator.sensitivities[0]: np.asarray(scores)}, {}, None, 0, lambda *at: None
        )
    )


def sparsities(problem, result):
    return np.array([float(problem.menu[k].sparsity) for k in result.choice])


def distance(problem, found, wished):
    sizes = np.array([unit.weights for unit in problem.table])
    return float(sizes @ (found - wished) ** 2)


def nearest(problem, wished):
    """The least distance that the budget allows."""
    choice = problem.repair(1 - wished, np.ones(len(wished)))
    return distance(problem, np.array([float(problem.menu[k].sparsity) for k in choice]), wished)


def by_hand(allocator, scores, weights, s):
    """Each block's sparsity, by the paper's formula."""
    x = np.array(scores, dtype=float)
    if allocator.name == "alphapruning":
        ratio = (x - x.min()) / (x.max() - x.min()) * 0.6 + 0.7
        return ratio * (np.sum(weights) * s / np.sum(np.array(weights) * ratio))
    if allocator.name == "owl":
        r = (x - x.min()) * (1 / (x.max() - x.min()) * 0.08 * 2)
        return 1 - (r - r.mean() + (1 - s))
    importance = 1 - x / x.sum()
    amplitude = {"dlp": 0.15, "lsa": 0.08}[allocator.name]
    d = (importance - importance.min()) / (importance.max() - importance.min()) * amplitude * 2
    return s + d.mean() - d


@pytest.mark.parametrize("allocator", BY_BLOCK, ids=lambda a: a.name)
@pytest.mark.parametrize("target", [0.5, 0.7])
def test_equal_blocks_get_the_published_sparsities(allocator, target):
    blocks, scores = [[(8, 32), (4, 64)]] * 6, [0.7, 3.1, 1.0, 2.2, 0.4, 2.9]
    problem = problem_of(blocks, FINE, target)
    found = sparsities(problem, allocate(allocator, problem, scores))
    expected = np.repeat(by_hand(allocator, scores, [512] * 6, target), 2)
    assert np.abs(found - expected).max() <= 1.01 / 32 and np.ptp(found) > 0.1
    assert distance(problem, found, expected) == pytest.approx(nearest(problem, expected), abs=1e-9)


@pytest.mark.parametrize("allocator", BY_BLOCK, ids=lambda a: a.name)
def test_unequal_blocks_keep_the_formula_and_the_repair_keeps_the_budget(allocator):
    blocks, scores = [[(64, 64), (32, 32)], [(8, 32)], [(16, 64), (16, 32), (8, 32)]], [0.5, 2.0, 1.2]
    problem = problem_of(blocks, FINE, 0.6)
    result = allocate(allocator, problem, scores)
    weights = [5120, 256, 1792]
    expected = by_hand(allocator, scores, weights, 0.6)[[0, 0, 1, 2, 2, 2]]
    found = distance(problem, sparsities(problem, result), expected)
    assert found == pytest.approx(nearest(problem, expected), abs=1e-9)
    assert problem.total_kept(result.choice) == problem.budget.kept


@pytest.mark.parametrize(
    "allocator, sign", list(zip(ALL, (-1, 1, 1, 1, -1), strict=True)), ids=lambda a: str(a)[:8]
)
def test_scores_move_sparsity_the_published_way(allocator, sign):
    problem = problem_of([[(8, 64)]] * 5, FINE, 0.6)
    found = sparsities(problem, allocate(allocator, problem, [1.0, 2.0, 3.0, 4.0, 5.0]))
    assert (sign * np.diff(found) > 0).all()


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 6), st.sampled_from([24, 48])), min_size=1, max_size=3), min_size=1,
        max_size=5,
    ),
    st.integers(0, 10**6), st.sampled_from(ALL), st.fractions("1/20", "17/20", max_denominator=40),
)  # fmt: skip
def test_every_result_is_on_the_budget_and_repeats(blocks, seed, allocator, target):
    problem = problem_of(blocks, target=target)
    scores = np.random.default_rng(seed).exponential(1.0, len(problem.table))
    result = allocate(allocator, problem, scores)
    assert problem.total_kept(result.choice) == problem.budget.kept
    assert allocate(allocator, problem, scores) == result
    assert result.loss is None and result.evaluations == 0


@given(st.lists(st.integers(0, 50), min_size=2, max_size=8, unique=True), st.sampled_from(ALL))
def test_equal_blocks_are_ranked_as_their_scores(scores, allocator):
    problem = problem_of([[(8, 64)]] * len(scores), FINE, 0.6)
    found = sparsities(problem, allocate(allocator, problem, np.array(scores) + 1.0))
    order = found[np.argsort(scores)]
    steps = np.diff(order if allocator.name in ("dlp", "lsa", "alphapruning") else order[::-1])
    assert (steps >= -1e-12).all()


@pytest.mark.parametrize("allocator", ALL, ids=lambda a: a.name)
@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
def test_scores_that_are_all_alike_give_uniform_and_say_so(allocator, value):
    problem = problem_of([[(8, 64), (4, 64)]] * 3)
    sizes = np.array([unit.weights for unit in problem.table])
    result = allocate(allocator, problem, sizes * value if allocator.name == "one_shot" else [value] * 3)
    assert result.choice == problem.uniform() and {problem.menu[k].name for k in result.choice} == {"2:8"}
    assert len(result.notes) == 1 and "uniform" in result.notes[0]
    assert allocator.sensitivities[0] in result.notes[0]


@pytest.mark.parametrize("allocator", BY_BLOCK, ids=lambda a: a.name)
def test_scores_that_differ_by_rounding_are_alike(allocator):
    problem = problem_of([[(8, 64)]] * 4)
    result = allocate(allocator, problem, [0.1, 0.1 + 1e-16, 0.1, np.nextafter(0.1, 1)])
    assert result.choice == problem.uniform() and result.notes


@pytest.mark.parametrize("allocator", ALL, ids=lambda a: a.name)
def test_a_single_unit_gets_the_target(allocator):
    problem = problem_of([[(8, 64)]])
    assert allocate(allocator, problem, [3.0]).choice == problem.uniform()


@pytest.mark.parametrize("allocator", ALL, ids=lambda a: a.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_names_its_unit(allocator, value):
    problem = problem_of([[(8, 64)]] * 3)
    with pytest.raises(
        NumericsError, match=rf"'{allocator.sensitivities[0]}' of layers.1.0 is {value}"
    ) as error:
        allocate(allocator, problem, [1.0, value, 2.0])
    assert "float32" in error.value.hint


def test_a_wish_beyond_the_possible_is_clipped():
    problem = problem_of([[(8, 64)]] * 3, FINE, 0.9)
    found = allocate(AlphaPruning(epsilon=1.0), problem, [1.0, 5.0, 5.0])
    expected = by_hand(AlphaPruning(), [0, 1, 1], [512] * 3, 0.9)
    assert problem.total_kept(found.choice) == problem.budget.kept and expected.max() > 0.95
    wild = nearest_choice(problem, np.array([7.0, -3.0, -3.0])).choice
    assert wild == nearest_choice(problem, np.array([1.0, 0.0, 0.0])).choice


@pytest.mark.parametrize(
    "option, wide", [(OWL, 0.3), (DLP, 0.3), (LSA, 0.3), (OneShot, 0.3), (AlphaPruning, 0.5)]
)
def test_a_larger_amplitude_spreads_more_and_none_is_uniform(option, wide):
    problem, scores = problem_of([[(8, 64)]] * 4, FINE, 0.6), [1.0, 2.0, 3.0, 4.0]
    spreads = [np.ptp(sparsities(problem, allocate(option(a), problem, scores))) for a in (0.0, 0.1, wide)]
    assert spreads[0] <= 1 / 32 < spreads[1] < spreads[2]


def test_a_bound_on_a_unit_holds():
    free = problem_of([[(8, 64)]] * 4)
    allowed = np.ones((4, 8), dtype=bool)
    allowed[3, 1:] = False
    problem = AllocationProblem(free.table, free.menu, parse_sparsity(0.5), allowed)
    result = allocate(DLP(), problem, [1.0, 2.0, 3.0, 4.0])
    assert result.choice[3] == 0 and problem.total_kept(result.choice) == problem.budget.kept


def test_one_shot_maps_the_rank_of_the_trace_per_weight_linearly():
    problem = problem_of([[(8, 64), (64, 64)], [(16, 64), (4, 32)]], FINE, 0.6)
    trace = np.array([512 * 3.0, 4096 * 1.0, 1024 * 4.0, 128 * 2.0])
    wish = 0.4 + 0.1 * (2 * np.array([2, 0, 3, 1]) / 3 - 1)
    assert allocate(OneShot(), problem, trace).choice == problem.repair(wish, np.ones(4))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_equal_values_share_the_mean_of_their_ranks(values):
    smaller = [sum(v < value for v in values) for value in values]
    equal = [values.count(value) for value in values]
    expected = [a + (b - 1) / 2 for a, b in zip(smaller, equal, strict=True)]
    assert mean_ranks(np.array(values, dtype=float)).tolist() == expected


def test_a_blocks_score_is_the_mean_over_its_weights_and_blocks_need_not_start_at_zero():
    problem = problem_of([[(8, 64), (24, 64)], [(4, 64)]], first=5)
    assert block_means(problem.table, np.array([1.0, 5.0, 7.0])).tolist() == [4.0, 7.0]
    positions, weights = blocks_of(problem.table)
    assert positions.tolist() == [0, 0, 1] and weights.tolist() == [2048, 256]


@pytest.mark.parametrize("allocator", [OWL, DLP, LSA, OneShot])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_an_amplitude_out_of_range_is_refused(allocator, value):
    with pytest.raises(RecipeError, match=rf"{allocator.name}: amplitude = {value} is outside \[0, 1\]"):
        allocator(value)
    if allocator is OWL:
        with pytest.raises(RecipeError, match="alphapruning: epsilon"):
            AlphaPruning(value)


def test_only_alphapruning_needs_no_text():
    from msp_plugin.sensitivity.heavy_tail import HeavyTail

    assert AlphaPruning.sensitivities == (HeavyTail.name,)
    assert not any(allocator.needs_database or allocator.measures for allocator in ALL)
