"""Our search: what it finds, when it ends, and which of its incumbents is the result."""

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msp_plugin.allocators.budgeted_losses import BudgetedLosses
from msp_plugin.allocators.proposals import make_seeds
from msp_plugin.allocators.search import LEAST_READINGS, TOKENS_PER_UNIT, Search
from msp_plugin.allocators.selection import GAIN_ROUNDS
from msp_plugin.errors import RecipeError
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.menus import DEFAULT_LEVELS, parse_menu
from tests.allocators.quadratic import LENGTHS, SHAPES, QuadraticLoss, inputs_of, problem_of

SHORT = Search(rounds=4, seeds=5)
AWKWARD = ["dense", "4:8", "2:4", "3:8 in 2:4", "2:8", "1:12", "0.7"]


def optimum(problem, loss):
    rows = [range(len(problem.menu))] * len(problem.table)
    on_budget = (c for c in itertools.product(*rows) if problem.total_kept(c) == problem.budget.kept)
    return min(map(loss.exact, on_budget))


@st.composite
def problems(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([24, 48])), min_size=1, max_size=6))
    menu = parse_menu(
        draw(st.lists(st.sampled_from([*DEFAULT_LEVELS, *AWKWARD]), min_size=2, max_size=6, unique=True))
    )
    allowed = None
    if draw(st.booleans()):
        allowed = np.random.default_rng(draw(st.integers(0, 99))).random((len(shapes), len(menu))) < 0.7
        allowed[:, draw(st.integers(0, len(menu) - 1))] = True
    bare = problem_of(shapes, [level.name for level in menu], menu[0].sparsity)
    reach = AllocationProblem(bare.table, menu, menu[0].sparsity, allowed).reach
    low, high = (1 - kept / bare.table.weights for kept in reach)
    share = draw(st.fractions(0, 1, max_denominator=16))
    kept = reach[0] + share * (reach[1] - reach[0])
    assert low >= high
    return AllocationProblem(bare.table, menu, 1 - kept / bare.table.weights, allowed)


@pytest.mark.parametrize(
    "levels", [["dense", "6:8", "4:8", "2:8", "1:8"], pytest.param(AWKWARD, marks=pytest.mark.slow)]
)
def test_the_search_comes_near_the_best_of_all_choices(levels):
    problem, gaps = problem_of(SHAPES[:5], levels, "1/2"), []
    for number in range(8):
        given_inputs = inputs_of(problem, number=number, holdout=None)
        found = Search().allocate(given_inputs)
        best, uniform = optimum(problem, given_inputs.loss), given_inputs.loss.exact(problem.uniform())
        assert found.loss == given_inputs.loss.exact(found.choice) <= found.uniform_loss == uniform
        gaps.append((found.loss - best) / (uniform - best))
    assert min(gaps) >= -1e-9 and sum(gap < 1e-9 for gap in gaps) >= 4
    assert sorted(gaps)[-2] < 0.1 and np.mean(gaps) < 0.05


def test_the_search_improves_on_its_seeds_where_units_interact():
    problem, gains = problem_of(SHAPES + SHAPES[:6]), []
    for number in range(4):
        first, second = (inputs_of(problem, number=number) for _ in range(2))
        seed = Search(rounds=0).allocate(first)
        found = Search().allocate(second)
        assert second.holdout.exact(found.choice) <= first.holdout.exact(seed.choice)
        gains.append(found.loss / seed.loss)
    assert max(gains) <= 0.95


@given(problems(), st.integers(0, 10**6))
@settings(max_examples=15)
def test_every_choice_is_allowed_and_on_the_budget_and_the_result_is_no_worse_than_uniform(problem, number):
    given_inputs = inputs_of(problem, number=number, seed=number)
    found = SHORT.allocate(given_inputs)
    loss, holdout, uniform = given_inputs.loss, given_inputs.holdout, problem.uniform()
    single = {c for c in loss.few if any(sum(map(int.__ne__, c, kept)) == 1 for kept in loss.kept)}
    measured = {*loss.full, *holdout.full, *loss.kept, *(choice for choice, *_ in loss.asked)}
    measured |= set(loss.few) - single
    assert {problem.total_kept(choice) for choice in measured} == {problem.budget.kept}
    if problem.allowed is not None:
        assert all(problem.allowed[np.arange(len(choice)), list(choice)].all() for choice in measured)
    weights = [sum(loss.lengths), sum(holdout.lengths)]
    both = [
        np.average([part.exact(c) for part in (loss, holdout)], weights=weights)
        for c in (found.choice, uniform)
    ]
    assert both[0] <= both[1] * (1 + 1e-12)
    assert (found.loss, found.uniform_loss) == (loss.exact(found.choice), loss.exact(uniform))
    assert found.evaluations == len(set(loss.full)) + len(loss.few) and len(set(loss.full)) == len(loss.full)


