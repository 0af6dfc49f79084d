import copy

import pytest
import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.models.layers import prunable_layers
from msp_plugin.sensitivity import fisher_error
from msp_plugin.sensitivity.fisher_error import fisher_diagonals, fisher_errors


@pytest.fixture
def mixed(make_samples):
    """Samples of two lengths."""
    return CalibrationSet(make_samples(2, 7).samples + make_samples(3, 20, seed=1).samples, "mixed")


def names_of(model):
    return [layer.name for layer in prunable_layers(model).layers]


def diagonals_by_hand(model, data, names):
    """Mean over samples of T times autograd's squared gradient of the mean loss, float64."""
    weights = [model.get_submodule(name).weight for name in names]
    totals = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in zip(names, weights, strict=True)}
    for sample in data.samples:
        logits = model(sample[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, sample[1:])
        for name, gradient in zip(names, torch.autograd.grad(loss, weights), strict=True):
            totals[name] += len(sample) * gradient.double().square() / len(data)
    return totals


def halved(model):
    """Weights of two levels: ``same`` is the model's own, ``less`` lacks every second column."""

    def weight(layer, level):
        dense = model.get_submodule(layer).weight.detach().clone()
        if level == "less":
            dense[:, ::2] = 0
        return dense

    return weight


def test_the_diagonal_is_that_of_per_sample_gradients(model, mixed):
    names = names_of(model)
    found = fisher_diagonals(model, mixed, names)
    for name, expected in diagonals_by_hand(model, mixed, names).items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-9)


def test_the_error_is_half_the_squared_change_weighted_with_the_diagonal(model, mixed):
    names, weight = names_of(model), halved(model)
    found = fisher_errors(model, mixed, names, ["same", "less"], weight)
    diagonals = diagonals_by_hand(model, mixed, names)
    assert list(found) == names
    for name in names:
        change = weight(name, "less").double() - weight(name, "same").double()
        assert found[name]["same"] == 0.0
        assert found[name]["less"] == pytest.approx(float((diagonals[name] * change**2).sum()) / 2, rel=1e-4)
    assert min(levels["less"] for levels in found.values()) > 0


def test_the_error_approximates_the_growth_of_the_kl_of_a_model_that_fits_its_text(llama, make_samples):
    """With labels drawn from the model the empirical Fisher is the true one, and half of it the KL's growth."""
    generator, step, name = torch.Generator().manual_seed(0), 0.02, "model.layers.1.mlp.down_proj"
    ids = torch.arange(128)[:, None]
    with torch.no_grad():
        for _ in range(11):
            p = llama(ids, use_cache=False).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    samples = list(ids)
    data = CalibrationSet(tuple(samples), "its own")
    moved = copy.deepcopy(llama)
    with torch.no_grad():
        moved.get_submodule(name).weight.mul_(1 - step)
        p = llama(ids).logits.double().log_softmax(-1)
        q = moved(ids).logits.double().log_softmax(-1)
    grown = float((p.exp() * (p - q)).sum(-1).mean())
    found = fisher_errors(
        llama, data, [name], ["x"], lambda layer, level: moved.get_submodule(layer).weight.detach()
    )[name]["x"]
    assert grown / 3 < found < 3 * grown  # the diagonal alone, and tokens taken as independent


def test_groups_give_the_errors_of_one_within_the_memory_bound(llama, data, monkeypatch):
    names, weight = names_of(llama), halved(llama)
    whole = fisher_errors(llama, data, names, ["less"], weight)
    groups = []

    def recorded(model, samples, layers, progress, ranks):
        found = fisher_diagonals(model, samples, layers, progress, ranks)
        groups.append((list(layers), sum(diagonal.nbytes for diagonal in found.values())))
        return found

    monkeypatch.setattr(fisher_error, "fisher_diagonals", recorded)
    for limit, count in ((1, 14), (3 * 64 * 64 * 4, None), (1 << 30, 1)):
        groups.clear()
        assert fisher_errors(llama, data, names, ["less"], weight, diagonal_bytes=limit) == whole
        assert [name for group, _ in groups for name in group] == names
        assert all(held <= limit or len(group) == 1 for group, held in groups)
        assert len(groups) == count or (count is None and 4 <= len(groups) < 14)


def test_progress_counts_all_passes_over_the_samples(llama, data):
    seen = []
    fisher_errors(
        llama, data, names_of(llama)[:2], ["less"], halved(llama), diagonal_bytes=1,
        progress=lambda *at: seen.append(at),
    )  # fmt: skip
    assert seen == [(done, 12) for done in range(1, 13)]


class Routed(torch.nn.Module):
    """An MLP beside an expert that sees every third token alone."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp
        torch.manual_seed(0)
        self.expert = torch.nn.Linear(64, 64, bias=False)

    def forward(self, x):
        out = self.mlp(x).clone()
        out[:, ::3] += self.expert(x[:, ::3])
        return out


def test_an_expert_that_sees_few_tokens_is_weighed_like_the_others(llama, mixed):
    llama.model.layers[0].mlp = Routed(llama.model.layers[0].mlp)
    name = "model.layers.0.mlp.expert"
    found = fisher_diagonals(llama, mixed, [name])[name]
    expected = diagonals_by_hand(llama, mixed, [name])[name]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-9)


def test_the_model_is_left_as_it_was(model, data, bits, count_hooks):
    model.get_submodule("model.layers.0.mlp.up_proj").weight.requires_grad_(False)
    before, hooks = bits(model), count_hooks(model)
    fisher_errors(model, data, names_of(model), ["less"], halved(model), diagonal_bytes=1 << 16)
    assert bits(model) == before and count_hooks(model) == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_levels_of_bfloat16_models_are_compared_in_float32(llama, data):
    llama.bfloat16()
    name = names_of(llama)[0]
    dense = llama.get_submodule(name).weight.detach()

    def weight(layer, level):
        return dense * (1 + 2**-7) if level == "near" else dense

    found = fisher_errors(llama, data, [name], ["near"], weight)[name]["near"]
    diagonal = fisher_diagonals(llama, data, [name])[name]
    change = (dense * (1 + 2**-7)).double() - dense.double()
    assert found == pytest.approx(float((diagonal.double() * change**2).sum()) / 2, rel=1e-3) and found > 0
