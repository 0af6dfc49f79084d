import copy
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.build import build_database
from msp_plugin.database.store import LevelDatabase
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.menus import parse_menu
from msp_plugin.pruning.magnitude import Magnitude
from msp_plugin.search import move_gradients
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.candidate_weights import CandidateWeights
from msp_plugin.search.move_gradients import sample_gradients, stack_samples
from tests.helpers.models import certain_llama

MENU = parse_menu(["dense", "6:8", "4:8", "2:8", "1:8"])
SIZES = {
    "vocab_size": 12, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3,
}  # fmt: skip
NOW = (1, 2, 0, 3, 2, 4, 1, 2)


@pytest.fixture(params=["llama", "qwen2"])
def model(request):
    torch.manual_seed(1)
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)).eval()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, 12, (n,), generator=generator) for n in (9, 9, 6)]
    return CalibrationSet(tuple(samples), "random")


@pytest.fixture
def measured(tmp_path, model):
    problem = AllocationProblem(prunable_layers(model), MENU, 1 / 2)
    database = LevelDatabase(tmp_path, {"test": "move gradients"}, MENU)
    build_database(database, model, problem.table, Magnitude(), None)
    return database, problem


def loss_by_hand(objective, dense, candidate, sample):
    """The mean loss of a sample, as a node of the graph, in float64."""
    logits = candidate(sample[None]).logits[0].double()
    if objective == "perplexity":
        return torch.nn.functional.cross_entropy(logits[:-1], sample[1:])
    with torch.no_grad():
        logp = dense(sample[None]).logits[0].double().log_softmax(-1)
    return (logp.exp() * (logp - logits.log_softmax(-1))).sum(-1).mean()


def at(model, database, problem, choice):
    """A float64 copy of the model at a choice."""
    other = copy.deepcopy(model).double()
    with torch.no_grad():
        for unit, k in zip(problem.table, choice, strict=True):
            for layer in unit.layers if not MENU[k].is_dense else ():
                other.get_submodule(layer.name).weight.copy_(database.weight(layer.name, MENU[k].name))
    return other.requires_grad_(True)


def change(model, database, unit, now, then):
    """The change [O, I] of each of a unit's layers, float64 by layer name."""

    def weight(layer, k):
        own = model.get_submodule(layer.name).weight.detach()
        return (own if MENU[k].is_dense else database.weight(layer.name, MENU[k].name)).double()

    return {layer.name: weight(layer, then) - weight(layer, now) for layer in unit.layers}


@pytest.mark.parametrize("objective", ["kl", "perplexity"])
def test_a_slope_is_the_gradient_times_the_change_of_the_weight(model, data, measured, objective):
    database, problem = measured
    with CandidateWeights(model, *measured) as weights:
        loss = CandidateLoss(weights, data, objective).prepare()
        first_order, curvature_samples = loss.move_gradients(NOW, [0, 2], len(MENU), 0)
    assert (
        first_order.shape == curvature_samples.shape == (2, 8, 5)
        and first_order.dtype == curvature_samples.dtype == np.float64
    )
    dense, candidate = copy.deepcopy(model).double(), at(model, database, problem, NOW)
    for s, i in enumerate([0, 2]):
        candidate.zero_grad()
        loss_by_hand(objective, dense, candidate, data.samples[i]).backward()
        for u, unit in enumerate(problem.table):
            for k in range(len(MENU)):
                expected = sum(
                    float((candidate.get_submodule(name).weight.grad * delta).sum())
                    for name, delta in change(model, database, unit, NOW[u], k).items()
                )
                if k == NOW[u]:
                    assert expected == 0.0 and np.isnan(first_order[s, u, k])
                else:
                    assert first_order[s, u, k] == pytest.approx(expected, rel=1e-3, abs=2e-6)
    assert np.nanmax(np.abs(first_order)) > 1e-2


def test_move_gradients_add_up_to_the_change_of_the_kl_along_a_joint_move(model, data, measured):
    database, problem = measured
    then = (2, 1, 1, 4, 2, 3, 3, 0)
    with CandidateWeights(model, *measured) as weights:
        first_order, _ = CandidateLoss(weights, data).prepare().move_gradients(NOW, [1], len(MENU), 0)
    found = np.nansum(first_order[0, np.arange(8), list(then)])
    dense, step = copy.deepcopy(model).double(), 1e-4
    ends = []
    for sign in (-1, 1):
        moved = at(model, database, problem, NOW)
        with torch.no_grad():
            for u, unit in enumerate(problem.table):
                for name, delta in change(model, database, unit, NOW[u], then[u]).items():
                    moved.get_submodule(name).weight.add_(sign * step * delta)
            ends.append(float(loss_by_hand("kl", dense, moved, data.samples[1])))
    assert found == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-3)
    assert abs(found) > 1e-2