def test_no_sample_measures_a_choice_twice_where_all_are_equally_long():
    problem, reread = problem_of(SHAPES), []
    for lengths in ((8,) * 6, (8,) * 5 + (7,)):
        loss = QuadraticLoss(problem, lengths=lengths)
        losses = BudgetedLosses(inputs_of(problem, loss), 0, 0, lambda: None)
        losses.screening_loss(problem.uniform(), (1, 4))
        assert losses.search_loss(problem.uniform()) == pytest.approx(
            loss.exact(problem.uniform()), rel=1e-12
        )
        reread.append(loss.forward_tokens - sum(lengths))
    assert reread == [0, 16]


@given(problems(), st.integers(0, 10**6))
@settings(max_examples=5)
def test_the_same_seed_gives_the_same_search(problem, seed):
    first, second = (inputs_of(problem, seed=seed, number=3) for _ in range(2))
    assert SHORT.allocate(first) == SHORT.allocate(second)
    assert (first.loss.full, first.loss.few, first.loss.asked) == (
        second.loss.full, second.loss.few, second.loss.asked,
    )  # fmt: skip


def test_another_seed_draws_other_samples():
    problem = problem_of(SHAPES)
    first, second = (inputs_of(problem, seed=seed) for seed in (0, 1))
    for given_inputs in (first, second):
        Search().allocate(given_inputs)
    assert first.loss.asked != second.loss.asked


def test_without_a_round_the_best_seed_is_the_result():
    problem = problem_of(SHAPES)
    given_inputs = inputs_of(problem)
    found = Search(rounds=0).allocate(given_inputs)
    loss = given_inputs.loss
    assert not loss.asked and len(loss.full) == len(set(loss.full)) == 2
    assert (
        loss.full[0] == problem.uniform()
        and found.loss == min(map(loss.exact, loss.full)) < found.uniform_loss
    )
    assert len(loss.few) == len(set(loss.few)) == 8 and found.predictions == ()


def test_a_search_takes_no_more_tokens_than_it_may_and_returns_what_it_had_found(caplog):
    problem = problem_of(SHAPES)
    free = inputs_of(problem)
    whole = Search(rounds=6, patience=9, least_gain=0).allocate(free)
    uniform = sum(free.loss.lengths) + sum(free.holdout.lengths)
    ends = set()
    for limit in [1, *range(uniform - 1, spent(free), 61), 2 * spent(free)]:
        limited = inputs_of(problem)
        found = Search(rounds=6, patience=9, least_gain=0, max_tokens=limit).allocate(limited)
        # a few seeds may have been measured before there was no more for uniform
        assert spent(limited) <= (limit if found.incumbents[0][0] <= limit else limit + uniform)
        assert problem.total_kept(found.choice) == problem.budget.kept
        assert found.choice == found.incumbents[-1][1] and found.loss == limited.loss.exact(found.choice)
        assert found.uniform_loss == limited.loss.exact(problem.uniform())
        chosen = [[choice for _, choice in result.incumbents] for result in (found, whole)]
        assert chosen[0] == chosen[1][: len(chosen[0])]
        assert bool(found.notes) == (limit < spent(free))
        ends.update(found.notes)
    assert {"its budget ended the search in round 3", "its budget ended the search in round 6"} <= ends
    assert "before the first round: uniform is returned; give max_tokens" in caplog.text


def test_a_search_that_ends_among_its_seeds_returns_uniform():
    problem = problem_of(SHAPES)
    free = inputs_of(problem)
    Search(rounds=0).allocate(free)
    ends = set()
    for limit in range(1, spent(free)):
        found = Search(max_tokens=limit).allocate(inputs_of(problem))
        assert found.choice == problem.uniform() and found.loss == found.uniform_loss
        ends |= set(found.notes)
    assert ends == {"its budget ended the search among its seeds, before the first round"}


def test_seeds_that_one_long_sample_has_measured_are_results_whatever_ended_the_search():
    problem = problem_of(SHAPES)
    loss = QuadraticLoss(problem, lengths=(40,))
    found = Search(max_tokens=5 * 40 + 39).allocate(inputs_of(problem, loss))
    assert found.loss == min(map(loss.exact, loss.full)) < found.uniform_loss
    assert "among its seeds" in found.notes[0]


def spent(inputs):
    return inputs.loss.forward_tokens + inputs.holdout.forward_tokens


