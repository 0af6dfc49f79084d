"""A candidate's weights in the model's places, and the dense ones back whatever happens."""

import copy

import pytest
import torch

from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import VerificationError
from msp_plugin.passes.losses import mean_kl, perplexity
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.candidate_weights import CandidateWeights
from tests.helpers.losses import MENU, loss_of, places

A, B = (1,) * 8, (2, 0, 1, 2, 0, 1, 2, 0)


@pytest.mark.parametrize("objective", ["kl", "perplexity"])
def test_the_dense_weights_are_back_in_their_place_when_the_block_ends(
    model, data, measured, bits, count_hooks, objective
):
    held = measured(model)
    before, where, hooks = bits(model), places(model), count_hooks(model)
    with loss_of(model, held, data, objective) as loss:
        loss((1, 2) * 4)
        assert bits(model) != before
    assert bits(model) == before and places(model) == where and count_hooks(model) == hooks


@pytest.mark.parametrize("cause", [ValueError, KeyboardInterrupt])
def test_the_dense_weights_are_back_when_the_block_fails(llama, data, measured, bits, count_hooks, cause):
    held = measured(llama)
    before, where, hooks = bits(llama), places(llama), count_hooks(llama)
    with pytest.raises(cause), loss_of(llama, held, data) as loss:
        loss.set_incumbent(A)
        loss(A)
        loss((1, 2) * 4)
        raise cause
    assert bits(llama) == before and places(llama) == where and count_hooks(llama) == hooks


def test_the_dense_weights_are_back_when_a_file_is_missing_half_way(tmp_path, llama, data, measured, bits):
    _, problem = measured(llama)
    fresh = LevelDatabase(tmp_path / "cache", {"test": "magnitude"}, MENU)
    before, where = bits(llama), places(llama)
    with pytest.raises(VerificationError, match="v_proj"), loss_of(llama, (fresh, problem), data) as loss:
        fresh.file("model.layers.0.self_attn.v_proj").unlink()
        loss(A)
    assert bits(llama) == before and places(llama) == where


def test_the_dense_weights_are_back_when_the_model_fails_half_way(llama, data, measured, bits, count_hooks):
    held = measured(llama)
    before, where, hooks = bits(llama), places(llama), count_hooks(llama)

    def fail(module, args, output):
        raise LookupError

    with pytest.raises(LookupError), loss_of(llama, held, data) as loss:
        handle = llama.model.layers[1].register_forward_hook(fail)
        try:
            loss(A)
        finally:
            handle.remove()
    assert bits(llama) == before and places(llama) == where and count_hooks(llama) == hooks


def test_a_failed_candidate_leaves_no_trace_in_the_next_one(tmp_path, llama, data, measured):
    database, problem = measured(llama)
    with loss_of(llama, (database, problem), data) as loss:
        expected = loss(B)
    fresh = LevelDatabase(tmp_path / "cache", {"test": "magnitude"}, MENU)
    with loss_of(llama, (fresh, problem), data) as loss:
        file = fresh.file("model.layers.1.self_attn.v_proj")
        away = file.rename(file.with_suffix(".away"))
        with pytest.raises(VerificationError):
            loss(A)
        away.rename(file)
        assert loss(B) == expected


def test_weights_from_elsewhere_are_measured_and_make_way_for_the_next_choice(llama, mixed, measured):
    held = measured(llama)
    problem = held[1]
    dense, where = copy.deepcopy(llama), places(llama)
    names = [layer.name for layer in problem.table.layers]
    other = {name: 0.9 * llama.get_submodule(name).weight.detach().double() for name in names}
    scaled = copy.deepcopy(llama)
    with torch.no_grad():
        for name, weight in other.items():
            scaled.get_submodule(name).weight.copy_(weight)
    with CandidateWeights(llama, *held) as weights:
        loss = CandidateLoss(weights, mixed).prepare()
        expected = loss(B)
        weights.put(other)
        assert llama.get_submodule(names[0]).weight.dtype == torch.float32
        kl, found = loss.quality()
        assert kl == pytest.approx(mean_kl(dense, scaled, mixed), rel=1e-4)
        assert found == pytest.approx(perplexity(scaled, mixed), rel=1e-6)
        assert loss(B) == expected
        weights.put(other)
        weights.set(None)
        assert places(llama) == where
        with pytest.raises(KeyError):
            weights.put({names[0]: other[names[0]]})
        assert loss(B) == expected
    assert places(llama) == where


def test_held_weights_are_read_once_and_make_way_when_they_grow_too_large(llama, data, measured, monkeypatch):
    database, problem = measured(llama)
    read, original = [], database.weight

    def counting(layer, level):
        read.append((layer, level))
        return original(layer, level)

    monkeypatch.setattr(database, "weight", counting)
    choices = [A, B, (2,) * 8, A, B]
    one, every = max(layer.weights for layer in problem.table.layers) * 4, problem.table.weights * 4 * 2
    found, reads = {}, {}
    for limit in (1, 3 * one, 1 << 30):
        read.clear()
        with CandidateWeights(llama, database, problem, held_bytes=limit) as weights:
            loss = CandidateLoss(weights, data).prepare()
            found[limit] = []
            for choice in choices:
                found[limit].append(loss(choice))
                assert weights.bytes_held <= max(limit, one)
            assert weights.bytes_held > min(limit, every) - one  # and no more makes way than must
        reads[limit] = len(read)
    assert found[1] == found[3 * one] == found[1 << 30]
    assert reads[1 << 30] == 2 * 14 == len(set(read)) and reads[1] > reads[1 << 30]
    assert all(level != "dense" for _, level in read)  # the model's own weight is at hand
