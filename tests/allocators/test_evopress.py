"""EvoPress: mutations, the ladder of stages and its cost, on made-up losses."""

import dataclasses
import itertools
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msp_plugin.allocators.base import AllocationInputs
from msp_plugin.allocators.evopress import EvoPress, swapped
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.fractions import parse_sparsity
from msp_plugin.plan.menus import DEFAULT_LEVELS, parse_menu
from msp_plugin.plan.units import Layer, Unit, UnitTable

SMALL = EvoPress(generations=4, offspring=6, survivors=(3, 1), tokens_per_selection=(8, 16), tokens=24)
SHAPES = [(4, 24), (8, 24), (4, 48), (16, 24), (2, 96)]


def problem_of(shapes, levels=DEFAULT_LEVELS, target="5/8", allowed=None):
    units = tuple(Unit(str(u), u, (Layer(str(u), *shape),)) for u, shape in enumerate(shapes))
    return AllocationProblem(UnitTable(units), parse_menu(levels), parse_sparsity(target), allowed)


class CountingLoss:
    """A loss that adds up over the units; remembers every measurement as (choice, samples)."""

    def __init__(self, values, samples=6, length=4):
        self.values, self.lengths = values, (length,) * samples
        self.forward_tokens, self.seen, self.kept = 0, [], []

    def exact(self, choice):
        return float(self.values[np.arange(len(choice)), list(choice)].sum())

    def __call__(self, choice, samples=None):
        self.seen.append((choice, samples))
        self.forward_tokens += sum(self.lengths if samples is None else (self.lengths[i] for i in samples))
        return self.exact(choice)

    def set_incumbent(self, choice):
        self.kept.append(choice)

    @property
    def stages(self):
        """The choices of each stage of each generation, by its samples."""
        return [
            ([choice for choice, _ in group], samples)
            for samples, group in itertools.groupby(self.seen[1:-1], key=lambda at: at[1])
        ]


def inputs_of(problem, loss=None, seed=0, progress=lambda *at: None):
    values = np.random.default_rng(7).random((len(problem.table), len(problem.menu)))
    return AllocationInputs(problem, {}, {}, loss or CountingLoss(values), seed, progress)


@st.composite
def problems(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([24, 48])), min_size=1, max_size=6))
    menu = parse_menu(
        draw(
            st.lists(
                st.sampled_from([*DEFAULT_LEVELS, "2:4", "1:3", "0.7"]), min_size=1, max_size=6, unique=True
            )
        )
    )
    allowed = None
    if draw(st.booleans()):
        allowed = np.random.default_rng(draw(st.integers(0, 99))).random((len(shapes), len(menu))) < 0.7
        allowed[:, draw(st.integers(0, len(menu) - 1))] = True
    table = problem_of(shapes, ["dense"], 0).table
    reach = AllocationProblem(table, menu, menu[0].sparsity, allowed).reach
    kept = reach[0] + draw(st.fractions(0, 1, max_denominator=16)) * (reach[1] - reach[0])
    return AllocationProblem(table, menu, 1 - kept / table.weights, allowed)


@given(problems(), st.integers(0, 10**6), st.integers(1, 4))
def test_a_mutation_keeps_the_budget_and_the_bounds(problem, seed, most):
    rng = np.random.default_rng(seed)
    parent = problem.solve(rng.random((len(problem.table), len(problem.menu))))
    child = swapped(problem, parent, most, rng)
    assert problem.total_kept(child) == problem.budget.kept and len(child) == len(parent)
    if problem.allowed is not None:
        assert problem.allowed[np.arange(len(child)), list(child)].all()


def test_units_of_unequal_size_trade_equal_counts_of_weights():
    problem = problem_of([(8, 24), (4, 24)], ["dense", "6:8", "4:8", "2:8"], "1/2")
    rng = np.random.default_rng(0)
    children = {swapped(problem, (2, 2), 1, rng) for _ in range(60)}
    assert children == {(3, 0)}  # one level of the large unit is two of the small one


