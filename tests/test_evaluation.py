import copy
import math

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

from msp_plugin import evaluation
from msp_plugin.calibration import CalibrationSet
from msp_plugin.database.build import build_database
from msp_plugin.database.store import LayerErrors, LevelDatabase
from msp_plugin.errors import NumericsError, VerificationError
from msp_plugin.evaluation import CandidateLoss, perplexity
from msp_plugin.models import prunable_layers
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.levels import parse_menu
from msp_plugin.pruning.magnitude import Magnitude

MENU = parse_menu(["dense", "2:4", "1:4"])


def granite():
    torch.manual_seed(3)
    return GraniteForCausalLM(
        GraniteConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, logits_scaling=2.5, initializer_range=0.15,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def measured(tmp_path):
    """A problem at one half and a magnitude database for any model."""

    def make(model, data):
        problem = AllocationProblem(prunable_layers(model), MENU, 1 / 2)
        database = LevelDatabase(tmp_path / "cache", {"test": "evaluation"}, MENU)
        build_database(database, model, problem.table, Magnitude(), data)
        return database, problem

    return make


def pruned_copy(model, database, problem, choice):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for unit, k in zip(problem.table, choice, strict=True):
            for layer in unit.layers:
                other.get_submodule(layer.name).weight.copy_(database.weight(layer.name, MENU[k].name))
    return other


def kl_by_hand(dense, candidate, data):
    total = count = 0.0
    with torch.no_grad():
        for sample in data.samples:
            p = dense(sample[None]).logits[0].double().softmax(-1)
            q = candidate(sample[None]).logits[0].double().softmax(-1)
            total += float((p * (p.log() - q.log())).sum())
            count += len(sample)
    return total / count


def perplexity_by_hand(model, data):
    losses = []
    with torch.no_grad():
        for sample in data.samples:
            logits = model(sample[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, sample[1:], reduction="none"))
    return float(torch.cat(losses).mean().exp())


@pytest.fixture
def mixed(make_samples):
    """Samples of two lengths."""
    return CalibrationSet(make_samples(3, 9).samples + make_samples(4, 20, seed=1).samples, "mixed")


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_perplexity_is_that_of_every_next_token(model, mixed, batch_tokens):
    seen = []
    found = perplexity(model, mixed, batch_tokens=batch_tokens, progress=lambda *at: seen.append(at))
    assert found == pytest.approx(perplexity_by_hand(model, mixed), rel=1e-5)
    assert seen[-1] == (7, 7)


def test_logits_compared_in_pieces_give_the_same(llama, data, measured, monkeypatch):
    database, problem = measured(llama, data)
    with CandidateLoss(llama, database, problem, data) as loss:
        whole = loss((1,) * 8), perplexity(llama, data)
        monkeypatch.setattr(evaluation, "_LOGITS", 128 * 5)
        assert (loss((1,) * 8), perplexity(llama, data)) == pytest.approx(whole, rel=1e-6)


def test_a_perplexity_beyond_floats_is_infinite(llama, data):
    with torch.no_grad():
        llama.lm_head.weight *= 1e6
    assert perplexity(llama, data) == math.inf


def test_a_loss_that_is_no_number_is_an_error(llama, data):
    with torch.no_grad():
        llama.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="not a number") as error:
        perplexity(llama, data)
    assert "float32" in error.value.hint


@pytest.mark.parametrize("name", ["llama", "qwen2", "granite"])
@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_kl_is_that_of_two_whole_models(request, mixed, measured, name, batch_tokens):
    model = granite() if name == "granite" else request.getfixturevalue(name)
    database, problem = measured(model, mixed)
    dense = copy.deepcopy(model)
    with CandidateLoss(model, database, problem, mixed, batch_tokens=batch_tokens) as loss:
        for choice in [(0,) * 8, (2, 1, 0, 1, 0, 2, 1, 0), (1,) * 8, (2,) * 8]:
            expected = kl_by_hand(dense, pruned_copy(dense, database, problem, choice), mixed)
            assert loss(choice) == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert loss((0,) * 8) == 0.0


