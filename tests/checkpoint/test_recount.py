import sys
from fractions import Fraction

import pytest
import torch

from msp_plugin.checkpoint.recount import count_zeros, recount_model
from msp_plugin.errors import VerificationError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.menus import parse_menu
from msp_plugin.pruning.magnitude import Magnitude

MENU = parse_menu(["dense", "2:4", "1:8"])


@pytest.fixture
def pruned(llama):
    """A model at dense, 2:4, 1:8, dense, ... and its allocation."""
    table = prunable_layers(llama)
    allocation = Allocation(table, tuple(MENU[u % 3] for u in range(len(table))), Fraction(1, 2))
    with torch.no_grad():
        for name, level in allocation.by_layer.items():
            module = llama.get_submodule(name)
            (weight,) = Magnitude().prune_levels(module, None, [level], name)
            module.weight.copy_(weight)
    return llama, allocation


def test_the_recount_finds_the_planned_zeros(pruned):
    model, allocation = pruned
    stats = recount_model(model, allocation)
    for name, level in allocation.by_layer.items():
        weight = model.get_submodule(name).weight
        assert stats.zeros[name] == int((weight == 0).sum()) == weight.numel() * level.sparsity
        assert stats.weights[name] == weight.numel()
    assert stats.total_zeros == allocation.budget.zeros and stats.total_weights == allocation.budget.weights
    assert stats.sparsity == float(allocation.budget.sparsity)


def test_zeros_that_were_there_before_or_have_a_dead_input_are_counted_and_allowed(pruned):
    model, allocation = pruned
    planned = recount_model(model, allocation)
    name = "model.layers.0.self_attn.o_proj"
    with torch.no_grad():
        module = model.get_submodule(name)
        module.weight.normal_()[:, 4:7] = 0  # three dead inputs in one group of four
        module.weight.copy_(next(Magnitude().prune_levels(module, None, parse_menu(["2:4"]), name)))
        model.get_submodule("model.layers.0.self_attn.q_proj").weight[0, :5] = 0
    before = {"model.layers.0.self_attn.q_proj": 5}
    found = recount_model(model, allocation, before=before)
    assert allocation.by_layer[name].name == "2:4"
    assert found.zeros[name] == planned.zeros[name] + 64
    assert found.total_zeros == planned.total_zeros + 5 + 64


def test_a_dense_layer_that_lost_weights_is_found(pruned):
    model, allocation = pruned
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.q_proj").weight[0, :5] = 0
    with pytest.raises(
        VerificationError, match="q_proj has 5 zeros; planned was dense with 0 zeros of 4,096"
    ):
        recount_model(model, allocation)
    assert recount_model(model, allocation, exact=False).zeros["model.layers.0.self_attn.q_proj"] == 5


def test_one_full_row_does_not_hide_a_layer_that_was_pruned_too_far(pruned):
    model, allocation = pruned
    weight = model.get_submodule("model.layers.0.self_attn.o_proj").weight
    with torch.no_grad():
        weight[1:] = 0
    with pytest.raises(VerificationError, match="o_proj has .* planned was 2:4"):
        recount_model(model, allocation)


def test_a_model_that_was_sparser_before_may_stay_so(pruned):
    model, allocation = pruned
    zeros = count_zeros(model, allocation)
    levels = tuple(level if level.is_dense else parse_menu(["7:8"])[0] for level in allocation.levels)
    looser = Allocation(allocation.table, levels, Fraction(1, 8))
    assert recount_model(model, looser, before=zeros).zeros == zeros
    with pytest.raises(VerificationError, match="planned was 7:8"):
        recount_model(model, looser)


def test_one_weight_too_many_is_found(pruned):
    model, allocation = pruned
    weight = model.get_submodule("model.layers.0.self_attn.o_proj").weight
    with torch.no_grad():
        weight[7, int((weight[7] == 0).nonzero()[0])] = 1e-20
    with pytest.raises(VerificationError) as error:
        recount_model(model, allocation)
    assert "after pruning, model.layers.0.self_attn.o_proj keeps 3 of 4 in some group" in error.value.message
    assert "has 2,047 zeros; planned was 2:4 with 2,048 zeros of 4,096" in error.value.message
    assert "no calibration text" in error.value.hint


def test_a_layer_that_was_not_pruned_is_found(pruned, llama):
    model, allocation = pruned
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight.fill_(1.0)
    with pytest.raises(VerificationError, match="up_proj keeps 8 of 8 .* planned was 1:8"):
        recount_model(model, allocation)


def test_a_layer_that_was_pruned_too_far_is_found(pruned):
    model, allocation = pruned
    module = model.get_submodule("model.layers.0.self_attn.o_proj")
    (weight,) = Magnitude().prune_levels(module, None, parse_menu(["1:4"]), "x")
    with torch.no_grad():
        module.weight.copy_(weight)
    with pytest.raises(VerificationError, match="o_proj has 3,072 zeros; planned was 2:4"):
        recount_model(model, allocation)


def test_a_later_modifier_is_blamed_by_name(pruned):
    model, allocation = pruned
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.o_proj").weight += 1
    with pytest.raises(VerificationError, match="after a later modifier, ") as error:
        recount_model(model, allocation, after="a later modifier")
    assert "GPTQ" in error.value.hint and "must come before" in error.value.hint


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_found_in_dense_layers_too(pruned, name, value):
    model, allocation = pruned
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        weight[0, int((weight[0] != 0).nonzero()[0])] = value
    with pytest.raises(VerificationError, match=f"{name} holds weights that are not finite"):
        recount_model(model, allocation)


def test_a_recount_works_without_the_host(pruned, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    model, allocation = pruned
    assert recount_model(model, allocation).sparsity > 0