def curvature(model, sample, deltas):
    """D^T F D of the mean over positions: the variance of the logits' change under the model's output.

    By enumeration of the vocabulary; the change of the logits [T, V] along D by central differences.
    """
    ends, step = [], 1e-5
    with torch.no_grad():
        for sign in (-1, 1):
            moved = copy.deepcopy(model)
            for name, delta in deltas.items():
                moved.get_submodule(name).weight.add_(sign * step * delta)
            ends.append(moved(sample[None]).logits[0])
        p = model(sample[None]).logits[0].softmax(-1)
    along = (ends[1] - ends[0]) / (2 * step)
    return float(((p * along.square()).sum(-1) - (p * along).sum(-1).square()).mean())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_the_mean_square_of_the_draws_is_the_gauss_newton_curvature(model, data, measured):
    database, problem = measured
    count, then = 250, (2, 1, 1, 4, 1, 3, 2, 3)
    with CandidateWeights(model, *measured) as weights:
        _, curvature_samples = CandidateLoss(weights, data).prepare().move_gradients(NOW, [2] * count, 1, 5)
    rows, sample = np.arange(8), data.samples[2]
    candidate = at(model, database, problem, NOW)
    deltas = [change(model, database, unit, NOW[u], then[u]) for u, unit in enumerate(problem.table)]
    joint = curvature_samples[:, rows, list(then)].sum(axis=1)
    tolerance = 4 * math.sqrt(2 / count)  # four standard deviations of a mean square of normal numbers
    expected = curvature(candidate, sample, {k: v for delta in deltas for k, v in delta.items()})
    assert (joint**2).mean() == pytest.approx(expected, rel=tolerance)
    assert abs(joint.mean()) < 4 * math.sqrt(expected / count)
    for u in range(8):
        found = (curvature_samples[:, u, then[u]] ** 2).mean()
        assert found == pytest.approx(curvature(candidate, sample, deltas[u]), rel=tolerance)


def test_half_the_curvature_is_how_the_kl_grows_around_the_dense_model(model, data, measured):
    """The pruned model's own Fisher information is the curvature of the KL from that very model."""
    database, problem = measured
    dense, step = copy.deepcopy(model).double(), 1e-2
    delta = change(model, database, problem.table[3], 0, 3)
    moved = copy.deepcopy(dense)
    with torch.no_grad():
        for name, d in delta.items():
            moved.get_submodule(name).weight.add_(step * d)
        grown = float(loss_by_hand("kl", dense, moved, data.samples[0]))
    assert grown == pytest.approx(0.5 * step**2 * curvature(dense, data.samples[0], delta), rel=0.05)


@pytest.mark.parametrize("reach", [1, 2])
def test_there_is_nothing_at_the_present_level_and_beyond_reach(model, data, measured, reach):
    with CandidateWeights(model, *measured) as weights:
        first_order, curvature_samples = (
            CandidateLoss(weights, data).prepare().move_gradients(NOW, [0, 1], reach, 0)
        )
    distance = np.abs(np.arange(len(MENU))[None, :] - np.array(NOW)[:, None])
    asked = (distance > 0) & (distance <= reach)
    for found in (first_order, curvature_samples):
        assert np.array_equal(np.isfinite(found), np.broadcast_to(asked, found.shape))


def test_a_seed_fixes_the_draws_and_leaves_the_move_gradients_alone(model, data, measured):
    with CandidateWeights(model, *measured) as weights:
        loss = CandidateLoss(weights, data).prepare()
        first, again, other = (loss.move_gradients(NOW, [0, 1, 2], 1, seed) for seed in (3, 3, 4))
    for found, same in ((again[0], first[0]), (again[1], first[1]), (other[0], first[0])):
        assert np.array_equal(found, same, equal_nan=True)
    assert not np.array_equal(first[1], other[1], equal_nan=True)


