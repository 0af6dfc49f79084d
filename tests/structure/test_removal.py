"""What contributes nothing is read off the weights: against an oracle that runs the model without it."""

import pytest
import torch

from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.structure.halves import find_halves
from msp_plugin.structure.removal import kept_groups, read_groups, read_structure


def structure(model):
    parameters = dict(model.named_parameters())
    return read_structure(model, parameters.get)


def silent(model):
    return {
        name: torch.nonzero(groups).flatten().tolist() for name, groups in structure(model).silent.items()
    }


@pytest.mark.parametrize("name", ["llama", "llama with biases", "qwen2", "gemma2"])
def test_exactly_what_was_zeroed_is_silent(name, tiny, zeroing):
    model = tiny(name)
    zeroed = zeroing(model).at_random(seed=1)
    config = model.config
    for half in find_halves(model):
        whole = (half.block, half.kind) in zeroed["halves"]
        part = zeroed["heads" if half.kind == "attention" else "channels"]
        expected = [g for g in range(half.groups) if whole or (half.block, g) in part]
        assert silent(model)[half.name] == expected
    assert config.num_hidden_layers == structure(model).depth


@pytest.mark.parametrize("how", ["o_proj", "v_proj"])
def test_one_weight_or_bias_makes_a_head_heard(how, tiny, zeroing):
    model = tiny("llama with biases")
    zeroing(model).head(1, 2, how)
    assert silent(model)["model.layers.1.self_attn"] == [2]
    layer = getattr(model.model.layers[1].self_attn, how)
    with torch.no_grad():
        if how == "v_proj":
            layer.bias[2 * 8 + 3] = 1e-30
        else:
            layer.weight[5, 2 * 16 + 15] = 1e-30
    assert silent(model)["model.layers.1.self_attn"] == []


def test_zero_queries_or_keys_silence_nothing(tiny):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
        model.model.layers[1].self_attn.k_proj.weight.zero_()
    assert not any(silent(model).values())


def test_a_gate_bias_keeps_its_channel(tiny, zeroing):
    model = tiny("llama with biases")
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[3] = 0
    assert silent(model)["model.layers.0.mlp"] == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"])
def test_weights_that_are_not_finite_are_refused_by_name(layer, value, tiny):
    model = tiny("llama")
    with torch.no_grad():
        model.get_submodule(f"model.layers.2.{layer}").weight[1, 2] = value
    with pytest.raises(NumericsError, match=f"layers.2.{layer} holds weights that are not finite"):
        silent(model)


def test_channels_are_filled_up_to_the_quantum_by_the_first_silent_ones(tiny):
    mlp = find_halves(tiny("llama"))[1]
    groups = torch.ones(24, dtype=torch.bool)
    groups[[3, 7, 20]] = False
    assert kept_groups(mlp, groups, least=0) == (3, 7, 20)
    assert kept_groups(mlp, groups, least=0, quantum=4) == (0, 3, 7, 20)
    assert kept_groups(mlp, groups, least=0, quantum=8) == (0, 1, 2, 3, 4, 5, 7, 20)
    assert kept_groups(mlp, groups, least=0, quantum=24) == tuple(range(24))
    assert kept_groups(mlp, torch.ones(24, dtype=torch.bool), least=0, quantum=8) == ()
    assert kept_groups(mlp, torch.ones(24, dtype=torch.bool), least=1, quantum=8) == tuple(range(8))


@pytest.mark.parametrize("seed", range(12))
def test_fillers_leave_fours_whole_wherever_there_is_room(seed, tiny):
    mlp = find_halves(tiny("llama"))[1]
    generator = torch.Generator().manual_seed(seed)
    for used in (4, 8, 12):
        held = torch.randperm(24, generator=generator)[:used].sort().values.tolist()
        silent = torch.ones(24, dtype=torch.bool)
        silent[held] = False
        for count in range(1, 24 - used):
            kept = kept_groups(mlp, silent, least=used + count, fours=True)
            assert len(kept) == used + count and set(held) < set(kept)
            places = [kept.index(group) for group in held]
            whole = all(p % 4 == i % 4 and p // 4 == places[i // 4 * 4] // 4 for i, p in enumerate(places))
            bounds = [-1, *held, 24]
            room = sum((bounds[i + 1] - bounds[i] - 1) // 4 * 4 for i in range(0, used, 4))
            after = 23 - held[-1]
            assert whole or min(room, count // 4 * 4) < count - min(count, after)


def test_the_quantum_is_for_channels_and_must_divide_them(tiny):
    attention, mlp = find_halves(tiny("llama"))[:2]
    heads = torch.tensor([True, False, True, True])
    assert kept_groups(attention, heads, least=0, quantum=64) == (1,)
    with pytest.raises(RecipeError, match=r"mlp has 24 channels, no multiple of quantum = 64"):
        kept_groups(mlp, torch.ones(24, dtype=torch.bool), least=0, quantum=64)


def test_tensors_are_asked_for_by_their_names(tiny):
    model, asked = tiny("qwen2"), set()
    parameters = dict(model.named_parameters())

    def read(name):
        asked.add(name)
        return parameters.get(name)

    read_groups(find_halves(model)[0], read)
    linears = {f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"}
    assert {name.rpartition(".")[0] for name in asked} == linears