def test_every_neighbour_of_equal_units_is_reached():
    problem = problem_of([(4, 8)] * 3, ["6:8", "4:8", "2:8"], "1/2")
    rng = np.random.default_rng(0)
    assert {swapped(problem, (1, 1, 1), 1, rng) for _ in range(200)} == set(itertools.permutations((0, 1, 2)))


def test_where_no_swap_is_possible_the_parent_stays():
    for shapes, parent in (([(4, 8)], (1,)), ([(4, 8), (4, 8)], (2, 2)), ([(3, 8), (16, 8)], (1, 1))):
        problem = problem_of(shapes, ["6:8", "4:8", "2:8"], "1/2")
        assert swapped(problem, parent, 3, np.random.default_rng(0)) == parent


def test_the_number_of_swaps_is_the_smaller_of_two_draws():
    problem = problem_of([(4, 8)] * 400, ["6:8", "4:8", "2:8"], "1/2")
    rng, counts = np.random.default_rng(3), Counter()
    for _ in range(1800):
        child = swapped(problem, (1,) * 400, 3, rng)
        assert sum(k == 0 for k in child) == sum(k == 2 for k in child)
        counts[sum(k == 2 for k in child)] += 1
    # of 400 units two swaps hit the same one in about 1 % of the mutants
    assert set(counts) <= {1, 2, 3}
    for swaps, share in ((1, 5 / 9), (2, 3 / 9), (3, 1 / 9)):
        deviation = (share * (1 - share) / 1800) ** 0.5
        assert abs(counts[swaps] / 1800 - share) < 3 * deviation + 0.01


def test_bounds_hold_in_every_candidate():
    allowed = np.ones((5, 8), dtype=bool)
    allowed[0, 1:] = False  # dense
    allowed[1, 6:] = False
    allowed[2, [3, 5]] = False
    problem = problem_of(SHAPES, allowed=allowed)
    given_inputs = inputs_of(problem)
    found = EvoPress(generations=20, tokens=24).allocate(given_inputs)
    seen = {choice for choice, _ in given_inputs.loss.seen}
    assert len(seen) > 10 and {choice[0] for choice in seen} == {0} and found.choice in seen
    assert all(allowed[np.arange(5), list(choice)].all() for choice in seen)


@given(problems(), st.integers(0, 1000))
@settings(max_examples=15)
def test_every_candidate_is_on_the_budget_and_the_same_seed_repeats(problem, seed):
    first, second = (inputs_of(problem, seed=seed) for _ in range(2))
    found = SMALL.allocate(first)
    assert {problem.total_kept(choice) for choice, _ in first.loss.seen} == {problem.budget.kept}
    assert SMALL.allocate(second) == found and first.loss.seen == second.loss.seen
    assert found.evaluations == len(first.loss.seen)
    assert (
        found.uniform_loss
        == first.loss.exact(problem.uniform())
        >= found.loss
        == first.loss.exact(found.choice)
    )


def test_each_stage_measures_its_survivors_on_its_tokens():
    problem = problem_of([(4, 8)] * 400)
    loss = CountingLoss(np.random.default_rng(0).random((400, 8)), samples=60, length=4)
    options = EvoPress(generations=3, tokens_per_selection=(9, 40, 200), tokens=240)
    options.allocate(inputs_of(problem, loss))
    assert len(loss.stages) == 9
    for generation in range(3):
        stages = loss.stages[3 * generation : 3 * generation + 3]
        assert [len(samples) for _, samples in stages] == [3, 10, 50]  # whole samples, at least the tokens
        assert [len(choices) for choices, _ in stages] == [64, 8, 3]
        (first, _), (second, _), (third, _) = stages
        parent = loss.kept[generation]
        assert set(second) == set(sorted(first, key=loss.exact)[:8]) and parent not in first
        assert set(third) == {parent, *sorted(second, key=loss.exact)[:2]}
        if generation < 2:
            assert loss.kept[generation + 1] == min(third, key=loss.exact)
    assert len({samples for _, samples in loss.stages}) == 9  # drawn anew each time


