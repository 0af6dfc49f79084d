import pytest
import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.models.layers import prunable_layers
from msp_plugin.sensitivity.kfac_error import kfac_errors, output_gradient_squares


@pytest.fixture
def mixed(make_samples):
    """Samples of two lengths."""
    return CalibrationSet(make_samples(2, 7).samples + make_samples(3, 20, seed=1).samples, "mixed")


def names_of(model):
    return [layer.name for layer in prunable_layers(model).layers]


def squares_by_hand(model, data, names):
    """Mean over tokens of autograd's squared gradient of T times the mean loss by output, float64."""
    totals, outputs = dict.fromkeys(names, 0.0), {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.__setitem__(name, output)
        )
        for name in names
    ]
    for sample in data.samples:
        logits = model(sample[None]).logits[0, :-1]
        loss = len(sample) * torch.nn.functional.cross_entropy(logits, sample[1:])
        gradients = torch.autograd.grad(loss, [outputs[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            totals[name] += gradient.flatten(0, -2).double().square().sum(0) / data.tokens
    for handle in handles:
        handle.remove()
    return totals


def test_the_squares_are_those_of_the_gradients_of_tokens(model, mixed):
    names = names_of(model)
    found = output_gradient_squares(model, mixed, names)
    for name, expected in squares_by_hand(model, mixed, names).items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-9)


def test_the_error_is_half_the_row_errors_weighted_with_the_squares(model, mixed):
    names = names_of(model)

    def rows(layer, level):
        out = model.get_submodule(layer).out_features
        return torch.arange(out).float() * (level == "less")

    found = kfac_errors(model, mixed, names, ["same", "less"], rows)
    squares = squares_by_hand(model, mixed, names)
    assert list(found) == names
    for name in names:
        assert found[name]["same"] == 0.0
        expected = sum(o * float(square) for o, square in enumerate(squares[name])) / 2
        assert found[name]["less"] == pytest.approx(expected, rel=1e-3) and expected > 0


def test_the_model_is_left_as_it_was(model, data, bits, count_hooks):
    before = bits(model), count_hooks(model)
    kfac_errors(
        model,
        data,
        names_of(model)[:2],
        ["x"],
        lambda layer, level: torch.ones(model.get_submodule(layer).out_features),
    )
    assert (bits(model), count_hooks(model)) == before
