"""Searches of models whose weights accelerate holds elsewhere, against the same models in memory."""

import math

import numpy as np
import pytest
import torch

from msp_plugin.allocators.evopress import EvoPress
from msp_plugin.allocators.knapsack import Knapsack
from msp_plugin.allocators.msp import MSP
from msp_plugin.allocators.search import Search
from msp_plugin.data.samples import TextSplit
from msp_plugin.models.layers import prunable_layers
from msp_plugin.passes.losses import mean_kl, perplexity
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.fractions import parse_sparsity
from msp_plugin.pruning.magnitude import Magnitude
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.candidate_weights import CandidateWeights
from msp_plugin.search.measurements import Measurements
from msp_plugin.sensitivity.fisher import FisherTrace
from msp_plugin.sensitivity.fisher_error import fisher_errors
from msp_plugin.sensitivity.heavy_tail import HeavyTail
from msp_plugin.sensitivity.lsa import VirtualRemoval
from msp_plugin.sensitivity.outliers import Median, Outliers
from tests.helpers.offload import MENU, measured_at, names_of, on_disk, state

ESTIMATORS = {
    e.name: e for e in (FisherTrace(samples=2), HeavyTail(), Outliers(), Median(), VirtualRemoval())
}
ALLOCATORS = {
    "search": Search(rounds=2, tokens=96, holdout=48),
    "knapsack": Knapsack(surrogate="kl", tokens=48),
    "msp": MSP(generations=1, population=4, offspring=2, tokens=96),
    "evopress": EvoPress(generations=2, tokens=96),
}


@pytest.fixture
def measured(tmp_path):
    return measured_at(tmp_path / "cache")


@pytest.fixture
def allocate(tmp_path, make_samples):
    """What an allocator finds for a model, and at which cost; each call has a cache of its own."""
    calls = []

    def allocate(model, allocator):
        calls.append(allocator)
        table, before = prunable_layers(model), state(model)
        text = TextSplit(make_samples(2), make_samples(4, seed=1), make_samples(2, seed=2))
        held = Measurements(
            model, table, MENU, Magnitude(), text, ESTIMATORS, str(tmp_path / f"cache {len(calls)}"), batch_tokens=48,
        )  # fmt: skip
        problem = AllocationProblem(table, MENU, parse_sparsity("0.6"))
        result, record = held.allocate(ALLOCATORS[allocator], problem, 0)
        assert state(model) == before
        return (
            result,
            {k: v for k, v in record.model_dump().items() if "seconds" not in k},
            held.sensitivities,
        )

    return allocate


@pytest.mark.slow
def test_a_search_finds_what_it_finds_in_memory_wherever_the_weights_are(pair, allocate):
    here, there = (allocate(its, "search") for its in pair)
    assert here == there
    assert here[0].evaluations > 10 and here[2]["fisher"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "allocator",
    [pytest.param(name, marks=() if name == "search" else pytest.mark.slow) for name in ALLOCATORS],
)
def test_an_allocator_finds_what_it_finds_in_memory(tmp_path, llama, allocate, allocator):
    here, there = (allocate(its, allocator) for its in (llama, on_disk(llama, tmp_path / "away")))
    assert here == there and here[1]["forward_tokens"] > 0


@pytest.mark.parametrize(
    ("dtype", "objective"),
    [
        (torch.float32, "kl"),
        pytest.param(torch.float32, "perplexity", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "kl", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_losses_move_gradients_and_quality_are_those_in_memory(
    pair, data, measured, dtype, objective, tmp_path
):
    model, away = pair
    if dtype != torch.float32:
        away = on_disk(model.to(dtype), tmp_path / "16 bits")
    held = measured(model)
    choices = [(0,) * 8, (1, 2, 0, 3, 1, 1, 2, 1), (1, 2, 0, 3, 1, 1, 2, 3), (3,) * 8]
    found = []
    for its in (model, away):
        with CandidateWeights(its, *held) as weights:
            loss = CandidateLoss(weights, data, objective, batch_tokens=48).prepare()
            loss.set_incumbent(choices[1])
            numbers = [loss(choice) for choice in (*choices, *reversed(choices))]
            numbers += [loss(choices[2], [0, 3])]
            gradients = loss.move_gradients(choices[1], [0, 2, 5], 2, seed=1)
            if objective == "kl":
                weights.put({name: held[0].weight(name, "1:4") for name in names_of(held)})
                numbers += loss.quality()
            found.append((numbers, loss.forward_tokens, loss.block_tokens, gradients))
    for here, there in zip(*found, strict=True):
        np.testing.assert_array_equal(here, there)
    assert len(set(found[0][0])) > 3 and all(map(math.isfinite, found[0][0]))
    assert found[0][1] > found[0][2]  # blocks were skipped


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_sensitivities_are_those_in_memory(pair, data, name):
    found = []
    for its in pair:
        layers, before = tuple(layer.name for layer in prunable_layers(its).layers), state(its)
        found.append(ESTIMATORS[name].layer_sensitivities(its, data, layers))
        assert state(its) == before
    assert found[0] == found[1] and len(set(found[0].values())) > 1


def test_the_fisher_weighted_error_is_that_in_memory(pair, data, measured):
    held = measured(pair[0])
    found = [fisher_errors(its, data, names_of(held), ["2:4", "1:8"], held[0].weight) for its in pair]
    assert found[0] == found[1] and all(errors["1:8"] > 0 for errors in found[0].values())


def test_perplexity_and_kl_are_those_in_memory(pair, data):
    model, away = pair
    assert perplexity(model, data) == perplexity(away, data)
    assert mean_kl(model, away, data) == 0.0
