import subprocess
import sys
from fractions import Fraction

import pytest
import torch

from msp_plugin.checkpoint.recount import recount_model
from msp_plugin.errors import VerificationError
from msp_plugin.models import prunable_layers
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.levels import parse_menu
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


def test_zeros_beyond_the_plan_are_counted(pruned):
    model, allocation = pruned
    planned = recount_model(model, allocation)
    name = "model.layers.0.self_attn.o_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[:3] = 0
        model.get_submodule("model.layers.0.self_attn.q_proj").weight[0, :5] = 0
    found = recount_model(model, allocation)
    assert allocation.by_layer[name].name == "2:4"
    assert found.zeros[name] == planned.zeros[name] + 3 * 32
    assert found.total_zeros == planned.total_zeros + 3 * 32 + 5


def test_one_weight_too_many_is_found(pruned):
    model, allocation = pruned
    weight = model.get_submodule("model.layers.0.self_attn.o_proj").weight
    with torch.no_grad():
        weight[7, int((weight[7] == 0).nonzero()[0])] = 1e-20
    with pytest.raises(VerificationError) as error:
        recount_model(model, allocation)
    assert "after pruning, model.layers.0.self_attn.o_proj keeps 3 of 4 in some group" in error.value.message
    assert "2,049 of 4,096 weights; planned was 2:4" in error.value.message
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
    with pytest.raises(VerificationError, match="o_proj keeps 1 of 4 .* planned was 2:4"):
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


def test_a_recount_works_without_the_host():
    code = """
import sys
sys.modules["compressed_tensors"] = None
import torch
from fractions import Fraction
from msp_plugin.checkpoint.recount import recount_model
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.levels import parse_menu
from msp_plugin.plan.units import Layer, Unit, UnitTable
model = torch.nn.Sequential(torch.nn.Linear(8, 4))
with torch.no_grad():
    model[0].weight[:, ::2] = 0
table = UnitTable((Unit("0", 0, (Layer("0", 4, 8),)),))
print(recount_model(model, Allocation(table, parse_menu(["2:4"]), Fraction(1, 2))).sparsity)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.stdout.strip(), found.returncode) == ("0.5", 0), found.stderr
