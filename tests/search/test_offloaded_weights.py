"""Weights that accelerate holds elsewhere: how many are in memory at once, and that all is put back."""

import weakref

import numpy as np
import pytest
import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import ModelError, VerificationError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.passes.losses import perplexity
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.candidate_weights import CandidateWeights
from msp_plugin.sensitivity.fisher import FisherTrace
from msp_plugin.sensitivity.hessian import HessianTrace
from tests.helpers import models
from tests.helpers.offload import HERE, MENU, Counted, hooks, measured_at, names_of, on_disk, state


@pytest.fixture
def measured(tmp_path):
    return measured_at(tmp_path / "cache")


def deep():
    """Four blocks, one of which is a small part of the whole."""
    return models.llama(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


def small(count=3, length=16):
    generator = torch.Generator().manual_seed(0)
    return CalibrationSet(tuple(torch.randint(0, 32, (count, length), generator=generator)), "small")


def test_weights_go_away_again_where_the_last_layer_of_a_block_is_not_asked_about(pair, data):
    layers = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    before = state(pair[1])
    found = [FisherTrace(samples=2).layer_sensitivities(its, data, layers) for its in pair]
    assert found[0] == found[1] and state(pair[1]) == before


def test_a_second_derivative_of_offloaded_weights_is_refused(pair, data):
    layers = tuple(layer.name for layer in prunable_layers(pair[1]).layers)
    with pytest.raises(ModelError, match="offloaded") as error:
        HessianTrace(samples=1, probes=1).layer_sensitivities(pair[1], data, layers)
    assert "hessian_trace" in error.value.hint


@pytest.mark.parametrize("make", [deep, models.falcon])
def test_a_backward_pass_holds_the_weights_of_one_block_and_what_follows_the_blocks(
    tmp_path, measured, make, monkeypatch
):
    model, text = make(), small()
    away, held = on_disk(model, tmp_path / "away"), measured(model)
    Counted.watch(away)
    own = held[0].weight
    blocks = [nbytes(block) for block in model.get_submodule(names_of(held)[0].partition(".0.")[0])]
    around = nbytes(model) - nbytes(model.get_input_embeddings()) * (not tied(model)) - sum(blocks)
    block = max(blocks)
    choice = (1, 2, 3, 2) * (len(held[1].table) // 4)
    expected = FisherTrace(samples=2).layer_sensitivities(model, text, tuple(names_of(held)))
    Counted.peak = 0
    assert FisherTrace(samples=2).layer_sensitivities(away, text, tuple(names_of(held))) == expected
    assert block // 2 < Counted.peak <= block + around and not Counted.live
    found = []
    for its in (model, away):
        with CandidateWeights(its, *held, held_bytes=0) as weights:
            loss = CandidateLoss(weights, text, "perplexity").prepare()
            if its is away:  # pruned weights count too, as many as the hooks load
                monkeypatch.setattr(
                    held[0], "weight", lambda layer, level: Counted.of(own(layer, level), layer)
                )
                Counted.peak = 0
            found.append(loss.move_gradients(choice, [0, 1], 1, seed=0))
    np.testing.assert_array_equal(*found)
    largest = max(model.get_submodule(name).weight.nbytes for name in names_of(held))
    assert block // 2 < Counted.peak <= block + around + 2 * largest < nbytes(model) // 2
    assert not Counted.live


def tied(model):
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def nbytes(module):
    return sum(p.nbytes for p in module.parameters())


def test_the_inputs_of_layers_are_not_held_for_a_backward_pass(tmp_path):
    """Of the activations a graph holds the blocks' inputs, not those of their layers."""
    model, live, most = deep(), {}, []
    away = on_disk(model, tmp_path / "away")
    layers = tuple(layer.name for layer in prunable_layers(model).layers)

    def keep(module, args):
        key = object()
        live[key] = args[0].nbytes
        weakref.finalize(args[0].untyped_storage(), live.pop, key)

    for its in (model, away):
        handles = [b.mlp.down_proj.register_forward_pre_hook(keep) for b in its.model.layers]
        handles.append(its.lm_head.register_forward_pre_hook(lambda *_: most.append(len(live))))
        FisherTrace(samples=1).layer_sensitivities(its, small(1), layers)
        for handle in handles:
            handle.remove()
    assert most == [4, 0]


def test_candidates_hold_no_more_pruned_weights_than_they_may(tmp_path, measured, monkeypatch):
    model, text = deep(), small()
    away, held = on_disk(model, tmp_path / "away"), measured(model)
    own = held[0].weight
    Counted.live, Counted.peak = {}, 0
    monkeypatch.setattr(held[0], "weight", lambda layer, level: Counted.of(own(layer, level), layer))
    largest = max(model.get_submodule(name).weight.nbytes for name in names_of(held))
    with CandidateWeights(away, *held, held_bytes=2 * largest) as weights:
        loss = CandidateLoss(weights, text).prepare()
        for level in (1, 2, 1):
            loss((level,) * 16)
            assert 0 < sum(Counted.live.values()) <= 2 * largest
    assert Counted.peak <= 4 * largest < nbytes(model.model.layers) // 2 and not Counted.live


def test_skipped_blocks_and_embeddings_load_no_weights(tmp_path, measured):
    model, text = deep(), small()
    away, held = on_disk(model, tmp_path / "away"), measured(model)
    Counted.watch(away)
    with CandidateWeights(away, *held) as weights:
        loss = CandidateLoss(weights, text).prepare()
        first, last = (1,) * 16, (1,) * 15 + (0,)
        loss.set_incumbent(first)
        loss(first)
        Counted.reads.clear()
        loss(last)
        assert {name.split(".")[2] for name in Counted.reads if ".layers." in name} == {"3"}
        assert "model.layers.3.mlp.down_proj" in Counted.reads and "model.embed_tokens" not in Counted.reads
        Counted.reads.clear()
        loss((0,) * 16)
        assert "model.embed_tokens" in Counted.reads


@pytest.mark.parametrize("cause", [ValueError, KeyboardInterrupt])
def test_an_offloaded_model_is_itself_after_an_error(pair, data, measured, cause, count_hooks):
    model, away = pair
    held = measured(model)
    before, count = state(away), count_hooks(away)
    expected = perplexity(model, data)
    layer = away.get_submodule("model.layers.1.mlp.up_proj")  # on disk in all of them

    def fail(*args):
        assert not layer.weight.is_meta
        raise cause

    with pytest.raises(cause), CandidateWeights(away, *held) as weights:
        loss = CandidateLoss(weights, data).prepare()
        loss((3,) * 8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer, "_old_forward", fail)
            loss((2,) * 8)
    assert state(away) == before and count_hooks(away) == count
    assert perplexity(away, data) == expected


def test_a_backward_pass_that_fails_leaves_the_model_as_it_was(pair, data, measured):
    model, away = pair
    held = measured(model)
    before = state(away)
    forwards = [block.forward for block in away.model.layers]

    def fail(layer, level):
        raise LookupError

    with pytest.raises(LookupError), CandidateWeights(away, *held) as weights:
        loss = CandidateLoss(weights, data, "perplexity").prepare()
        weights.weight = fail
        loss.move_gradients((1,) * 8, [0], 1, seed=0)
    assert state(away) == before
    assert [block.forward for block in away.model.layers] == forwards


def test_a_missing_level_is_an_error_and_the_next_candidate_is_right(tmp_path, pair, data, measured):
    held = database, problem = measured(pair[0])
    with CandidateWeights(pair[0], *held) as weights:
        expected = CandidateLoss(weights, data).prepare()((2,) * 8)
    fresh = LevelDatabase(tmp_path / "cache", {"test": "magnitude"}, MENU)
    with CandidateWeights(pair[1], fresh, problem) as weights:
        loss = CandidateLoss(weights, data).prepare()
        file = database.file("model.layers.1.mlp.up_proj")
        away = file.rename(file.with_suffix(".away"))
        with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.up_proj"):
            loss((1,) * 8)
        away.rename(file)
        assert loss((2,) * 8) == expected


def test_a_copy_of_another_weight_at_the_same_address_is_not_taken(tmp_path, measured, data, llama):
    """Accelerate looks up tied weights by address; one that was freed leaves its address to others."""
    away, held = on_disk(llama, tmp_path / "away"), measured(llama)
    stale = {}
    for hook in hooks(away).values():
        hook.tied_params_map = stale
    choice = (3,) * 8
    with CandidateWeights(llama, *held) as weights:
        expected = CandidateLoss(weights, data).prepare()(choice)
    with CandidateWeights(away, *held) as weights:
        loss = CandidateLoss(weights, data).prepare()
        for name in names_of(held):
            weight = weights.weight(name, "1:8")
            stale[weight.data_ptr()] = {HERE: torch.nn.Parameter(torch.zeros_like(weight))}
        assert loss(choice) == expected


def test_the_weights_are_those_of_the_choice_wherever_they_are(pair, measured):
    held = measured(pair[0])
    name = names_of(held)[0]
    for its in pair:
        with CandidateWeights(its, *held) as weights:
            dense = weights.weight(name, "dense")
            assert torch.equal(dense, pair[0].get_submodule(name).weight)
            assert torch.equal(weights.weight(name, "1:4"), held[0].weight(name, "1:4"))
            with pytest.raises(KeyError):
                weights.put({name: dense})
                its(
                    torch.zeros(1, 4, dtype=torch.long)
                )  # an offloaded layer asks for its weight when it runs
