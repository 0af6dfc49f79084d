"""Models that compressed-tensors offloads: searched, and pruned by ``oneshot``, as the same models in memory."""

import copy
from contextlib import nullcontext

import pytest
import torch
from compressed_tensors.offload import load_offloaded_model
from compressed_tensors.offload.dispatch import dispatch_with_map
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from msp_plugin import MixedSparsityModifier
from msp_plugin.allocators.search import Search
from msp_plugin.data.samples import TextSplit
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import ModelError
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.layers import prunable_layers
from msp_plugin.models.offload import check_loadable, named_parameters, offloaded_module
from msp_plugin.passes.gradients import gradients_without_weights
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.fractions import parse_sparsity
from msp_plugin.plan.menus import parse_menu
from msp_plugin.pruning.wanda import Wanda
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.candidate_weights import CandidateWeights
from msp_plugin.search.measurements import Measurements
from msp_plugin.sensitivity.fisher import FisherTrace
from msp_plugin.sensitivity.heavy_tail import HeavyTail

MENU = parse_menu(["dense", "2:4", "1:4", "1:8"])
SEARCH = {"name": "search", "rounds": 1, "tokens": 128, "holdout": 64, "seeds": 3}


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), "disk"])
def pair(request, model, tmp_path):
    """A model in memory, and a copy of it in caches of compressed-tensors."""
    away = copy.deepcopy(model)
    places = {name: ("cpu", request.param) for name, _ in away.named_modules()}
    folder = tmp_path / "away"
    folder.mkdir()
    dispatch_with_map(away, places, str(folder) if request.param == "disk" else None, show_progress=False)
    assert offloaded_module(away) is not None
    return model, away


def state(model):
    onloads = [
        vars(m._parameters).get("onload") for m in model.modules() if not isinstance(m._parameters, dict)
    ]
    held = {name: (id(p), p.device, p.requires_grad) for name, _, p in named_parameters(model)}
    return onloads, held


@pytest.mark.slow
def test_a_search_finds_what_it_finds_in_memory(tmp_path, pair, make_samples):
    found = []
    for number, its in enumerate(pair):
        table, before = prunable_layers(its), state(its)
        held = Measurements(
            its, table, MENU, Wanda(), TextSplit(make_samples(2), make_samples(4, seed=1), make_samples(2, seed=2)),
            {e.name: e for e in (FisherTrace(samples=2), HeavyTail())}, str(tmp_path / str(number)),
            batch_tokens=48,
        )  # fmt: skip
        problem = AllocationProblem(table, MENU, parse_sparsity("0.6"))
        result, _ = held.allocate(Search(rounds=2, tokens=96, holdout=48), problem, 0)
        found.append((fingerprint(its), result, held.sensitivity("fisher"), held.sensitivity("heavy_tail")))
        assert state(its) == before
    assert found[0] == found[1] and found[0][1].evaluations > 10


def test_an_offloaded_model_is_itself_after_an_error(tmp_path, pair, data, magnitude_of):
    model, away = pair
    database, problem = magnitude_of(model)
    before = state(away)
    with pytest.raises(LookupError), CandidateWeights(away, database, problem) as weights:
        loss = CandidateLoss(weights, data).prepare()
        loss((1,) * 8)
        layer = away.get_submodule(problem.table.layers[0].name)
        assert torch.equal(layer.weight, database.weight(problem.table.layers[0].name, "2:4"))
        with gradients_without_weights(away):
            assert not layer.weight.requires_grad  # nor would its gradient be kept
        raise LookupError
    assert state(away) == before
    assert torch.equal(away(data.samples[0][None]).logits, model(data.samples[0][None]).logits)


@pytest.fixture
def magnitude_of(tmp_path, data):
    from msp_plugin.database.build import build_database
    from msp_plugin.pruning.magnitude import Magnitude

    def make(model):
        problem = AllocationProblem(prunable_layers(model), MENU, parse_sparsity("0.6"))
        database = LevelDatabase(tmp_path / "cache", {"test": "compressed-tensors"}, MENU)
        build_database(database, model, problem.table, Magnitude(), data)
        return database, problem

    return make


def test_a_graph_holds_the_weights_of_one_block(pair, make_samples, monkeypatch):
    """What a cache loads for a backward pass goes away again."""
    import weakref

    model, away = pair
    layers = tuple(layer.name for layer in prunable_layers(model).layers)
    live, most = {}, [0]
    for module in away.modules():
        cache, own = module._parameters, module._parameters.onload

        def onload(offloaded, own=own):
            array, key = own(offloaded).detach().numpy().copy(), object()
            live[key] = array.nbytes
            weakref.finalize(array, live.pop, key)
            most[0] = max(most[0], sum(live.values()))
            return torch.nn.Parameter(torch.from_numpy(array), requires_grad=offloaded.requires_grad)

        monkeypatch.setattr(cache, "onload", onload, raising=False)
    estimator = FisherTrace(samples=2)
    expected = estimator.layer_sensitivities(model, make_samples(2), layers)
    assert estimator.layer_sensitivities(away, make_samples(2), layers) == expected
    blocks = [sum(p.nbytes for p in block.parameters()) for block in model.model.layers]
    around = sum(p.nbytes for p in model.parameters()) - sum(blocks)
    assert blocks[0] // 2 < most[0] <= max(blocks) + around and not live


def test_oneshot_prunes_an_offloaded_model_to_the_same_weights(
    qwen2_dir, tmp_path, make_samples, monkeypatch
):
    places = {
        "model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
        **{f"model.layers.{i}": ("disk", "cpu")[i % 2] for i in range(2)},
    }  # fmt: skip
    found = []
    for name in ("here", "away"):
        monkeypatch.setenv("MSP_CACHE", str(tmp_path / f"cache of {name}"))
        options = {"device_map": places, "offload_folder": str(tmp_path / "away")} if name == "away" else {}
        with load_offloaded_model() if options else nullcontext():
            model = AutoModelForCausalLM.from_pretrained(qwen2_dir, **options)
        assert (offloaded_module(model) is None) == (name == "here")
        modifier = MixedSparsityModifier(
            sparsity=0.6, method="wanda", levels=["dense", "2:4", "1:4"], allocator=SEARCH,
            estimators={"fisher": {"samples": 2}},
        )  # fmt: skip
        run(model, modifier, make_samples(20, 32), tmp_path / name)
        found.append((modifier.outcome.allocation.by_layer, load_file(tmp_path / name / "model.safetensors")))
    (here, weights), (there, others) = found
    assert here == there and len(set(here.values())) > 1
    assert weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)


def run(model, modifier, data, out):
    from llmcompressor import oneshot

    samples = DataLoader([{"input_ids": sample} for sample in data.samples], batch_size=2)
    oneshot(model=model, recipe=[modifier], dataset=samples, output_dir=str(out))


def test_weights_that_a_cache_keeps_are_refused(pair):
    check_loadable(pair[1])
    cache = pair[1].lm_head._parameters
    with cache.disable_offloading(), pytest.raises(ModelError, match="stay loaded") as error:
        check_loadable(pair[1])
    assert "disable_offloading" in error.value.hint
