import numpy as np
import pytest
import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.passes.observe import in_groups, observe_inputs, units_of
from msp_plugin.sensitivity.base import unit_sensitivities
from msp_plugin.sensitivity.outliers import Median, Outliers, input_norms


def names_of(model, ignore=()):
    return tuple(layer.name for layer in prunable_layers(model, ignore=ignore).layers)


def inputs_by_hand(model, data, names):
    """All inputs of every layer, float64[tokens, in], one sample at a time."""
    found = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found[name].append(args[0][0].double().numpy())
        )
        for name in names
    ]
    with torch.no_grad():
        for sample in data.samples:
            model(sample[None])
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in found.items()}


def saliences_by_hand(model, data, names):
    """A = |W| * ||X||_2 of every block in one array, by block number."""
    blocks = {}
    for name, x in inputs_by_hand(model, data, names).items():
        weight = model.get_submodule(name).weight.detach().double().numpy()
        a = np.abs(weight) * np.sqrt((x**2).sum(axis=0))
        blocks.setdefault(int(name.split(".")[2]), []).append(a.ravel())
    return {block: np.concatenate(parts) for block, parts in blocks.items()}


@pytest.fixture
def mixed(make_samples):
    """Samples of two lengths, so that a batch ends early."""
    return CalibrationSet(make_samples(3, 7).samples + make_samples(2, 30, seed=1).samples, "mixed")


@pytest.mark.parametrize("threshold", [1.5, 3.0, 5.0])
def test_outliers_are_the_share_beyond_a_multiple_of_the_blocks_mean(model, mixed, threshold):
    names = names_of(model)
    found = Outliers(threshold).layer_sensitivities(model, mixed, names)
    by_hand = saliences_by_hand(model, mixed, names)
    for name in names:
        a = by_hand[int(name.split(".")[2])]
        assert found[name] == pytest.approx((a > threshold * a.mean()).mean(), abs=2 / a.size)
    assert len(set(found.values())) == 2


