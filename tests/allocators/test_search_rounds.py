"""Our search, round by round: what it measures, what it believes of it, and what it refuses."""

import itertools
import math

import numpy as np
import pytest

from msp_plugin.allocators.search import Search
from msp_plugin.errors import NumericsError
from tests.allocators.quadratic import SHAPES, QuadraticLoss, inputs_of, problem_of


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_candidate_that_cannot_be_measured_is_never_accepted(value):
    problem = problem_of(SHAPES)
    plain = inputs_of(problem)
    good = Search().allocate(plain)
    seeds = inputs_of(problem)
    Search(rounds=0).allocate(seeds)
    proposed = set(plain.loss.full) - set(seeds.loss.full)
    assert good.choice in proposed
    given_inputs = inputs_of(problem)
    given_inputs.loss.odd = dict.fromkeys(proposed, value)
    found = Search().allocate(given_inputs)
    assert proposed & {*given_inputs.loss.few, *given_inputs.loss.full}
    used = {found.choice, *given_inputs.loss.kept, *(choice for choice, *_ in given_inputs.loss.asked)}
    assert not used & proposed and math.isfinite(found.loss)


def test_a_candidate_that_only_all_samples_show_to_be_infinite_is_not_accepted():
    problem = problem_of(SHAPES)
    plain, given_inputs = inputs_of(problem), inputs_of(problem)
    Search().allocate(plain)
    measure = given_inputs.loss.exact
    bad = set(plain.loss.full[2:])
    given_inputs.loss.exact = lambda c, samples=None: (
        np.inf if c in bad and samples is None else measure(c, samples)
    )
    found = Search().allocate(given_inputs)
    assert bad & set(given_inputs.loss.full) and found.choice not in bad and math.isfinite(found.loss)


@pytest.mark.parametrize("finite", [False, True])
def test_seeds_without_a_finite_loss_are_an_error(finite):
    problem = problem_of(SHAPES)

    class Broken(QuadraticLoss):
        def __call__(self, choice, samples=None):
            found = super().__call__(choice, samples)
            return found if finite and choice == problem.uniform() else np.inf

    given_inputs = inputs_of(problem, Broken(problem))
    if finite:
        assert Search(rounds=2).allocate(given_inputs).choice == problem.uniform()
    else:
        with pytest.raises(NumericsError, match="none of 8 seeds has a finite loss") as error:
            Search().allocate(given_inputs)
        assert "float32" in error.value.hint


def test_a_proposal_that_was_measured_and_refused_is_no_point_of_the_curve():
    problem, refused = problem_of(SHAPES), 0
    for number in range(2):
        given_inputs = inputs_of(problem, QuadraticLoss(problem, number, noise=3.0, lengths=(4,) * 12))
        found = Search(screen=0.1, patience=9, least_gain=0, rounds=9).allocate(given_inputs)
        losses = [loss for _, loss in found.curve]
        assert losses == sorted(set(losses), reverse=True)
        refused += sum(measured >= 0 for _, measured in found.predictions)
    assert refused > 0


def test_what_a_few_samples_show_to_be_worse_is_not_measured_on_all():
    problem = problem_of(SHAPES)
    given_inputs, start = inputs_of(problem), inputs_of(problem)
    Search(rounds=0).allocate(start)
    known, measure = set(start.loss.few), given_inputs.loss.exact
    given_inputs.loss.exact = lambda c, samples=None: (
        measure(c, samples) + 100.0 * (samples is not None and c not in known)
    )
    found = Search(rounds=2).allocate(given_inputs)  # from the third round on, all samples measure
    assert len(given_inputs.loss.few) > len(known) + 3 and given_inputs.loss.full == start.loss.full
    assert found.predictions == ()


def test_predictions_are_exact_where_the_loss_adds_up_over_the_units():
    problem = problem_of(SHAPES)
    given_inputs = inputs_of(problem, QuadraticLoss(problem, cross=0.0, noise=0.0))
    found = Search(screen=1.0, seeds=1).allocate(given_inputs)
    assert len(found.predictions) > 2
    for predicted, measured in found.predictions:
        assert predicted < 0 and measured == pytest.approx(predicted, rel=1e-9)
    best = problem.solve(np.array([
        [given_inputs.loss.exact((*[0] * u, k, *[0] * (11 - u))) for k in range(len(problem.menu))]
        for u in range(12)
    ]))  # fmt: skip
    assert found.loss == pytest.approx(given_inputs.loss.exact(best), rel=1e-9)
    assert found.loss < 0.9 * found.uniform_loss


