import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.sensitivity.heavy_tail import HeavyTail, power_law_exponent


def names_of(model):
    return tuple(layer.name for layer in prunable_layers(model).layers)


def hill_by_hand(tail):
    """(distance, exponent) of an ascending tail, by the formulas and one eigenvalue at a time."""
    n, least = len(tail), tail[0]
    total = sum(math.log(value / least) for value in tail)
    if total == 0:
        return None
    exponent = 1 + n / total
    gaps = [abs(1 - (value / least) ** (1 - exponent) - i / n) for i, value in enumerate(tail)]
    return max(gaps), exponent


def peak_by_hand(values):
    """The exponent whose tail starts near the fullest of 100 bins of log10, of least distance."""
    values = sorted(values)
    logs = [math.log10(value) for value in values]
    width = (logs[-1] - logs[0]) / 100
    bins = [min(int((log - logs[0]) / width), 99) if width else 50 for log in logs]
    peak = 10 ** (logs[0] + width * max(range(100), key=lambda b: (bins.count(b), -b)))
    fits = [
        hill_by_hand(values[i:])
        for i, value in enumerate(values[:-1])
        if math.log10(0.95 * peak) <= value <= 1.5 * peak
    ]
    fits = [fit for fit in fits if fit]
    return min(fits)[1] if fits else None


@given(st.integers(0, 10**6), st.integers(5, 60), st.sampled_from([0.01, 1.0, 50.0]))
def test_the_exponent_near_the_peak_is_that_of_a_naive_loop(seed, size, scale):
    values = scale * np.random.default_rng(seed).pareto(1.5, size) + 0.01
    assert power_law_exponent(values, "peak") == pytest.approx(peak_by_hand(list(values)), rel=1e-9)


@given(st.integers(0, 10**6), st.integers(2, 60))
def test_the_exponent_of_the_upper_half_is_hills(seed, size):
    values = np.random.default_rng(seed).exponential(1.0, size)
    tail = sorted(values)[size // 2 :]
    if len(tail) == 1:
        assert power_law_exponent(values, "mid") is None
    else:
        expected = 1 + len(tail) / sum(math.log(value / tail[0]) for value in tail)
        assert power_law_exponent(values, "mid") == pytest.approx(expected)
        assert power_law_exponent(1000 * values, "mid") == pytest.approx(expected)


@pytest.mark.parametrize("exponent", [1.5, 2.0, 3.5])
def test_a_power_law_has_its_own_exponent(exponent):
    u = (np.arange(4000) + 0.5) / 4000
    values = (1 - u) ** (-1 / (exponent - 1))
    assert power_law_exponent(values, "mid") == pytest.approx(exponent, rel=0.01)


@pytest.mark.parametrize("xmin", ["peak", "mid"])
def test_zero_eigenvalues_are_left_out(xmin):
    values = np.random.default_rng(0).exponential(1.0, 30)
    assert power_law_exponent(np.append(values, [0.0] * 5), xmin) == power_law_exponent(values, xmin)


@pytest.mark.parametrize("xmin", ["peak", "mid"])
def test_a_layer_has_the_mean_over_its_block(model, xmin):
    names = names_of(model)
    found = HeavyTail(xmin).layer_sensitivities(model, None, names)
    for block in (0, 1):
        mine = [name for name in names if f".{block}." in name]
        spectra = [
            np.linalg.svd(model.get_submodule(name).weight.detach().double().numpy(), compute_uv=False) ** 2
            for name in mine
        ]
        expected = np.mean([power_law_exponent(values, xmin) for values in spectra])
        assert [found[name] for name in mine] == [pytest.approx(expected, rel=1e-3)] * 7
    assert len(set(found.values())) == 2 and not HeavyTail.needs_data and HeavyTail.combine == "mean"


def test_a_layer_without_a_tail_is_named(llama):
    with torch.no_grad():
        llama.model.layers[1].self_attn.o_proj.weight.copy_(torch.eye(64))
    with pytest.raises(
        NumericsError, match=r"no power law fits the 64 eigenvalues of model.layers.1.self_attn.o_p"
    ):
        HeavyTail("mid").layer_sensitivities(llama, None, names_of(llama))


def test_the_model_is_left_as_it_was_and_the_numbers_repeat(model, bits, count_hooks):
    before, hooks = bits(model), count_hooks(model)
    first = HeavyTail().layer_sensitivities(model, None, names_of(model))
    assert bits(model) == before and count_hooks(model) == hooks
    assert HeavyTail().layer_sensitivities(model, None, names_of(model)) == first


def test_a_model_in_bfloat16_gives_nearly_the_same(llama):
    expected = HeavyTail("mid").layer_sensitivities(llama, None, names_of(llama))
    found = HeavyTail("mid").layer_sensitivities(llama.bfloat16(), None, names_of(llama))
    assert found == {name: pytest.approx(value, rel=0.02) for name, value in expected.items()}


def test_progress_counts_layers(llama):
    seen = []
    HeavyTail().layer_sensitivities(llama, None, names_of(llama), lambda *at: seen.append(at))
    assert seen == [(7, 14), (14, 14)]


def test_an_unknown_start_of_the_tail_is_refused():
    with pytest.raises(RecipeError, match="xmin 'low' is unknown"):
        HeavyTail("low")
