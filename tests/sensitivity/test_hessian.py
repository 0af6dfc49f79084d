import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import ModelError, NumericsError, RecipeError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.sensitivity import hessian
from msp_plugin.sensitivity.base import unit_sensitivities
from msp_plugin.sensitivity.hessian import HessianTrace, quadratic_forms, random_signs
from tests.helpers.models import certain_llama


@pytest.fixture
def tiny():
    """Two blocks with weights of 64 to 96 parameters, so that their Hessians can be written out."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def few():
    random = torch.Generator().manual_seed(0)
    return CalibrationSet(tuple(torch.randint(0, 16, (n,), generator=random) for n in (9, 6)), "few")


def names_of(model):
    return tuple(layer.name for layer in prunable_layers(model).layers)


def loss_of(model, sample, weights):
    logits = functional_call(model, weights, (sample[None],)).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, sample[1:])


def exact_hessian(model, sample, name):
    """The whole Hessian of one weight, [n, n]."""
    weight = model.get_submodule(name).weight.detach()
    with sdpa_kernel(SDPBackend.MATH):
        matrix = torch.autograd.functional.hessian(
            lambda w: loss_of(model, sample, {f"{name}.weight": w}), weight
        )
    return matrix.reshape(weight.numel(), weight.numel())


def test_probes_that_span_the_space_give_the_exact_trace(tiny, few):
    names = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")
    weights = [tiny.get_submodule(name).weight for name in names]

    def basis():
        for i, weight in enumerate(weights):
            for unit in torch.eye(weight.numel()):
                yield [unit.view_as(w) if j == i else torch.zeros_like(w) for j, w in enumerate(weights)]

    with sdpa_kernel(SDPBackend.MATH):
        found = quadratic_forms(loss_of(tiny, few.samples[0], {}), weights, basis())
    expected = [float(exact_hessian(tiny, few.samples[0], name).trace()) for name in names]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"])
def test_the_estimate_is_the_mean_of_the_probes_quadratic_forms(tiny, few, name):
    random = torch.Generator().manual_seed(5)
    expected = []
    for sample in few.samples:
        matrix = exact_hessian(tiny, sample, name)
        for _ in range(3):
            v = random_signs([tiny.get_submodule(name).weight], random)[0].flatten()
            expected.append(float(v @ matrix @ v))
    found = HessianTrace(probes=3, seed=5).layer_sensitivities(tiny, few, (name,))
    assert found == {name: pytest.approx(np.mean(expected), rel=1e-3)}


def test_the_mean_over_seeds_is_the_trace(tiny, few):
    data, name = CalibrationSet(few.samples[:1], "one"), "model.layers.0.mlp.down_proj"
    exact = float(exact_hessian(tiny, data.samples[0], name).trace())
    found = [HessianTrace(seed=s).layer_sensitivities(tiny, data, (name,))[name] for s in range(30)]
    assert abs(np.mean(found) - exact) < 3 * np.std(found, ddof=1) / np.sqrt(30) < 0.5 * abs(exact)


def test_blocks_that_do_not_fit_together_are_probed_apart(tiny, few, monkeypatch):
    names = names_of(tiny)
    first = HessianTrace().layer_sensitivities(tiny, few, names[:7])
    together = HessianTrace().layer_sensitivities(tiny, few, names)
    assert HessianTrace().passes(tiny, names) == 1
    monkeypatch.setattr(hessian, "PROBED_BYTES", 1)
    apart = HessianTrace().layer_sensitivities(tiny, few, names)
    assert {name: apart[name] for name in names[:7]} == first
    assert {name: together[name] for name in names[:7]} != first
    assert HessianTrace().passes(tiny, names) == 2


def test_a_units_sensitivity_is_the_sum_over_its_layers(tiny, few):
    table = prunable_layers(tiny)
    by_layer = HessianTrace().layer_sensitivities(tiny, few, names_of(tiny))
    assert unit_sensitivities(HessianTrace(), tiny, few, table) == tuple(
        sum(by_layer[layer.name] for layer in unit.layers) for unit in table
    )


def test_only_the_asked_samples_are_used_and_seeds_differ(tiny, few):
    names = names_of(tiny)[:3]
    found = HessianTrace(samples=1).layer_sensitivities(tiny, few, names)
    assert found == HessianTrace().layer_sensitivities(tiny, CalibrationSet(few.samples[:1], "one"), names)
    assert found != HessianTrace(samples=1, seed=1).layer_sensitivities(tiny, few, names)


def test_the_model_is_left_as_it_was(model, make_samples, bits, count_hooks):
    data = make_samples(1, 8)
    model.get_submodule("model.layers.0.mlp.up_proj").weight.requires_grad_(False)
    before, hooks, mode = bits(model), count_hooks(model), model.training
    with torch.no_grad():
        first = HessianTrace(probes=1).layer_sensitivities(model, data, names_of(model))
    assert bits(model) == before and count_hooks(model) == hooks and model.training == mode
    assert all(parameter.grad is None for parameter in model.parameters())
    assert HessianTrace(probes=1).layer_sensitivities(model, data, names_of(model)) == first


def test_a_model_in_bfloat16_gives_nearly_the_same(llama, make_samples):
    data, names = make_samples(2, 16), names_of(llama)
    expected = HessianTrace(probes=2).layer_sensitivities(llama, data, names)
    found = HessianTrace(probes=2).layer_sensitivities(llama.bfloat16(), data, names)
    gaps = [abs(found[name] - value) for name, value in expected.items()]
    assert sum(gaps) < 0.15 * sum(abs(value) for value in expected.values())


def test_small_curvatures_are_not_rounded_away_in_float16():
    model, data = certain_llama()
    names = tuple(layer.name for layer in prunable_layers(model).layers)
    estimator = HessianTrace(probes=2)
    found = estimator.layer_sensitivities(model, data, names)
    expected = estimator.layer_sensitivities(model.float(), data, names)
    assert found == {name: pytest.approx(value, rel=0.01) for name, value in expected.items()}


def test_a_weight_that_the_loss_does_not_reach_has_no_curvature():
    reached, idle, linear = (torch.ones(3, requires_grad=True) for _ in range(3))
    probes = iter([[torch.ones(3)] * 3])
    assert quadratic_forms((reached**2).sum() + linear.sum(), [reached, idle, linear], probes) == [
        6.0,
        0.0,
        0.0,
    ]
    assert quadratic_forms(linear.sum(), [idle, linear], iter([[torch.ones(3)] * 2])) == [0.0, 0.0]


def test_signs_are_signs_and_fair():
    (signs,) = random_signs([torch.zeros(200, 50, dtype=torch.bfloat16)], torch.Generator().manual_seed(0))
    assert signs.dtype == torch.bfloat16 and set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.float().mean())) < 0.03


def test_a_loss_that_is_not_finite_names_the_sample_and_leaves_the_model(tiny, few, bits):
    with torch.no_grad():
        tiny.lm_head.weight[0, 0] = float("nan")
    before = bits(tiny)
    with pytest.raises(NumericsError, match="calibration sample 0 is not finite"):
        HessianTrace().layer_sensitivities(tiny, few, names_of(tiny))
    assert bits(tiny) == before


def test_an_operation_without_a_second_derivative_is_refused(tiny, few, bits):
    def add_distances(module, args, output):
        return output + torch.cdist(output, output, p=1.0).mean()

    tiny.model.norm.register_forward_hook(add_distances)
    before = bits(tiny)
    with pytest.raises(ModelError, match="no second derivative: .*derivative for") as error:
        HessianTrace().layer_sensitivities(tiny, few, names_of(tiny))
    assert "eager" in error.value.hint and bits(tiny) == before


def test_attention_without_a_second_derivative_is_refused(tiny, few):
    tiny.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="attention 'flash_attention_2' has no second derivative"):
        HessianTrace().layer_sensitivities(tiny, few, names_of(tiny))


def test_other_failures_come_out_as_they_are(tiny, few):
    def fail(*at):
        raise RuntimeError("out of order")

    tiny.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="^out of order$"):
        HessianTrace().layer_sensitivities(tiny, few, names_of(tiny))


def test_progress_counts_samples_of_each_group(tiny, few, monkeypatch):
    monkeypatch.setattr(hessian, "PROBED_BYTES", 1)
    seen = []
    HessianTrace(probes=1).layer_sensitivities(tiny, few, names_of(tiny), lambda *at: seen.append(at))
    assert seen == [(done, 4) for done in range(1, 5)]


@pytest.mark.parametrize("options", [{"samples": 0}, {"probes": 0}, {"seed": -1}])
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(RecipeError, match=f"hessian_trace: {next(iter(options))} = "):
        HessianTrace(**options)