def test_a_prediction_stands_beside_the_change_that_was_measured():
    problem = problem_of(SHAPES)
    given_inputs = inputs_of(problem)
    found = Search().allocate(given_inputs)
    later = given_inputs.loss.full[len(given_inputs.loss.full) - len(found.predictions) :]
    now = min(map(given_inputs.loss.exact, given_inputs.loss.full[: -len(found.predictions)]))
    for choice, (predicted, measured) in zip(later, found.predictions, strict=True):
        assert predicted < 0 and measured == given_inputs.loss.exact(choice) - now
        now += min(measured, 0.0)
        now = min(
            map(given_inputs.loss.exact, given_inputs.loss.full[: given_inputs.loss.full.index(choice) + 1])
        )


@pytest.mark.parametrize("reach", [1, 3])
def test_no_unit_moves_further_than_the_reach_in_a_round(reach):
    problem = problem_of(SHAPES)
    given_inputs = inputs_of(problem)
    Search(reach=reach, patience=9, least_gain=0, rounds=6).allocate(given_inputs)
    loss = given_inputs.loss
    steps = [
        np.abs(np.subtract(a, b)).max()
        for (a, *_), (b, *_) in itertools.pairwise(loss.asked)
        if a != b
    ]  # fmt: skip
    assert {asked[2] for asked in loss.asked} == {reach} and 1 <= max(steps) <= reach


def test_rounds_without_a_move_look_at_more_samples():
    problem = problem_of(SHAPES)
    loss = QuadraticLoss(problem, lengths=(5,) * 20)
    loss.gradients_of = loss.move_gradients

    def useless(choice, samples, reach, seed):
        first_order, curvature_samples = loss.gradients_of(choice, samples, reach, seed)
        return np.zeros_like(first_order), curvature_samples

    loss.move_gradients = useless
    Search(patience=4, least_gain=0, screen=0.2).allocate(inputs_of(problem, loss))
    assert [len(samples) for _, samples, *_ in loss.asked] == [4, 8, 10, *[10] * 4]


def distorted(problem, number):
    """A loss whose gradients err for every move by a factor of its own, the same in every round."""
    loss = QuadraticLoss(problem, number, cross=0.3, noise=0.05)
    measure = loss.move_gradients
    factors = 1 + np.random.default_rng(number).normal(0, 1, loss.change.shape[:2])

    def gradients(choice, samples, reach, seed):
        found, curvature_samples = measure(choice, samples, reach, seed)
        return found * np.where(found > 0, factors, 2 - factors), curvature_samples

    loss.move_gradients = gradients
    return loss


def test_moves_measured_alone_find_what_wrong_move_gradients_hide():
    problem, shares = problem_of(SHAPES * 2), []
    for number in range(4):
        with_probes, without = (
            Search(probes=probes).allocate(inputs_of(problem, distorted(problem, number), holdout=None)).loss
            for probes in (12, 0)
        )
        shares.append(with_probes / without)
    assert max(shares) <= 1 and np.mean(shares) < 0.97


def test_what_is_measured_off_the_budget_is_one_move_and_never_a_result():
    problem, seen = problem_of(SHAPES), 0
    for number in range(4):
        given_inputs = inputs_of(problem, distorted(problem, number))
        found = Search(probes=3, proposals=2).allocate(given_inputs)
        loss = given_inputs.loss
        off = [c for c in {*loss.few, *loss.full} if problem.total_kept(c) != problem.budget.kept]
        seen += len(off)
        for choice in off:
            assert min(np.not_equal(choice, kept).sum() for kept in loss.kept) == 1
        results = {found.choice, *(choice for _, choice in found.incumbents), *loss.kept}
        assert not results & set(off)
        assert {value for _, value in found.curve} <= {loss.exact(c) for c in loss.full if c not in off}
    assert seen


def test_no_more_moves_are_measured_alone_than_asked_for():
    problem = problem_of(SHAPES)
    for probes in (0, 2):
        given_inputs = inputs_of(problem, distorted(problem, 0))
        Search(probes=probes, rounds=5, patience=9, least_gain=0).allocate(given_inputs)
        loss = given_inputs.loss
        off = [c for c in loss.few if problem.total_kept(c) != problem.budget.kept]
        assert len(off) <= 5 * probes and (off or not probes)


def test_no_round_begins_that_could_not_change_the_result():
    problem, rounds = problem_of(SHAPES), 0
    for limit in range(100, 900, 23):
        begun, given_inputs = [], inputs_of(problem)
        loss, holdout = given_inputs.loss, given_inputs.holdout
        gradients = loss.move_gradients
        loss.move_gradients = lambda *a, g=gradients, b=begun, at=(loss, holdout): (
            b.append(sum(each.forward_tokens for each in at)) or g(*a)
        )
        Search(rounds=3, least_gain=0, max_tokens=limit).allocate(given_inputs)
        least = 5 * min(loss.lengths) + sum(loss.lengths) + sum(holdout.lengths)
        assert all(limit - at >= least for at in begun)
        rounds += len(begun)
    assert rounds
