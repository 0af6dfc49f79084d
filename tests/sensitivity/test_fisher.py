import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import NumericsError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.sensitivity.base import Estimator, unit_sensitivities
from msp_plugin.sensitivity.fisher import FisherTrace, squared_gradient_norms
from tests.helpers.models import certain_llama


def by_hand(model, data, names):
    """Mean over samples of the squared norm of autograd's gradient, one sample at a time."""
    weights = [model.get_submodule(name).weight.requires_grad_(True) for name in names]
    totals = dict.fromkeys(names, 0.0)
    for sample in data.samples:
        logits = model(sample[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, sample[1:])
        for name, gradient in zip(names, torch.autograd.grad(loss, weights), strict=True):
            totals[name] += float(gradient.double().square().sum())
    return {name: total / len(data) for name, total in totals.items()}


def names_of(model):
    return tuple(layer.name for layer in prunable_layers(model).layers)


@pytest.mark.parametrize("length", [6, 48], ids=["over token pairs", "over the product"])
def test_the_trace_is_that_of_per_sample_gradients(model, make_samples, length):
    data, names = make_samples(count=5, length=length), names_of(model)
    found = FisherTrace().layer_sensitivities(model, data, names)
    expected = by_hand(model, data, names)
    assert tuple(found) == names
    assert found == {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()}
    assert min(found.values()) > 0


def test_a_model_that_flattens_its_tokens_is_measured_per_sample_too(make_samples):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=128, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    data, names = make_samples(count=5, length=9), names_of(model)
    found = FisherTrace().layer_sensitivities(model, data, names)
    expected = by_hand(model, data, names)
    assert found == {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()}


def test_samples_of_unequal_length_count_alike(llama, make_samples):
    data = CalibrationSet(make_samples(2, 7).samples + make_samples(3, 30, seed=1).samples, "mixed")
    names = names_of(llama)
    found = FisherTrace().layer_sensitivities(llama, data, names)
    assert found == {
        name: pytest.approx(value, rel=1e-4) for name, value in by_hand(llama, data, names).items()
    }


def test_only_the_asked_samples_are_used(llama, make_samples):
    data, names = make_samples(6, 8), names_of(llama)[:3]
    found = FisherTrace(samples=2).layer_sensitivities(llama, data, names)
    assert found == FisherTrace().layer_sensitivities(llama, CalibrationSet(data.samples[:2], "two"), names)
    assert found != FisherTrace(samples=3).layer_sensitivities(llama, data, names)


@pytest.mark.parametrize("t, i, o", [(3, 40, 30), (40, 8, 6), (1, 1, 1), (16, 32, 32), (15, 32, 32)])
def test_both_forms_of_the_norm_are_the_gradients_own(t, i, o):
    torch.manual_seed(t)
    x, dy = torch.randn(4, t, i), torch.randn(4, t, o)
    expected = torch.stack([(dy[b].double().T @ x[b].double()).square().sum() for b in range(4)])
    found = squared_gradient_norms(x, dy)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_the_model_is_left_as_it_was(model, data, bits, count_hooks):
    model.get_submodule("model.layers.0.mlp.up_proj").weight.requires_grad_(False)
    before, hooks, mode = bits(model), count_hooks(model), model.training
    FisherTrace().layer_sensitivities(model, data, names_of(model))
    assert bits(model) == before and count_hooks(model) == hooks and model.training == mode
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_that_is_not_finite_names_the_sample_and_leaves_the_model(llama, data, bits, count_hooks):
    sample = data.samples[4]
    with torch.no_grad():
        only_in_fifth = next(
            int(t) for t in sample if all(t not in s for i, s in enumerate(data.samples) if i != 4)
        )
        llama.model.embed_tokens.weight[only_in_fifth] = float("nan")
    before, hooks = bits(llama), count_hooks(llama)
    with pytest.raises(NumericsError, match="calibration sample 4 is not finite") as error:
        FisherTrace().layer_sensitivities(llama, data, names_of(llama))
    assert "float32" in error.value.hint
    assert bits(llama) == before and count_hooks(llama) == hooks


def test_progress_counts_samples(llama, data):
    seen = []
    FisherTrace().layer_sensitivities(llama, data, names_of(llama)[:1], lambda *at: seen.append(at))
    assert seen == [(done, 6) for done in range(1, 7)]


def test_a_call_under_no_grad_gives_the_same(llama, data):
    names = names_of(llama)[:4]
    expected = FisherTrace().layer_sensitivities(llama, data, names)
    with torch.no_grad():
        assert FisherTrace().layer_sensitivities(llama, data, names) == expected


def test_a_units_sensitivity_is_the_sum_over_its_layers(llama, data):
    table = prunable_layers(llama)
    by_layer = FisherTrace().layer_sensitivities(llama, data, names_of(llama))
    found = unit_sensitivities(FisherTrace(), llama, data, table)
    assert found == tuple(sum(by_layer[layer.name] for layer in unit.layers) for unit in table)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sensitivity_that_is_not_finite_is_refused(llama, data, value):
    class Odd(Estimator):
        name = "odd"

        def layer_sensitivities(self, model, data, layers, progress=None):
            return {name: value if name.endswith("1.mlp.up_proj") else 1 for name in layers}

    with pytest.raises(
        NumericsError, match="'odd' is not finite for 1 layers, e.g. model.layers.1.mlp.up_proj"
    ):
        unit_sensitivities(Odd(), llama, data, prunable_layers(llama))


def test_small_gradients_do_not_become_zero_in_float16():
    model, data = certain_llama()
    names = names_of(model)
    found = FisherTrace().layer_sensitivities(model, data, names)
    expected = FisherTrace().layer_sensitivities(model.float(), data, names)
    assert found == {name: pytest.approx(value, rel=0.02) for name, value in expected.items()}
