import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msp_plugin.allocators.atp import ATP, differences, progression
from msp_plugin.allocators.base import AllocationInputs
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.fractions import parse_sparsity
from msp_plugin.plan.menus import DEFAULT_LEVELS, parse_menu
from msp_plugin.plan.units import Layer, Unit, UnitTable

FINE = [f"{n}:32" for n in range(1, 33)]


class Loss:
    """A loss of the choice alone that remembers what was measured."""

    def __init__(self, value):
        self.value, self.seen, self.forward_tokens = value, [], 0

    def __call__(self, choice, samples=None):
        self.seen.append(choice)
        self.forward_tokens += 7
        return float(self.value(np.array(choice)))


def problem_of(blocks, levels=DEFAULT_LEVELS, target=0.75):
    units = tuple(
        Unit(f"layers.{b}.{i}", b, (Layer(f"layers.{b}.{i}", *shape),))
        for b, shapes in enumerate(blocks)
        for i, shape in enumerate(shapes)
    )
    return AllocationProblem(UnitTable(units), parse_menu(levels), parse_sparsity(target))


def allocate(problem, loss, progress=lambda *at: None, **options):
    return ATP(**options).allocate(AllocationInputs(problem, {}, {}, loss, 0, progress))


@pytest.mark.parametrize(
    "target, blocks, points", [(0.75, 8, 35), (0.5, 32, 16), (0.7, 32, 9), (0.9, 2, 100)]
)
def test_the_grid_goes_up_to_where_a_sparsity_leaves_the_possible(target, blocks, points):
    grid = differences(target, blocks, 0.002)
    assert len(grid) == points and grid[0] == 0.002 and np.allclose(np.diff(grid), 0.002)
    for b, inside in ((grid[-1], True), (grid[-1] + 0.002, False)):
        sparsity = progression(target, blocks, b)
        assert (sparsity.min() >= -1e-9 and sparsity.max() <= 1 + 1e-9) == inside
    assert differences(0.75, 1, 0.002) == []


@given(st.floats(0.05, 0.95), st.integers(1, 40), st.floats(0, 0.05))
def test_a_progression_rises_by_b_with_the_target_as_mean(target, blocks, b):
    sparsity = progression(target, blocks, b)
    assert sparsity.mean() == pytest.approx(target) and np.allclose(np.diff(sparsity), b)
    assert sparsity[0] == pytest.approx(target - b * (blocks - 1) / 2)


def test_the_best_of_the_grid_is_taken_with_its_blocks_progression():
    problem = problem_of([[(8, 32), (4, 64)]] * 5, FINE, 0.6)
    wanted = np.repeat(progression(0.6, 5, 0.074), 2)

    def distance(choice):
        return np.abs(
            [float(problem.menu[k].sparsity) - s for k, s in zip(choice, wanted, strict=True)]
        ).sum()

    loss = Loss(distance)
    result = allocate(problem, loss)
    best = min({*loss.seen}, key=lambda choice: distance(np.array(choice)))
    assert result.choice == best == problem.repair(1 - wanted, np.ones(10))
    found = [float(problem.menu[k].sparsity) for k in result.choice]
    assert np.abs(np.array(found) - wanted).max() <= 1.01 / 32
    assert "0.07" in result.notes[0] and result.loss == distance(np.array(best))


def test_uniform_is_measured_first_and_nothing_twice():
    problem = problem_of([[(8, 64)]] * 8)
    loss = Loss(lambda choice: 1.0)
    result = allocate(problem, loss)
    assert loss.seen[0] == problem.uniform() and len(set(loss.seen)) == len(loss.seen) == result.evaluations
    assert 1 < result.evaluations < 36
    assert result.choice == problem.uniform() and result.loss == result.uniform_loss == 1.0
    assert result.curve == ((7, 1.0),) and "common difference 0 of" in result.notes[0]


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 6), st.sampled_from([24, 48])), min_size=1, max_size=3), min_size=1,
        max_size=6,
    ),
    st.integers(0, 10**6), st.fractions("1/20", "17/20", max_denominator=40),
)  # fmt: skip
@settings(max_examples=25)
def test_every_result_is_on_the_budget_never_worse_than_uniform_and_repeats(blocks, seed, target):
    problem = problem_of(blocks, target=target)
    price = np.random.default_rng(seed).random(len(problem.table))
    loss = Loss(lambda choice: price @ choice)
    result = allocate(problem, loss, step=0.02)
    assert {problem.total_kept(choice) for choice in loss.seen} == {problem.budget.kept}
    assert result.loss <= result.uniform_loss and result.choice in loss.seen
    assert allocate(problem, Loss(loss.value), step=0.02) == result


def test_the_curve_falls_and_progress_rises_to_its_total():
    problem, seen = problem_of([[(8, 64)]] * 8), []
    loss = Loss(lambda choice: -choice[-1] + 0.1 * choice[0])
    result = allocate(problem, loss, progress=lambda *at: seen.append(at))
    tokens, losses = zip(*result.curve, strict=True)
    assert losses[0] == result.uniform_loss and losses[-1] == result.loss and len(losses) > 1
    assert list(losses) == sorted(losses, reverse=True) and list(tokens) == sorted(tokens)
    assert seen == [(i, result.evaluations) for i in range(1, result.evaluations + 1)]


def test_a_grid_without_a_finite_loss_is_an_error():
    with pytest.raises(NumericsError, match="none of .* candidates has a finite loss"):
        allocate(problem_of([[(8, 64)]] * 4), Loss(lambda choice: np.inf))


def test_a_single_block_is_uniform():
    problem = problem_of([[(8, 64), (4, 64)]])
    result = allocate(problem, Loss(lambda choice: 2.0))
    assert result.choice == problem.uniform() and result.evaluations == 1


@pytest.mark.parametrize("options", [{"step": 0.0}, {"step": float("nan")}, {"tokens": 0}, {"loss": "mse"}])
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(RecipeError, match=f"atp: {next(iter(options))}"):
        ATP(**options)


def test_it_asks_for_held_out_text_and_the_database():
    assert ATP(tokens=5).held_out_tokens == 5 and ATP.needs_database and ATP().objective == "perplexity"
