"""Searches that ranks share: threads, each with a model of its own."""

import copy
from fractions import Fraction

import numpy as np
import pytest

from msp_plugin.allocators.search import Search
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import TextSplit
from msp_plugin.errors import HostError, NumericsError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.menus import parse_menu
from msp_plugin.pruning.sparsegpt import SparseGPT
from msp_plugin.runtime.ranks import ALONE
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.candidate_weights import CandidateWeights
from msp_plugin.search.measurements import Measurements
from msp_plugin.sensitivity.fisher import FisherTrace

MENU = parse_menu(["dense", "2:4", "1:4"])


@pytest.fixture
def measured(llama, make_samples, tmp_path):
    """Return Measurements by ranks and cache name; each has a copy of the model."""
    samples = make_samples(20).samples

    def make(ranks=ALONE, cache="cache", model=None):
        own = copy.deepcopy(llama if model is None else model)
        text = TextSplit(
            CalibrationSet(samples[:7], "head"),
            CalibrationSet(samples[7:16], "search"),
            CalibrationSet(samples[16:], "holdout"),
        )
        return Measurements(
            own, prunable_layers(own), MENU, SparseGPT(), text,
            {"fisher": FisherTrace()}, str(tmp_path / cache), ranks=ranks,
        )  # fmt: skip

    return make


@pytest.mark.parametrize(
    "size", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_losses_and_move_gradients_are_those_of_one_process_bit_for_bit(on_ranks, measured, size):
    def work(ranks):
        held = measured(ranks)
        problem = AllocationProblem(held.table, MENU, Fraction(1, 2))
        with CandidateWeights(held.model, held.database, problem) as weights:
            loss = CandidateLoss(weights, held.text.search, batch_tokens=48, ranks=ranks).prepare()
            uniform, other = problem.uniform(), (0, 2, *problem.uniform()[2:])
            loss.set_incumbent(uniform)
            values = [loss(uniform), loss(other), loss(other, (1, 4, 5)), loss(uniform, (3,))]
            gradients = loss.move_gradients(uniform, (0, 3, 4, 8), 2, 5)
        return values, [part.tobytes() for part in gradients], loss.forward_tokens

    expected = work(ALONE)
    assert on_ranks(size, work) == [expected] * size


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_search_finds_the_same_from_the_same_files_whatever_the_ranks(on_ranks, measured, size, tmp_path):
    search = Search(rounds=2, seeds=2, tokens=216, holdout=96)

    def work(cache):
        def run(ranks):
            held = measured(ranks, cache)
            result, record = held.allocate(search, AllocationProblem(held.table, MENU, Fraction(1, 2)), 3)
            return result, record.forward_tokens, held.sensitivities, held.error("output").tobytes()

        return run

    def files(cache):
        return {path.name: path.read_bytes() for path in tmp_path.joinpath(cache).rglob("*.safetensors")}

    expected = work("alone")(ALONE)
    assert on_ranks(size, work("shared")) == [expected] * size
    assert files("shared") == files("alone") and len(files("shared")) == 14


@pytest.mark.slow
def test_a_search_that_two_ranks_began_is_ended_by_one_and_the_other_way_round(on_ranks, measured, tmp_path):
    search = Search(rounds=2, seeds=2, tokens=216, holdout=96)

    def run(ranks, cache, stop=None):
        held = measured(ranks, cache)
        steps = []

        def progress(step, done, total, note=""):
            steps.append(step)
            if step == "search" and stop and note.startswith(f"round {stop},"):
                raise NumericsError("stopped")

        held.progress = progress
        return held.allocate(search, AllocationProblem(held.table, MENU, Fraction(1, 2)), 3)[0], set(steps)

    expected = run(ALONE, "undisturbed")[0]
    assert {str(e) for e in on_ranks(2, lambda ranks: run(ranks, "a", 1))} == {"stopped"}
    result, steps = run(ALONE, "a")
    assert result == expected and "level database" not in steps
    with pytest.raises(NumericsError):
        run(ALONE, "b", 1)
    assert [found[0] for found in on_ranks(3, lambda ranks: run(ranks, "b"))] == [expected] * 3


def test_more_ranks_than_layers_or_samples_are_fine(on_ranks, measured):
    def run(ranks):
        held = measured(ranks, f"cache-{ranks.size}")
        errors = np.array(held.database.errors(held.table)).tobytes()
        return (held.sensitivity("fisher"), errors), held.error("fisher")

    expected, error = run(ALONE)
    for found, other in on_ranks(17, run):
        assert found == expected
        np.testing.assert_allclose(other, error, rtol=1e-5)


def test_ranks_with_different_models_are_refused(on_ranks, measured, qwen2):
    def run(ranks):
        return measured(ranks, model=qwen2 if ranks.rank else None).database

    for error in on_ranks(2, run):
        assert isinstance(error, HostError) and "different models" in str(error)