def test_seconds_let_no_round_start_after_them():
    problem, clock = problem_of(SHAPES), [0.0]

    class Slow(QuadraticLoss):
        def move_gradients(self, *arguments):
            clock[0] += 10
            return super().move_gradients(*arguments)

    for seconds, rounds in ((25, 3), (9, 1), (0, 6)):
        clock[0] = 1e6
        given_inputs = replace(inputs_of(problem, Slow(problem)), clock=lambda: clock[0])
        found = Search(rounds=6, patience=9, least_gain=0, seconds=seconds).allocate(given_inputs)
        assert len(given_inputs.loss.asked) == rounds
        assert found.loss <= found.uniform_loss


@pytest.mark.parametrize("patience", [1, 3])
def test_a_holdout_that_objects_to_every_move_ends_the_search_at_uniform(patience):
    problem = problem_of(SHAPES)
    loss, holdout = QuadraticLoss(problem, lengths=(5,) * 20), QuadraticLoss(problem)
    holdout.exact = lambda choice, samples=None: 1e6 * (choice != problem.uniform())
    found = Search(patience=patience, screen=0.3).allocate(inputs_of(problem, loss, holdout=holdout))
    assert [len(samples) for _, samples, *_ in loss.asked] == [6, 10, *[10] * patience]
    assert found.choice == problem.uniform() and found.loss == found.uniform_loss


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_holdout_decides_of_no_proposal_only_of_how_many_samples_measure_the_next(sign):
    problem = problem_of(SHAPES)
    usual, other = inputs_of(problem), inputs_of(problem)
    plain = other.holdout.exact
    other.holdout.exact = lambda choice, samples=None: sign * plain(choice) + 0.5 * hash(choice) % 7
    options = Search(rounds=6, patience=7, least_gain=0, screen=1.0)
    first, second = options.allocate(usual), options.allocate(other)
    assert (usual.loss.full, usual.loss.few, usual.loss.asked) == (
        other.loss.full, other.loss.few, other.loss.asked,
    )  # fmt: skip
    assert len(usual.loss.asked) == 6 and first.predictions == second.predictions
    assert [loss for _, loss in first.curve] == [loss for _, loss in second.curve]


def test_the_result_is_the_incumbent_with_the_least_loss_on_search_text_and_holdout_together():
    problem, apart = problem_of(SHAPES), 0
    for number in range(4):
        given_inputs = inputs_of(problem, QuadraticLoss(problem, number, noise=3.0))
        found = Search(patience=30, rounds=12).allocate(given_inputs)
        loss, holdout = given_inputs.loss, given_inputs.holdout
        weights, incumbents = [sum(loss.lengths), sum(holdout.lengths)], dict.fromkeys(holdout.full)
        both = {c: np.average([loss.exact(c), holdout.exact(c)], weights=weights) for c in incumbents}
        assert found.choice == min(both, key=both.get)
        assert [loss for _, loss in found.holdout] == [holdout.exact(choice) for choice in incumbents]
        assert {choice for choice, *_ in loss.asked} <= set(incumbents) <= set(loss.full)
        apart += found.choice != min(incumbents, key=holdout.exact)
    assert apart > 0


def test_without_a_holdout_the_search_text_takes_its_place():
    problem = problem_of(SHAPES)
    given_inputs = inputs_of(problem, holdout=None)
    found = SHORT.allocate(given_inputs)
    assert found.loss == min(loss for _, loss in found.curve) == min(loss for _, loss in found.holdout)


@given(problems(), st.integers(0, 1000))
@settings(max_examples=8)
def test_the_curve_falls_while_the_tokens_grow(problem, number):
    given_inputs = inputs_of(problem, number=number)
    found = SHORT.allocate(given_inputs)
    for curve in (found.curve, found.holdout, found.incumbents):
        tokens = [at for at, _ in curve]
        assert tokens == sorted(set(tokens)) and tokens[0] > 0 and tokens[-1] <= spent(given_inputs)
    losses = [loss for _, loss in found.curve]
    assert losses == sorted(set(losses), reverse=True) and losses[0] == found.uniform_loss
    choices = [choice for _, choice in found.incumbents]
    assert choices[0] == problem.uniform() and choices[-1] == found.choice


@pytest.mark.parametrize(
    "shapes, levels", [([(4, 8)], DEFAULT_LEVELS), ([(4, 8)] * 3, ["3:8"]), ([(4, 8)], ["3:8"])]
)
def test_a_problem_with_one_choice_gives_that_choice(shapes, levels):
    problem = problem_of(shapes, levels)
    assert SHORT.allocate(inputs_of(problem)).choice == problem.uniform()


