"""Policy gradient: its projection, its steps and what it learns, on made-up losses."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.allocators.base import AllocationInputs
from msp_plugin.allocators.policy_gradient import PolicyGradient, draw_choice, loss_gradient, on_budget
from msp_plugin.errors import NumericsError, RecipeError
from tests.allocators.quadratic import QuadraticLoss, problem_of

SIZES = [(4, 8), (12, 8)] * 6
HALVES = ["dense", "dropped"]


class AdditiveLoss:
    """A loss that adds up over units, with noise by sample; counts its tokens."""

    lengths = (8,) * 6

    def __init__(self, values, noise=0.1):
        self.values, self.forward_tokens, self.seen = values, 0, []
        self.noise = np.random.default_rng(3).normal(0, noise, len(self.lengths))

    def __call__(self, choice, samples=None):
        samples = range(len(self.lengths)) if samples is None else samples
        self.seen.append(choice)
        self.forward_tokens += 8 * len(samples)
        return float(
            self.values[np.arange(len(choice)), list(choice)].sum() + self.noise[list(samples)].mean()
        )


def allocate(allocator, problem, loss, seed=0, scores=None):
    sensitivities = {} if scores is None else {"block_influence": scores}
    return allocator.allocate(AllocationInputs(problem, sensitivities, {}, loss, seed, lambda *at: None))


@given(st.integers(0, 10**6), st.sampled_from(["1/5", "1/2", "7/10"]), st.booleans())
def test_the_projection_is_the_nearest_point_on_the_budget(seed, target, bounded):
    """By the variational inequality: no step towards another feasible point leads nearer."""
    rng = np.random.default_rng(seed)
    levels = ["dense", "4:8", "dropped"]
    allowed = None
    if bounded:
        allowed = np.ones((12, 3), dtype=bool)
        allowed[rng.integers(12), rng.integers(3)] = False
    problem = problem_of(SIZES, levels, target, allowed)
    values = rng.normal(0, 2, (12, 3))
    found = on_budget(problem, values)
    assert found.min() >= 0 and found.sum(axis=1) == pytest.approx(1)
    assert (found * problem.kept).sum() == pytest.approx(problem.budget.kept, rel=1e-9)
    if bounded:
        assert not found[~allowed].any()
    for _ in range(20):
        other = np.zeros((12, 3))
        other[np.arange(12), list(problem.solve(rng.random((12, 3))))] = 1.0
        assert ((values - found) * (other - found)).sum() <= 1e-6


def test_on_dense_and_dropped_it_is_the_authors_clip_with_a_price():
    problem = problem_of(SIZES, HALVES, "1/5")
    keep = np.random.default_rng(0).normal(0.5, 0.6, 12)
    weights = np.array([unit.weights for unit in problem.table], dtype=float)
    low, high = -10.0, 10.0
    for _ in range(200):
        price = (low + high) / 2
        kept = np.clip(keep - price * weights / weights.max(), 0, 1)
        low, high = (price, high) if kept @ weights > problem.budget.kept else (low, price)
    found = on_budget(problem, np.stack([keep, 1 - keep], axis=1))
    assert found[:, 0] == pytest.approx(kept, abs=1e-8)


def test_levels_are_drawn_by_their_probabilities():
    policy, rng = np.array([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), np.random.default_rng(0)
    drawn = np.array([draw_choice(policy, rng) for _ in range(20000)])
    assert np.bincount(drawn[:, 0], minlength=3) / 20000 == pytest.approx(policy[0], abs=0.02)
    assert (drawn[:, 1:] == (0, 2)).all()


def test_the_step_is_the_authors_for_keep_probabilities():
    """g = 1 / (K - 1) sum_k (L_k - D) (m_k - s) / sqrt((s + e) (1 - s + e)) for the level that keeps."""
    rng = np.random.default_rng(1)
    keep, masks, beyond = rng.random(5), rng.integers(0, 2, (3, 5)), rng.normal(size=3)
    by_hand = sum(b * (m - keep) for b, m in zip(beyond, masks, strict=True)) / 2 / np.sqrt(keep * (1 - keep))
    found = loss_gradient(np.stack([keep, 1 - keep], axis=1), [tuple(1 - mask) for mask in masks], beyond)
    assert found[:, 0] == pytest.approx(by_hand, rel=1e-4) and found[:, 1] == pytest.approx(
        -by_hand, rel=1e-4
    )


@pytest.mark.parametrize(
    "levels", [HALVES, pytest.param(["dense", "4:8", "2:8", "dropped"], marks=pytest.mark.slow)]
)
def test_it_learns_the_best_choice_of_an_additive_loss(levels):
    problem = problem_of(SIZES, levels, "2/5")
    rng = np.random.default_rng(2)
    gone = 1 - problem.kept / problem.kept.max(axis=1, keepdims=True)
    values = rng.exponential(1.0, (12, 1)) * gone**2
    loss = AdditiveLoss(values)
    allocator = PolicyGradient(steps=1500, rate=0.03, choices=4, start="", tokens_per_step=16, tokens=48)
    found = allocate(allocator, problem, loss)
    best, uniform = (
        loss.values[np.arange(12), list(c)].sum() for c in (problem.solve(values), problem.uniform())
    )
    reached = loss.values[np.arange(12), list(found.choice)].sum()
    assert problem.total_kept(found.choice) == problem.budget.kept
    assert reached - best < 0.2 * (uniform - best)


def test_the_start_follows_the_sensitivity_and_no_step_gives_its_ranking():
    problem = problem_of([(4, 8)] * 10, HALVES, "3/10")
    scores = np.random.default_rng(0).permutation(10).astype(float)
    found = allocate(PolicyGradient(steps=0), problem, AdditiveLoss(np.zeros((10, 2))), scores=scores)
    assert {u for u, k in enumerate(found.choice) if k} == set(np.argsort(scores)[:3].tolist())


def test_a_budget_in_tokens_holds_and_steps_are_counted():
    problem, values = problem_of(SIZES, HALVES, "1/5"), np.random.default_rng(0).random((12, 2))
    for most, steps in ((1000, 28), (0, 40)):
        loss = AdditiveLoss(values)
        found = allocate(
            PolicyGradient(steps=40, start="", tokens_per_step=16, max_tokens=most), problem, loss
        )
        assert found.ended == f"after {steps} steps" and found.evaluations == 2 * steps + 2 == len(loss.seen)
        assert loss.forward_tokens == 2 * 48 + 2 * 16 * steps and (not most or loss.forward_tokens <= most)


def test_steps_of_whole_samples_fill_the_budget_that_they_were_planned_for():
    problem, values = problem_of(SIZES, HALVES, "1/5"), np.random.default_rng(0).random((12, 2))
    loss = AdditiveLoss(values)  # samples of 8 tokens: a choice of a step is measured on 24
    found = allocate(PolicyGradient(start="", tokens_per_step=20, max_tokens=1000), problem, loss)
    assert found.ended == "after 18 steps" and loss.forward_tokens == 2 * 48 + 2 * 24 * 18


def test_choices_whose_loss_overflows_are_left_out():
    problem = problem_of(SIZES, HALVES, "1/5")

    class Overflowing(AdditiveLoss):
        def __call__(self, choice, samples=None):
            found = super().__call__(choice, samples)
            return float("inf") if samples is not None and choice[0] else found

    values = np.random.default_rng(0).random((12, 2))
    found = allocate(PolicyGradient(steps=50, start="", tokens_per_step=8), problem, Overflowing(values))
    assert np.isfinite(found.loss)
    with pytest.raises(NumericsError, match="no finite loss"):
        allocate(PolicyGradient(steps=1, start=""), problem, AdditiveLoss(values + np.inf))


def test_it_is_no_worse_than_uniform_where_units_interact():
    problem = problem_of([(4, 24), (8, 24)] * 5, HALVES, "2/5")
    gains = []
    for number in range(3):
        loss = QuadraticLoss(problem, number)
        found = allocate(
            PolicyGradient(steps=300, rate=0.02, start="", tokens_per_step=12), problem, loss, seed=number
        )
        gains.append(loss.exact(problem.uniform()) - loss.exact(found.choice))
        order = [loss.exact(c) for c in itertools.islice(_random_choices(problem), 50)]
        assert loss.exact(found.choice) < np.median(order)
    assert np.mean(gains) > 0


def _random_choices(problem):
    rng = np.random.default_rng(9)
    while True:
        yield problem.solve(rng.random((len(problem.table), len(problem.menu))))


@pytest.mark.parametrize(
    "options", [{"choices": 1}, {"rate": 0.0}, {"steps": -1}, {"loss": "mse"}, {"window": 0}, {"tokens": 0}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(RecipeError, match="policy_gradient"):
        PolicyGradient(**options)


def test_a_budget_holds_also_where_one_sample_is_longer_than_a_step():
    loss = AdditiveLoss(np.random.default_rng(0).random((12, 2)))
    policy = PolicyGradient(tokens_per_step=2, max_tokens=1000, start="")
    allocate(policy, problem_of(SIZES, HALVES, "1/3"), loss)
    assert 900 < loss.forward_tokens <= 1000 and len(loss.seen) > 40
