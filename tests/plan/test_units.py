import pytest

from msp_plugin.plan.units import FUSED, GRANULARITIES, Layer, Unit, UnitTable, group_layers, shared_inputs

BLOCK = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def block(index, leaves=BLOCK):
    return [(index, Layer(f"model.layers.{index}.{leaf}", 8, 16)) for leaf in leaves]


def test_what_inference_fuses_is_one_unit():
    table = group_layers(block(0) + block(1))
    assert table.names == tuple(
        f"model.layers.{i}.{leaf}"
        for i in (0, 1)
        for leaf in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    )
    assert [len(unit.layers) for unit in table] == [3, 1, 2, 1] * 2
    assert [unit.block for unit in table] == [0] * 4 + [1] * 4


def test_no_layer_is_lost_or_reordered_within_its_unit():
    layers = block(0) + block(1)
    table = group_layers(layers)
    assert sorted(a.name for a in table.layers) == sorted(a.name for _, a in layers)
    assert [a.name.rpartition(".")[2] for a in table[0].layers] == ["q_proj", "k_proj", "v_proj"]


def test_the_members_that_are_left_still_share_a_unit():
    table = group_layers(block(0, ("q_proj", "v_proj", "o_proj")))
    assert table.names == ("model.layers.0.qkv_proj", "model.layers.0.o_proj")


@pytest.mark.parametrize("leaf", [leaf for parts in FUSED for leaf in parts])
def test_a_single_member_keeps_its_own_name(leaf):
    assert group_layers(block(3, (leaf,))).names == (f"model.layers.3.{leaf}",)


def test_siblings_of_different_parents_are_not_fused():
    layers = [
        (0, Layer(f"layers.0.experts.{e}.{leaf}", 4, 8)) for e in (0, 1) for leaf in ("gate_proj", "up_proj")
    ]
    table = group_layers(layers)
    assert table.names == ("layers.0.experts.0.gate_up_proj", "layers.0.experts.1.gate_up_proj")


def test_a_layer_without_a_parent_is_a_unit():
    assert group_layers([(0, Layer("q_proj", 2, 4)), (0, Layer("k_proj", 2, 4))]).names == ("qkv_proj",)


def test_weights_are_counted_over_all_layers():
    unit = Unit("qkv", 0, (Layer("q", 8, 16), Layer("k", 4, 16)))
    table = UnitTable((unit, Unit("o", 0, (Layer("o", 16, 8),))))
    assert [u.weights for u in table] == [192, 128] and table.weights == 320 and len(table) == 2
    assert [a.name for a in table.layers] == ["q", "k", "o"]


def test_each_layer_may_be_a_unit():
    layers = block(0) + block(1)
    table = group_layers(layers, "layer")
    assert table.names == tuple(layer.name for _, layer in layers)
    assert [unit.block for unit in table] == [0] * 7 + [1] * 7


def test_a_block_may_be_a_unit():
    table = group_layers(block(0) + block(1) + block(10), "block")
    assert table.names == ("model.layers.0", "model.layers.1", "model.layers.10")
    assert [len(unit.layers) for unit in table] == [7] * 3 and [unit.block for unit in table] == [0, 1, 10]


def test_a_block_of_one_layer_has_the_layers_name():
    assert group_layers(block(4, ("o_proj",)), "block").names == ("model.layers.4.o_proj",)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_layers_with_one_input_are_found_at_every_granularity(granularity):
    layers = block(0) + block(1)
    assert shared_inputs(group_layers(layers, granularity)) == group_layers(layers).units