def test_progress_rises_to_its_total():
    seen = []
    Search(rounds=5).allocate(inputs_of(problem_of(SHAPES), progress=lambda *at: seen.append(at)))
    done = [at for at, *_ in seen]
    assert {total for _, total, _ in seen} == {100} and done == sorted(done) and done[-1] == 100
    stages = list(dict.fromkeys(note.split(",")[0] for *_, note in seen))
    assert stages == ["start", *(f"round {n}" for n in range(1, len(stages)))] and len(stages) > 2
    words = r"round \d, loss (\S+), uniform (\S+), gain (\S+)"
    best, uniform, gain = map(float, re.fullmatch(words, seen[-1][2]).groups())
    assert gain == pytest.approx(uniform - best, abs=1e-4) and gain > 0


def test_no_part_of_a_search_is_silent_for_longer_than_its_longest_measurement():
    problem, reported = problem_of(SHAPES), [0]
    given_inputs = inputs_of(problem)
    losses = (given_inputs.loss, given_inputs.holdout)

    def report(*_):
        reported.append(sum(loss.forward_tokens for loss in losses))

    Search(rounds=3).allocate(replace(given_inputs, progress=report))
    longest = max(5 * math.ceil(sum(LENGTHS) / 2), sum(LENGTHS), sum(losses[1].lengths))
    assert max(np.diff(reported)) <= longest and reported[-1] > 4 * longest


def test_a_search_ends_when_a_round_promises_too_little_and_says_why():
    problem = problem_of(SHAPES + SHAPES[:6])
    ends, counts = [], []
    for least_gain in (0.0, 0.02, 0.5):
        given_inputs = inputs_of(problem)
        found = Search(least_gain=least_gain, patience=3, screen=1.0).allocate(given_inputs)
        ends.append(found.ended)
        counts.append(len(given_inputs.loss.asked))
    assert counts == sorted(counts, reverse=True) and counts[-1] == GAIN_ROUNDS < counts[0]
    assert "no proposal was better" in ends[0] and "least_gain = 0.5" in ends[2]


def test_the_default_budget_grows_with_the_units():
    given_inputs = inputs_of(problem_of(SHAPES))
    given_inputs.loss.lengths = tuple(2000 * n for n in given_inputs.loss.lengths)
    Search(least_gain=0, patience=99).allocate(given_inputs)
    least = LEAST_READINGS * (Search.tokens + Search.holdout)
    assert least / 2 < given_inputs.loss.forward_tokens <= least
    assert Search().token_limit(288) == TOKENS_PER_UNIT * 288 > least == Search().token_limit(1)
    assert Search(max_tokens=7).token_limit(288) == 7


@pytest.mark.parametrize("option, value", [
    ("rounds", -1), ("patience", 0), ("max_tokens", -1), ("least_gain", -0.1), ("seconds", -0.1), ("seconds", math.nan),
    ("seeds", 0),
    ("reach", 0), ("proposals", 0), ("tokens", 0), ("holdout", 0), ("screen", 0.0), ("screen", 1.1),
    ("screen", math.nan), ("decay", -0.1), ("decay", 1.1), ("decay", math.nan), ("loss", "mse"),
])  # fmt: skip
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(RecipeError, match=f"search: .*{option}"):
        Search(**{option: value})


def test_it_says_what_it_reads():
    search = Search(tokens=100, holdout=50, loss="perplexity")
    assert (search.held_out_tokens, search.stopping_tokens, search.objective) == (100, 50, "perplexity")
    assert Search.needs_database and Search.seeded and Search.sensitivities == ("fisher",)
    assert Search.errors == ("weight", "kfac")


def test_the_minimum_of_the_kfac_error_is_measured_as_a_seed():
    problem = problem_of(SHAPES)
    given_inputs = inputs_of(problem)
    others = {problem.uniform(), *(problem.solve(given_inputs.errors[name]) for name in ("fisher", "output"))}
    kfac = np.random.default_rng(0).random(given_inputs.errors["kfac"].shape)
    best = problem.solve(kfac)
    assert best not in others
    given_inputs = replace(given_inputs, errors={**given_inputs.errors, "kfac": kfac})
    Search(rounds=0, seeds=2).allocate(given_inputs)
    assert best in given_inputs.loss.full


def test_seeds_of_equal_errors_are_measured_once():
    problem = problem_of(SHAPES)
    given_inputs = inputs_of(problem)
    same = replace(given_inputs, errors={**given_inputs.errors, "kfac": given_inputs.errors["fisher"]})
    choices = list(make_seeds(same, 10))
    assert len(set(choices)) == len(choices) and problem.solve(same.errors["fisher"]) in choices