def test_the_perplexity_objective_is_the_logarithm_of_the_perplexity(llama, mixed, measured):
    database, problem = measured(llama, mixed)
    choice = (2, 1, 0, 1, 0, 2, 1, 0)
    candidate = pruned_copy(llama, database, problem, choice)
    with CandidateLoss(llama, database, problem, mixed, "perplexity") as loss:
        assert loss(choice) == pytest.approx(math.log(perplexity(candidate, mixed)), rel=1e-6)
        assert loss(choice) != loss((0,) * 8)


def test_a_candidates_loss_does_not_depend_on_those_before_it(llama, data, measured):
    database, problem = measured(llama, data)
    a, b = (1,) * 8, (2, 0, 1, 2, 0, 1, 2, 0)
    with CandidateLoss(llama, database, problem, data) as loss:
        first = loss(a)
        other = loss(b)
        assert loss(a) == first and loss(b) == other and first != other
        assert loss.forward_tokens == 4 * data.tokens


@pytest.mark.parametrize("objective", ["kl", "perplexity"])
def test_the_dense_weights_are_back_when_the_block_ends(model, data, measured, bits, count_hooks, objective):
    database, problem = measured(model, data)
    before, hooks = bits(model), count_hooks(model)
    with CandidateLoss(model, database, problem, data, objective) as loss:
        loss((1, 2) * 4)
        assert bits(model) != before
    assert bits(model) == before and count_hooks(model) == hooks


@pytest.mark.parametrize("cause", [ValueError, KeyboardInterrupt])
def test_the_dense_weights_are_back_when_the_block_fails(llama, data, measured, bits, count_hooks, cause):
    database, problem = measured(llama, data)
    before, hooks = bits(llama), count_hooks(llama)
    with pytest.raises(cause), CandidateLoss(llama, database, problem, data) as loss:
        loss((1, 2) * 4)
        raise cause
    assert bits(llama) == before and count_hooks(llama) == hooks


def test_the_dense_weights_are_back_when_a_weight_cannot_be_read_half_way(
    tmp_path, llama, data, measured, bits
):
    _, problem = measured(llama, data)
    fresh = LevelDatabase(tmp_path / "cache", {"test": "evaluation"}, MENU)
    before = bits(llama)
    with pytest.raises(VerificationError, match="v_proj"), CandidateLoss(llama, fresh, problem, data) as loss:
        fresh.file("model.layers.0.self_attn.v_proj").unlink()
        loss((1,) * 8)
    assert bits(llama) == before


def test_the_dense_weights_are_back_when_the_model_fails_half_way(llama, data, measured, bits):
    database, problem = measured(llama, data)
    before = bits(llama)

    def fail(module, args, output):
        raise MemoryError

    with pytest.raises(MemoryError), CandidateLoss(llama, database, problem, data) as loss:
        handle = llama.model.layers[1].register_forward_hook(fail)
        try:
            loss((1,) * 8)
        finally:
            handle.remove()
    assert bits(llama) == before


def test_a_candidate_whose_loss_is_no_number_is_infinitely_bad(llama, data, measured):
    database, problem = measured(llama, data)
    layer = problem.table[3].layers[0]
    broken = {name: database.weight(layer.name, name).clone() for name in ("dense", "2:4", "1:4")}
    broken["1:4"][0, 0] = float("nan")
    database.write(layer, broken, {name: LayerErrors(0.0, 0.0) for name in broken})
    fresh = LevelDatabase(database.path.parent.parent, {"test": "evaluation"}, MENU)
    for objective in ("kl", "perplexity"):
        with CandidateLoss(llama, fresh, problem, data, objective) as loss:
            assert loss((0, 0, 0, 2, 0, 0, 0, 0)) == math.inf
            assert math.isfinite(loss((0, 0, 0, 1, 0, 0, 0, 0)))
