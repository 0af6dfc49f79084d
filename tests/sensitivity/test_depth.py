"""What halves contribute: block influence, leave-one-out, Shapley values, and the allocator that ranks by them."""

import copy
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from msp_plugin.data.samples import split_text
from msp_plugin.errors import ModelError, RecipeError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plugins.manager import Plugins
from msp_plugin.search.allocate import allocate
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import resolve
from msp_plugin.sensitivity.base import unit_sensitivities
from msp_plugin.sensitivity.block_influence import BlockInfluence
from msp_plugin.sensitivity.shapley import LeaveOneOut, Shapley, mean_rises

HALVES = ("model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.1.mlp")


def measured(estimator, model, data):
    table = prunable_layers(model, granularity="half")
    assert table.names == HALVES
    return np.array(unit_sensitivities(estimator, model, data, table))


def hidden_states(model, sample):
    """The hidden state before each half and behind the last one, from what o_proj and down_proj give."""
    added = []
    handles = [
        model.get_submodule(f"{half}.{leaf}").register_forward_hook(
            lambda *args: added.append(args[-1][0].double())
        )
        for half, leaf in zip(HALVES, ("o_proj", "down_proj") * 2, strict=True)
    ]
    with torch.no_grad():
        model(sample[None])
    for handle in handles:
        handle.remove()
    return [model.model.embed_tokens(sample).double() + sum(added[:n]) for n in range(5)]


