"""Our search on made-up losses: exact quadratic functions of the choice, with cross terms between units."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msp_plugin.allocators.base import AllocationInputs
from msp_plugin.allocators.search import Search, _Local
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.levels import DEFAULT_LEVELS, parse_menu, parse_sparsity
from msp_plugin.plan.units import Layer, Unit, UnitTable

LENGTHS = (7, 5, 9, 6, 8, 4)
SHORT = Search(rounds=4, seeds=5)
AWKWARD = ["dense", "4:8", "2:4", "3:8 in 2:4", "2:8", "1:12", "0.7"]
SHAPES = [(4, 24), (16, 48), (1, 24), (8, 48), (3, 96), (2, 24)] * 2


def problem_of(shapes, levels=DEFAULT_LEVELS, target="5/8", allowed=None):
    units = tuple(Unit(str(u), u, (Layer(str(u), *shape),)) for u, shape in enumerate(shapes))
    return AllocationProblem(UnitTable(units), parse_menu(levels), parse_sparsity(target), allowed)


class QuadraticLoss:
    """1/2 (w - v)^T H_s (w - v) for sample s: w the dense weights, v the choice's. H_s has cross terms.

    Every unit has four numbers, which fade as it keeps less. Remembers what was asked for.
    """

    def __init__(self, problem, seed=0, sample_seed=0, cross=1.0, noise=0.3, lengths=LENGTHS):
        rng, units = np.random.default_rng(seed), len(problem.table)
        sizes = np.array([unit.weights for unit in problem.table])
        gone = 1 - problem.kept / sizes[:, None]
        fade = rng.uniform(0.7, 1.8, (units, 1, 4))
        self.change = -rng.normal(0, 1, (units, 1, 4)) * gone[:, :, None] ** fade
        root = rng.normal(0, 1, (units * 4, units * 4)) * rng.lognormal(0, 0.7, units).repeat(4)
        own = np.kron(np.eye(units), np.ones((4, 4)))
        shared = root * (own + cross * (1 - own))
        noises = np.random.default_rng(1000 + sample_seed).normal(0, noise, (len(lengths), *root.shape))
        self.hessians = [
            (shared + n * own).T @ (shared + n * own) / units if cross else own * ((root + n).T @ (root + n))
            for n in noises
        ]
        self.lengths, self.forward_tokens = tuple(lengths), 0
        self.full, self.few, self.kept, self.asked = [], [], [], []
        self.odd = {}

    def exact(self, choice, samples=None):
        """The loss without counting or remembering."""
        numbers = range(len(self.lengths)) if samples is None else samples
        x = self.change[np.arange(len(choice)), list(choice)].ravel()
        tokens = [self.lengths[i] for i in numbers]
        return float(np.average([0.5 * x @ self.hessians[i] @ x for i in numbers], weights=tokens))

    def __call__(self, choice, samples=None):
        (self.full if samples is None else self.few).append(choice)
        self.forward_tokens += sum(self.lengths if samples is None else (self.lengths[i] for i in samples))
        return self.odd.get(choice, self.exact(choice, samples))

    def slopes(self, choice, samples, reach, seed):
        self.asked.append((choice, tuple(samples), reach, seed))
        self.forward_tokens += 5 * sum(self.lengths[i] for i in samples)
        units, levels = self.change.shape[:2]
        x = self.change[np.arange(units), list(choice)].ravel()
        slopes, draws = np.zeros((2, len(samples), units, levels))
        for s, i in enumerate(samples):
            gradient = (self.hessians[i] @ x).reshape(units, 4)
            for u, k in itertools.product(range(units), range(levels)):
                if 0 < abs(k - choice[u]) <= reach:
                    d = self.change[u, k] - self.change[u, choice[u]]
                    block = self.hessians[i][4 * u : 4 * u + 4, 4 * u : 4 * u + 4]
                    slopes[s, u, k], draws[s, u, k] = gradient[u] @ d, math.sqrt(max(d @ block @ d, 0.0))
        return slopes, draws

    def keep(self, choice):
        self.kept.append(choice)


def inputs_of(problem, loss=None, holdout="other text", seed=0, progress=lambda *at: None, number=0):
    loss = loss or QuadraticLoss(problem, number)
    if holdout == "other text":
        holdout = QuadraticLoss(problem, number, sample_seed=1, lengths=(6, 8, 5))
    blocks = np.mean(loss.hessians, axis=0).reshape(len(problem.table), 4, len(problem.table), 4)
    blocks = np.stack([blocks[u, :, u] for u in range(len(problem.table))])
    errors = {
        "weight": (loss.change**2).sum(-1),
        "output": np.einsum("uki,uij,ukj->uk", loss.change, blocks, loss.change),
        "fisher": 0.5 * np.einsum("uki,uii->uk", loss.change**2, blocks),
    }
    trace = np.einsum("uii->u", blocks)
    return AllocationInputs(problem, {"fisher": trace}, errors, loss, seed, progress, holdout)


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


@pytest.mark.parametrize("levels", [["dense", "6:8", "4:8", "2:8", "1:8"], AWKWARD])
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
@settings(max_examples=30)
def test_every_choice_is_allowed_and_on_the_budget_and_the_result_is_no_worse_than_uniform(problem, number):
    given_inputs = inputs_of(problem, number=number, seed=number)
    found = SHORT.allocate(given_inputs)
    loss, holdout, uniform = given_inputs.loss, given_inputs.holdout, problem.uniform()
    measured = {*loss.full, *loss.few, *holdout.full, *loss.kept, *(choice for choice, *_ in loss.asked)}
    assert {problem.total_kept(choice) for choice in measured} == {problem.budget.kept}
    if problem.allowed is not None:
        assert all(problem.allowed[np.arange(len(choice)), list(choice)].all() for choice in measured)
    assert holdout.exact(found.choice) <= holdout.exact(uniform)
    assert (found.loss, found.uniform_loss) == (loss.exact(found.choice), loss.exact(uniform))
    assert found.evaluations == len(set(loss.full)) + len(loss.few) and len(set(loss.full)) == len(loss.full)


@given(problems(), st.integers(0, 10**6))
@settings(max_examples=10)
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


@pytest.mark.parametrize("options", [{"rounds": 0}, {"max_tokens": 1}])
def test_without_a_round_the_best_seed_is_the_result(options):
    problem = problem_of(SHAPES)
    given_inputs = inputs_of(problem)
    found = Search(**options).allocate(given_inputs)
    loss = given_inputs.loss
    assert not loss.asked and len(loss.full) == len(set(loss.full)) <= 4
    assert (
        loss.full[0] == problem.uniform()
        and found.loss == min(map(loss.exact, loss.full)) < found.uniform_loss
    )
    assert len(loss.few) == len(set(loss.few)) == 10 and found.predictions == ()


def test_max_tokens_lets_no_round_start_beyond_it():
    problem, at = problem_of(SHAPES), []
    counted = inputs_of(problem, progress=lambda *_: at.append(spent(counted)))
    Search(rounds=6, patience=9).allocate(counted)
    for limit, rounds in ((at[3], 3), (at[3] + 1, 4), (at[0] + 1, 1)):
        limited, short = inputs_of(problem), inputs_of(problem)
        found = Search(rounds=6, patience=9, max_tokens=limit).allocate(limited)
        assert (
            found == Search(rounds=rounds, patience=9).allocate(short) and len(limited.loss.asked) == rounds
        )
        assert problem.total_kept(found.choice) == problem.budget.kept


def spent(inputs):
    return inputs.loss.forward_tokens + inputs.holdout.forward_tokens


def test_seconds_let_no_round_start_after_them(monkeypatch):
    problem, clock, real = problem_of(SHAPES), [0.0], time.monotonic

    class Slow(QuadraticLoss):
        def slopes(self, *arguments):
            clock[0] += 10
            return super().slopes(*arguments)

    monkeypatch.setattr("msp_plugin.allocators.search.time.monotonic", lambda: clock[0])
    for seconds, rounds in ((25, 3), (9, 1), (0, 6)):
        clock[0] = real()
        given_inputs = inputs_of(problem, Slow(problem))
        found = Search(rounds=6, patience=9, seconds=seconds).allocate(given_inputs)
        assert len(given_inputs.loss.asked) == rounds
        assert found.loss <= found.uniform_loss


@pytest.mark.parametrize("patience", [1, 3])
def test_a_holdout_that_never_improves_ends_the_search_at_uniform(patience):
    problem = problem_of(SHAPES)
    holdout = QuadraticLoss(problem)
    holdout.exact = lambda choice, samples=None: 1.0
    given_inputs = inputs_of(problem, holdout=holdout)
    found = Search(patience=patience).allocate(given_inputs)
    assert len(given_inputs.loss.asked) == patience and found.choice == problem.uniform()
    assert found.loss == found.uniform_loss and {loss for _, loss in found.holdout} == {1.0}


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_holdout_never_steers_what_is_proposed(sign):
    problem = problem_of(SHAPES)
    usual, other = inputs_of(problem), inputs_of(problem)
    plain = other.holdout.exact
    other.holdout.exact = lambda choice, samples=None: sign * plain(choice) + 0.5 * hash(choice) % 7
    options = Search(rounds=6, patience=7)
    first, second = options.allocate(usual), options.allocate(other)
    assert (usual.loss.full, usual.loss.few, usual.loss.asked) == (
        other.loss.full, other.loss.few, other.loss.asked,
    )  # fmt: skip
    assert len(usual.loss.asked) == 6 and first.predictions == second.predictions
    assert [loss for _, loss in first.curve] == [loss for _, loss in second.curve]


def test_the_result_is_the_incumbent_that_the_holdout_likes_best():
    problem = problem_of(SHAPES)
    given_inputs = inputs_of(problem, QuadraticLoss(problem, noise=1.0))
    found = Search(patience=30, rounds=12).allocate(given_inputs)
    holdout = given_inputs.holdout
    assert found.choice == min(dict.fromkeys(holdout.full), key=holdout.exact)
    assert [loss for _, loss in found.holdout] == [holdout.exact(choice) for choice in holdout.full]
    assert (
        {choice for choice, *_ in given_inputs.loss.asked} <= set(holdout.full) <= set(given_inputs.loss.full)
    )


def test_without_a_holdout_the_search_text_takes_its_place():
    problem = problem_of(SHAPES)
    given_inputs = inputs_of(problem, holdout=None)
    found = SHORT.allocate(given_inputs)
    assert found.loss == min(loss for _, loss in found.curve) == min(loss for _, loss in found.holdout)


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
    bad = set(plain.loss.full[4:])
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
        with pytest.raises(NumericsError, match="none of 10 seeds has a finite loss") as error:
            Search().allocate(given_inputs)
        assert "float32" in error.value.hint


@given(problems(), st.integers(0, 1000))
@settings(max_examples=15)
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


def test_a_proposal_that_was_measured_and_refused_is_no_point_of_the_curve():
    problem, refused = problem_of(SHAPES), 0
    for number in range(4):
        given_inputs = inputs_of(problem, QuadraticLoss(problem, number, noise=3.0, lengths=(4,) * 12))
        found = Search(screen=0.1, patience=9, rounds=9).allocate(given_inputs)
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
    found = Search().allocate(given_inputs)
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
    Search(reach=reach, patience=9, rounds=6).allocate(given_inputs)
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
    loss.slopes_of = loss.slopes

    def useless(choice, samples, reach, seed):
        slopes, draws = loss.slopes_of(choice, samples, reach, seed)
        return np.zeros_like(slopes), draws

    loss.slopes = useless
    Search(patience=4, screen=0.2).allocate(inputs_of(problem, loss))
    assert [len(samples) for _, samples, *_ in loss.asked] == [4, 6, 9, 10]


def test_known_slopes_fade_and_a_unit_that_moved_starts_anew():
    local = _Local(2, 3, decay=0.5)
    slopes, draws = np.ones((4, 2, 3)), np.full((4, 2, 3), 2.0)
    slopes[:, :, 0] = draws[:, :, 0] = 0.0
    local.add((0, 0), slopes, draws)
    assert local.cost((0, 0)).tolist() == [[0, 3, 3], [0, 3, 3]]
    later = np.full((1, 2, 3), 7.0)
    local.add((0, 1), later, np.full((1, 2, 3), 1e-9))
    old = (0.5 * 4 * 3 + 7) / (0.5 * 4 + 1)
    assert local.cost((0, 1)) == pytest.approx(np.array([[0, old, old], [7, 0, 7]]))
    unknown = _Local(1, 3, decay=0.5)
    unknown.add((1,), np.zeros((1, 1, 3)), np.array([[[0.0, 0.0, 1.0]]]))
    assert unknown.cost((1,)).tolist() == [[np.inf, 0.0, 0.5]]


@pytest.mark.parametrize(
    "shapes, levels", [([(4, 8)], DEFAULT_LEVELS), ([(4, 8)] * 3, ["3:8"]), ([(4, 8)], ["3:8"])]
)
def test_a_problem_with_one_choice_gives_that_choice(shapes, levels):
    problem = problem_of(shapes, levels)
    assert SHORT.allocate(inputs_of(problem)).choice == problem.uniform()


def test_progress_rises_to_its_total():
    seen = []
    Search(rounds=5).allocate(inputs_of(problem_of(SHAPES), progress=lambda *at: seen.append(at)))
    done = [at for at, _ in seen]
    assert {total for _, total in seen} == {5} and done == sorted(done) and done[-1] == 5


@pytest.mark.parametrize("option, value", [
    ("rounds", -1), ("patience", 0), ("max_tokens", -1), ("seconds", -0.1), ("seconds", math.nan),
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
    assert Search.errors == ("weight", "output", "fisher")
