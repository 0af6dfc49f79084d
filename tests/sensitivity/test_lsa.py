import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msp_plugin.errors import RecipeError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.sensitivity import lsa
from msp_plugin.sensitivity.lsa import VirtualRemoval, removal_error


def names_of(model):
    return tuple(layer.name for layer in prunable_layers(model).layers)


def error_by_hand(weight, hessian, share, group):
    """One row and one removal at a time: the cheapest goes, then all costs are computed anew."""
    total = 0.0
    for w in weight:
        gone = np.zeros_like(w)
        for start in range(0, len(w), group):
            columns = list(range(start, min(start + group, len(w))))
            for _ in range(int(share * len(columns))):
                left = [j for j in columns if gone[j] == 0]
                costs = [w[j] ** 2 * hessian[j, j] + 2 * w[j] * (gone @ hessian[:, j]) for j in left]
                j = left[int(np.argmin(costs))]
                total += min(costs)
                gone[j] = w[j]
    return total


def random_case(seed, rows, width):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3 * width, width)) @ rng.normal(size=(width, width))
    return rng.normal(size=(rows, width)), x.T @ x / len(x)


@given(
    st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 12), st.sampled_from([0.25, 0.5, 0.8, 1.0]),
    st.integers(1, 15),
)  # fmt: skip
@settings(max_examples=40)
def test_the_error_is_that_of_a_naive_loop(seed, rows, width, share, group):
    weight, hessian = random_case(seed, rows, width)
    found = removal_error(torch.tensor(weight), torch.tensor(hessian), share, group)
    assert found == pytest.approx(error_by_hand(weight, hessian, share, group), rel=1e-8, abs=1e-10)


def test_removing_all_weights_costs_the_whole_output():
    weight, hessian = random_case(0, 5, 20)
    found = removal_error(torch.tensor(weight), torch.tensor(hessian), 1.0, 6)
    assert found == pytest.approx(np.trace(weight @ hessian @ weight.T))


def test_a_share_that_is_no_binary_fraction_loses_no_weight_to_rounding():
    found = removal_error(torch.ones(1, 100), torch.eye(100), 0.29, 100)
    assert found == 29 and int(0.29 * 100) == 28


def test_inputs_that_do_not_correlate_lose_the_least_saliences():
    weight, hessian = random_case(1, 4, 16)
    hessian = np.diag(np.diag(hessian))
    costs = np.sort((weight**2 * np.diag(hessian)).reshape(4, 2, 8), axis=2)[:, :, :4]
    found = removal_error(torch.tensor(weight), torch.tensor(hessian), 0.5, 8)
    assert found == pytest.approx(costs.sum())


def test_a_layer_has_the_mean_error_of_its_block(model, data):
    names = names_of(model)
    errors, handles = {}, []

    def hook(name):
        def add(module, args, output):
            errors.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).double())

        return add

    for name in names:
        handles.append(model.get_submodule(name).register_forward_hook(hook(name)))
    with torch.no_grad():
        model(torch.stack(data.samples))
    for handle in handles:
        handle.remove()
    for name, parts in errors.items():
        x = torch.cat(parts)
        weight = model.get_submodule(name).weight.detach().double()
        errors[name] = removal_error(weight, x.T @ x / len(x), 0.5, 32)
    found = VirtualRemoval(group=32).layer_sensitivities(model, data, names)
    for block in (0, 1):
        mine = [name for name in names if f".{block}." in name]
        expected = np.mean([errors[name] for name in mine])
        assert [found[name] for name in mine] == [pytest.approx(expected, rel=1e-3)] * 7
    assert len(set(found.values())) == 2 and VirtualRemoval.combine == "mean"


def test_hessians_that_do_not_fit_together_take_another_pass(llama, data, monkeypatch):
    together = VirtualRemoval().layer_sensitivities(llama, data, names_of(llama))
    passes = []
    real = lsa.input_hessians
    monkeypatch.setattr(lsa, "input_hessians", lambda *at: passes.append(at[2]) or real(*at))
    monkeypatch.setattr(lsa, "HESSIAN_BYTES", 3 * 4 * 64 * 64)
    assert VirtualRemoval().layer_sensitivities(llama, data, names_of(llama)) == together
    assert [len(units) for units in passes] == [3, 1, 3, 1]
    assert VirtualRemoval().passes(llama, names_of(llama)) == 4


def test_the_model_is_left_as_it_was_and_the_numbers_repeat(model, data, bits, count_hooks):
    before, hooks, mode = bits(model), count_hooks(model), model.training
    first = VirtualRemoval().layer_sensitivities(model, data, names_of(model))
    assert bits(model) == before and count_hooks(model) == hooks and model.training == mode
    assert VirtualRemoval().layer_sensitivities(model, data, names_of(model)) == first


def test_a_model_in_bfloat16_gives_nearly_the_same(llama, data):
    expected = VirtualRemoval().layer_sensitivities(llama, data, names_of(llama))
    found = VirtualRemoval().layer_sensitivities(llama.bfloat16(), data, names_of(llama))
    assert found == {name: pytest.approx(value, rel=0.03) for name, value in expected.items()}


def test_progress_counts_layers(llama, data):
    seen = []
    VirtualRemoval().layer_sensitivities(llama, data, names_of(llama), lambda *at: seen.append(at))
    assert seen == [(done, 14) for done in range(1, 15)]


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.1}, {"share": float("nan")}, {"group": 0}])
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(RecipeError, match=f"virtual_removal: {next(iter(options))} = "):
        VirtualRemoval(**options)