def test_move_gradients_cost_five_forward_passes_and_none_is_saved(model, data, measured):
    with CandidateWeights(model, *measured) as weights:
        loss = CandidateLoss(weights, data).prepare()
        loss.move_gradients(NOW, [0, 2], 1, 0)
        assert loss.forward_tokens == loss.block_tokens == 5 * (9 + 6)


def test_move_gradients_neither_use_nor_change_the_kept_activations(model, data, measured):
    other = (*NOW[:7], 3)
    with CandidateWeights(model, *measured) as weights:
        loss = CandidateLoss(weights, data).prepare()
        expected = loss(NOW), loss(other), loss.move_gradients(NOW, [0, 1], 1, 0)[0]
        loss.set_incumbent(NOW)
        assert loss(NOW) == expected[0]
        assert np.array_equal(loss.move_gradients(NOW, [0, 1], 1, 0)[0], expected[2], equal_nan=True)
        loss.move_gradients((4,) * 8, [0, 1], 1, 0)
        assert (loss(NOW), loss(other)) == expected[:2]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(model, data, measured, bits, count_hooks, fails):
    model.get_submodule("model.layers.0.mlp.up_proj").weight.requires_grad_(False)
    before, hooks = bits(model), count_hooks(model)

    def stop(*args):
        raise LookupError

    with CandidateWeights(model, *measured) as weights:
        loss = CandidateLoss(weights, data).prepare()
        if fails:
            handle = model.model.layers[1].register_forward_hook(stop)
            with pytest.raises(LookupError):
                loss.move_gradients(NOW, [0, 1], 1, 0)
            handle.remove()
        else:
            loss.move_gradients(NOW, [0, 1], 1, 0)
        assert count_hooks(model) == hooks and all(p.grad is None for p in model.parameters())
    assert bits(model) == before
    assert not model(data.samples[0][None]).logits.isnan().any()


def test_a_sample_that_does_not_reach_a_unit_counts_as_no_change(model, data, measured):
    with CandidateWeights(model, *measured) as weights:
        loss = CandidateLoss(weights, data).prepare()
        expected = loss.move_gradients(NOW, [0, 1, 2], 1, 0)
    samples = [tuple(values[s].copy() for values in expected) for s in range(3)]
    for values in samples[1]:
        values[3] = np.nan
    for now, before in zip(stack_samples(samples), expected, strict=True):
        known = ~np.isnan(before[0, 3])
        assert known.any() and (now[1, 3, known] == 0.0).all()
        before[1, 3, known] = 0.0
        assert np.array_equal(now, before, equal_nan=True)


def test_small_first_order_changes_do_not_become_zero_in_float16():
    model, data = certain_llama()
    (ids,), found = data.samples, []
    layers = [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkvo"]

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits[:-1], ids[1:])

    def changes(layer):
        return layers.index(layer), {0: -0.5 * model.get_submodule(layer).weight.detach()}

    for dtype in (torch.float16, torch.float32):
        model = model.to(dtype)
        found.append(sample_gradients(model, ids, loss, layers, changes, (len(layers), 1), (0, 0))[0])
    np.testing.assert_allclose(found[0], found[1], rtol=0.05)


@pytest.mark.parametrize("numbers", [1, 24, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_products_with_a_gradient_are_the_same_whatever_is_held_at_a_time(numbers, dtype, monkeypatch):
    monkeypatch.setattr(move_gradients, "_NUMBERS", numbers)
    generator = torch.Generator().manual_seed(0)
    x, dy, *changes = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((9, 6), (9, 7), (7, 6), (7, 6))
    )
    gradient = dy.double().T @ x.double()
    found = move_gradients._gradient_products(x, dy, changes)
    rounding = 2**-6 if dtype == torch.bfloat16 else 2**-20
    scale = float((gradient.abs() * changes[0].double().abs()).sum())
    for value, change in zip(found, changes, strict=True):
        assert value == pytest.approx(float((gradient * change.double()).sum()), abs=rounding * scale)


def test_each_batch_of_a_measurement_is_told(model, data, measured):
    calls = []
    with CandidateWeights(model, *measured) as weights:
        loss = CandidateLoss(weights, data, batch_tokens=9, measured=lambda: calls.append(1)).prepare()
        loss(NOW)
        assert len(calls) == 3
        loss.move_gradients(NOW, [0, 2], 1, 0)
        assert len(calls) == 5