def test_the_defaults_cost_what_the_authors_defaults_cost():
    problem = problem_of([(4, 8)] * 900)
    loss = CountingLoss(np.random.default_rng(0).random((900, 8)), samples=64, length=2048)
    options = EvoPress()
    assert (options.generations, options.offspring, options.survivors) == (400, 64, (8, 2, 1))
    assert options.tokens_per_selection == (2048, 16384, 65536) and options.tokens == 65536
    EvoPress(generations=2).allocate(inputs_of(problem, loss, seed=1))
    ends = 2 * 64 * 2048  # uniform at the beginning, the result at the end
    assert (loss.forward_tokens - ends) // 2 * options.generations == 183_500_800


@pytest.mark.parametrize("most", [1, 100, 150, 300])
def test_no_budget_is_exceeded_and_a_generation_that_it_cuts_off_changes_nothing(most):
    problem = problem_of(SHAPES)
    given_inputs = inputs_of(problem)
    found = dataclasses.replace(SMALL, max_tokens=most).allocate(given_inputs)
    whole = sum(given_inputs.true_loss.lengths)
    # the result is measured in any case
    assert given_inputs.true_loss.forward_tokens <= max(most, whole) + whole
    done = int(re.fullmatch(r"because its budget is spent, after (\d+) generations", found.ended)[1])
    unlimited = dataclasses.replace(SMALL, generations=done).allocate(inputs_of(problem))
    assert found.choice == unlimited.choice


def test_tokens_beyond_the_search_text_take_all_of_it():
    problem = problem_of(SHAPES)
    given_inputs = inputs_of(problem)
    EvoPress(generations=1).allocate(given_inputs)
    assert {samples for _, samples in given_inputs.loss.stages} == {tuple(range(6))}


def test_a_parent_that_no_child_beats_stays():
    problem = problem_of(SHAPES)
    uniform = problem.uniform()

    class UniformIsBest(CountingLoss):
        def exact(self, choice):
            return float(choice != uniform)

    loss = UniformIsBest(np.zeros((5, 8)))
    found = EvoPress(generations=5, tokens=24).allocate(inputs_of(problem, loss))
    assert found.choice == uniform and loss.kept == [uniform] * 5 and len(loss.seen) > 100
    assert found.incumbents == ((24, uniform),) and found.loss == found.uniform_loss == 0.0


def test_a_child_that_only_the_first_stages_like_does_not_become_the_parent():
    problem = problem_of(SHAPES)
    uniform = problem.uniform()

    class Misleading(CountingLoss):
        def __call__(self, choice, samples=None):
            super().__call__(choice, samples)
            early = samples is not None and len(samples) < 4
            return float((choice != uniform) * (-1 if early else 1))

    loss = Misleading(np.zeros((5, 8)))
    options = EvoPress(generations=5, offspring=6, survivors=(3, 1), tokens_per_selection=(8, 16), tokens=24)
    assert options.allocate(inputs_of(problem, loss)).choice == uniform


def test_parents_only_get_better_and_the_best_is_found():
    problem = problem_of([(4, 24)] * 5, ["dense", "6:8", "4:8", "2:8"], "1/2")
    given_inputs = inputs_of(problem)
    found = EvoPress(generations=30, tokens=24).allocate(given_inputs)
    losses = [given_inputs.loss.exact(choice) for choice in given_inputs.loss.kept]
    assert losses == sorted(losses, reverse=True) and losses[0] == found.uniform_loss > found.loss
    best = min(
        given_inputs.loss.exact(c)
        for c in itertools.product(range(4), repeat=5)
        if problem.total_kept(c) == problem.budget.kept
    )
    assert found.loss == pytest.approx(best, abs=1e-12)
    assert [choice for _, choice in found.incumbents] == list(
        dict.fromkeys([*given_inputs.loss.kept, found.choice])
    )
    assert found.curve[0] == (24, found.uniform_loss) and found.curve[-1] == (
        given_inputs.loss.forward_tokens, found.loss,
    )  # fmt: skip