def test_the_median_is_that_of_the_whole_block(model, mixed):
    names = names_of(model)
    found = Median().layer_sensitivities(model, mixed, names)
    by_hand = saliences_by_hand(model, mixed, names)
    for name in names:
        a = np.sort(by_hand[int(name.split(".")[2])])
        assert found[name] == pytest.approx(a[(a.size - 1) // 2], rel=1e-5)


@pytest.mark.parametrize("estimator", [Outliers(2.0), Median()])
def test_only_the_asked_layers_count(llama, mixed, estimator):
    some = names_of(llama, ignore=["down_proj"])
    found = estimator.layer_sensitivities(llama, mixed, some)
    a = saliences_by_hand(llama, mixed, some)[1]
    expected = (a > 2 * a.mean()).mean() if estimator.name == "outliers" else np.sort(a)[(a.size - 1) // 2]
    assert tuple(found) == some and found[some[-1]] == pytest.approx(expected, rel=1e-3)
    assert found != {
        name: estimator.layer_sensitivities(llama, mixed, names_of(llama))[name] for name in some
    }


def test_pruned_weights_count_as_zeros(llama, data):
    names = names_of(llama)
    before = Outliers().layer_sensitivities(llama, data, names)
    with torch.no_grad():
        for name in names[:7]:
            weight = llama.get_submodule(name).weight
            weight.masked_fill_(weight.abs() < weight.abs().quantile(0.75), 0)
    after = Outliers().layer_sensitivities(llama, data, names)
    a = saliences_by_hand(llama, data, names)[0]
    assert after[names[0]] == pytest.approx((a > 5 * a.mean()).mean(), abs=2 / a.size)
    assert after[names[0]] > before[names[0]]


@pytest.mark.parametrize("estimator", [Outliers(), Median()])
def test_a_unit_has_its_blocks_number_whatever_its_granularity(llama, data, estimator):
    for granularity in ("unit", "layer", "block"):
        table = prunable_layers(llama, granularity=granularity)
        by_layer = estimator.layer_sensitivities(llama, data, names_of(llama))
        found = unit_sensitivities(estimator, llama, data, table)
        assert found == tuple(pytest.approx(by_layer[unit.layers[0].name]) for unit in table)


@pytest.mark.parametrize("estimator", [Outliers(), Median()])
def test_the_model_is_left_as_it_was(model, data, bits, count_hooks, estimator):
    model.get_submodule("model.layers.0.mlp.up_proj").weight.requires_grad_(False)
    before, hooks, mode = bits(model), count_hooks(model), model.training
    first = estimator.layer_sensitivities(model, data, names_of(model))
    assert bits(model) == before and count_hooks(model) == hooks and model.training == mode
    assert estimator.layer_sensitivities(model, data, names_of(model)) == first


@pytest.mark.parametrize("estimator", [Outliers(2.0), Median()])
def test_a_model_in_bfloat16_gives_nearly_the_same(llama, data, estimator):
    names = names_of(llama)
    expected = estimator.layer_sensitivities(llama, data, names)
    found = estimator.layer_sensitivities(llama.bfloat16(), data, names)
    assert found == {name: pytest.approx(value, rel=0.03) for name, value in expected.items()}


def test_an_input_that_is_not_finite_names_the_layer_and_leaves_the_model(llama, data, bits, count_hooks):
    with torch.no_grad():
        llama.model.layers[1].post_attention_layernorm.weight[3] = float("inf")
    before, hooks = bits(llama), count_hooks(llama)
    with pytest.raises(NumericsError, match="input of model.layers.1.mlp.gate_proj is not finite") as error:
        Outliers().layer_sensitivities(llama, data, names_of(llama))
    assert "float32" in error.value.hint and bits(llama) == before and count_hooks(llama) == hooks


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_no_share_of_outliers(llama, data, value):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight[3, 5] = value
    with pytest.raises(NumericsError, match="not finite in the block of model.layers.1"):
        Outliers().layer_sensitivities(llama, data, names_of(llama))


def test_layers_that_see_no_token_are_named(llama):
    with pytest.raises(NumericsError, match="14 layers saw no|8 layers saw no calibration token") as error:
        Outliers().layer_sensitivities(llama, CalibrationSet((), "none"), names_of(llama))
    assert "model.layers.0.self_attn.q_proj" in error.value.message


def test_layers_that_are_fused_share_their_inputs_norm(llama, data):
    norms = input_norms(llama, data, names_of(llama))
    q, k = (norms[f"model.layers.0.self_attn.{part}_proj"] for part in "qk")
    assert q.dtype == torch.float32 and torch.equal(q, k)
    assert not torch.equal(q, norms["model.layers.1.self_attn.q_proj"])


def test_a_pass_ends_after_the_last_block_that_is_observed(llama, data):
    calls = []
    llama.model.layers[1].register_forward_hook(lambda *at: calls.append(1))
    units = units_of(llama, names_of(llama))
    observe_inputs(llama, data, [unit for unit in units if unit.block == 0], lambda unit, x: None)
    assert not calls
    observe_inputs(llama, data, units[-1:], lambda unit, x: None)
    assert calls


def test_progress_counts_samples(llama, mixed):
    seen = []
    Outliers().layer_sensitivities(llama, mixed, names_of(llama), lambda *at: seen.append(at))
    assert seen == [(3, 5), (5, 5)]


def test_groups_hold_neighbours_up_to_the_limit():
    def groups(limit):
        return list(in_groups([3, 4, 9, 1, 1], lambda x: x, limit))

    assert groups(8) == [[3, 4], [9], [1, 1]] and groups(100) == [[3, 4, 9, 1, 1]]
    assert groups(0) == [[3], [4], [9], [1], [1]] and list(in_groups([], len, 5)) == []


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf")])
def test_a_threshold_that_is_no_positive_number_is_refused(threshold):
    with pytest.raises(RecipeError, match="threshold = .* must be a positive number"):
        Outliers(threshold)