@pytest.mark.parametrize("metric", ["cosine", "l1", "l2"])
def test_block_influence_is_the_mean_change_of_a_token(llama, data, metric):
    by_hand = np.zeros(4)
    for sample in data.samples:
        for half, (x, y) in enumerate(itertools.pairwise(hidden_states(llama, sample))):
            x, y = x.detach().numpy(), y.detach().numpy()
            if metric == "cosine":
                change = 1 - (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
            else:
                order = int(metric[1])
                change = np.linalg.norm(y - x, order, axis=1) / np.linalg.norm(x, order, axis=1)
            by_hand[half] += change.sum() / data.tokens
    assert measured(BlockInfluence(metric), llama, data) == pytest.approx(by_hand, rel=1e-5)


def test_a_norm_behind_a_half_belongs_to_what_it_adds(make_samples):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "head_dim": 8,
        "num_hidden_layers": 2,
    }
    model = (
        Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).float().eval()
    )
    data = make_samples(1, 9)
    found = measured(BlockInfluence("l2"), model, data)
    with torch.no_grad():
        out = model(data.samples[0][None], output_hidden_states=True)
    seen = []
    block = model.model.layers[0]
    handle = block.pre_feedforward_layernorm.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    with torch.no_grad():
        model(data.samples[0][None])
    handle.remove()
    (middle,), (before, behind, _) = seen, out.hidden_states
    for number, (x, y) in enumerate(((before, middle), (middle, behind))):
        assert found[number] == pytest.approx(float(((y - x).norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-4)


def without_by_zeros(model, halves):
    """The model with zeros in what the halves put out."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for half in halves:
            module = model.get_submodule(HALVES[half])
            (module.o_proj if "attn" in HALVES[half] else module.down_proj).weight.zero_()
    return model


@pytest.fixture
def loss_of(llama, data):
    """The mean over samples of the cross entropy without some halves, computed by transformers."""

    def loss(removed):
        model = without_by_zeros(llama, removed)
        with torch.no_grad():
            return float(np.mean([model(s[None], labels=s[None]).loss.item() for s in data.samples]))

    return loss


def test_leave_one_out_is_the_rise_of_the_cross_entropy(llama, data, loss_of, bits):
    before = bits(llama)
    found = measured(LeaveOneOut(), llama, data)
    assert found == pytest.approx([loss_of([half]) - loss_of([]) for half in range(4)], abs=1e-5)
    assert bits(llama) == before and np.ptp(found) > 1e-3


def shapley_by_definition(loss, count):
    """Sum over the sets without a half, by the formula of Shapley (1953), of the rise that the half makes."""
    values = np.zeros(count)
    for half in range(count):
        others = [h for h in range(count) if h != half]
        for size in range(count):
            weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
            for gone in itertools.combinations(others, size):
                values[half] += weight * (loss(sorted((*gone, half))) - loss(gone))
    return values


def test_all_orders_give_the_shapley_values(loss_of):
    known = {}

    def loss(removed):
        removed = tuple(sorted(removed))
        if removed not in known:
            known[removed] = loss_of(removed)
        return known[removed]

    orders = [[np.array(order)] for order in itertools.permutations(range(4))]
    assert mean_rises(loss, orders, 4) == pytest.approx(shapley_by_definition(loss, 4), abs=1e-9)


def test_the_values_of_whole_orders_add_up_to_what_all_halves_are_worth(llama, data, loss_of):
    for seed in (0, 1):
        found = measured(Shapley(samples=99, rounds=2, share=1.0, seed=seed), llama, data)
        assert found.sum() == pytest.approx(loss_of(range(4)) - loss_of([]), abs=1e-5)


def test_a_run_of_one_half_is_leave_one_out_and_each_round_takes_out_each_half_once(llama, data):
    one = measured(Shapley(samples=99, rounds=3, share=0.25), llama, data)
    assert one == pytest.approx(measured(LeaveOneOut(samples=99), llama, data), abs=1e-9)
    runs = Shapley(rounds=5, share=0.4).removals(13)
    assert all(sorted(np.concatenate(of_round)) == list(range(13)) for of_round in runs)
    assert {len(run) for of_round in runs for run in of_round} == {4, 5}


def test_passes_are_counted(llama, data):
    names = tuple(layer.name for layer in prunable_layers(llama).layers)
    calls = []
    handle = llama.register_forward_hook(lambda *_: calls.append(1))
    for estimator in (LeaveOneOut(samples=2), Shapley(samples=2, rounds=3)):
        calls.clear()
        unit_sensitivities(estimator, llama, data, prunable_layers(llama, granularity="half"))
        assert len(calls) == 2 * estimator.passes(llama, names)
    handle.remove()


@pytest.mark.parametrize(
    "estimator", [BlockInfluence(), LeaveOneOut(samples=2), Shapley(samples=2, rounds=2)]
)
def test_what_a_block_contributes_is_the_sum_of_its_halves(llama, data, estimator):
    halves = measured(estimator, llama, data)
    blocks = unit_sensitivities(estimator, llama, data, prunable_layers(llama, granularity="block"))
    assert blocks == pytest.approx(halves.reshape(2, 2).sum(axis=1), abs=1e-12)


@pytest.mark.parametrize("metric", ["block_influence", "leave_one_out", "shapley"])
def test_the_halves_of_least_influence_are_dropped_on_the_exact_budget(llama, data, tmp_path, metric):
    plan = resolve(
        Options(
            sparsity=0.5, levels=["dense", "dropped"], method="magnitude", cache=str(tmp_path / "cache"),
            allocator={"name": "depth", "metric": metric},
        ),
        Plugins(entry_points=False),
    )  # fmt: skip
    outcome = allocate(llama, split_text(data, plan.search_text), plan)
    found, influence = outcome.allocation, np.array(outcome.allocation.sensitivities[metric])
    gone = [level.name == "dropped" for level in found.levels]
    sizes = np.array([unit.weights for unit in found.table])
    least = min(
        (influence[list(choice)].sum(), choice)
        for n in range(5)
        for choice in itertools.combinations(range(4), n)
        if sizes[list(choice)].sum() == found.budget.zeros
    )
    assert np.flatnonzero(gone).tolist() == list(least[1]) and found.budget.sparsity == Fraction(1, 2)


def test_bad_options_and_models_are_refused(data):
    for make in (
        lambda: BlockInfluence("l3"), lambda: Shapley(share=0.0), lambda: Shapley(rounds=0), lambda: LeaveOneOut(0),
    ):  # fmt: skip
        with pytest.raises(RecipeError):
            make()
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(
        OPTConfig(vocab_size=128, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ModelError, match="heads, channels and halves are removed from models of the types"):
        BlockInfluence().layer_sensitivities(model, data, ("model.decoder.layers.0.fc1",))