def test_candidates_that_cannot_be_measured_lose_and_a_lost_search_says_so():
    problem = problem_of(SHAPES)

    class OnlyUniform(CountingLoss):
        def exact(self, choice):
            return 1.0 if choice == problem.uniform() else np.inf

    assert SMALL.allocate(inputs_of(problem, OnlyUniform(np.zeros((5, 8))))).choice == problem.uniform()
    nowhere = CountingLoss(np.full((5, 8), np.inf))
    with pytest.raises(NumericsError, match="no candidate has a finite loss"):
        SMALL.allocate(inputs_of(problem, nowhere))


def test_a_uniform_that_cannot_be_measured_gives_way():
    problem = problem_of(SHAPES)

    class NotUniform(CountingLoss):
        def exact(self, choice):
            return np.inf if choice == problem.uniform() else super().exact(choice)

    found = SMALL.allocate(inputs_of(problem, NotUniform(np.random.default_rng(0).random((5, 8)))))
    assert np.isfinite(found.loss) and found.choice != problem.uniform() and found.uniform_loss == np.inf


def test_no_generations_give_uniform_and_progress_rises_to_its_total():
    problem, seen = problem_of(SHAPES), []
    given_inputs = inputs_of(problem, progress=lambda *at: seen.append(at))
    assert EvoPress(generations=0).allocate(given_inputs).choice == problem.uniform()
    EvoPress(generations=3, tokens=24).allocate(inputs_of(problem, progress=lambda *at: seen.append(at)))
    done = [at[:2] for at in seen]
    assert done == sorted(done) and {*done} == {(0, 0), (0, 3), (1, 3), (2, 3), (3, 3)}
    assert done.count((1, 3)) > 8  # within a generation, too
    assert re.fullmatch(r"generation 3, loss \d+\.\d{4}", next(at[2] for at in seen if at[0] == 2))


@pytest.mark.parametrize("options", [
    {"survivors": ()}, {"survivors": (8, 2)}, {"survivors": (8, 2, 2)}, {"survivors": (2, 8, 1)},
    {"survivors": (), "tokens_per_selection": ()}, {"tokens_per_selection": (2048, 16384)},
    {"tokens_per_selection": (0, 16384, 65536)}, {"offspring": 4}, {"survivors": (8, 0, 1)},
])  # fmt: skip
def test_a_ladder_that_is_none_is_refused(options):
    with pytest.raises(RecipeError, match="are no ladder") as error:
        EvoPress(**options)
    assert "fall from offspring to 1" in error.value.hint


@pytest.mark.parametrize(
    "option, value", [("generations", -1), ("offspring", 0), ("max_swaps", 0), ("tokens", 0)]
)
def test_an_option_out_of_range_is_refused(option, value):
    with pytest.raises(RecipeError, match=f"evopress: {option} = {value} must be at least"):
        EvoPress(**{option: value})


def test_in_a_menu_of_unequal_steps_a_third_unit_makes_up_the_difference():
    problem = problem_of([(8, 32)] * 3, ["2:8", "1:8", "1:16"], target="7/8")
    assert {swapped(problem, (1, 1, 1), 1, np.random.default_rng(i)) for i in range(60)} == set(
        itertools.permutations((0, 2, 2))
    ) | set(itertools.permutations((2, 0, 2)))


def test_an_attention_and_an_mlp_trade_though_no_level_of_one_is_a_level_of_the_other():
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576)], [(1536, 576), (1536, 576), (576, 1536)]
    problem = problem_of([*shapes[0], *shapes[1]] * 2, DEFAULT_LEVELS, "5/8")  # two blocks of SmolLM2
    rng, choice, kept = np.random.default_rng(0), problem.uniform(), set()
    attentions = [0, 1, 2, 3, 7, 8, 9, 10]
    for _ in range(40):
        choice = swapped(problem, choice, 3, rng)
        kept.add(sum(int(problem.kept[u, choice[u]]) for u in attentions))
    assert len(kept) > 5
