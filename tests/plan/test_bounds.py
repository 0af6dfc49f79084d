from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.errors import RecipeError
from msp_plugin.plan.bounds import Bounds, parse_bounds
from msp_plugin.plan.menus import parse_menu
from msp_plugin.plan.units import Layer, group_layers

MENU = parse_menu(["dense", "6:8", "4:8", "2:8"])
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def table(granularity="unit"):
    layers = [(b, Layer(f"layers.{b}.{leaf}", 8, 16)) for b in (0, 1) for leaf in LEAVES]
    return group_layers(layers, granularity)


def matches(units, bounds):
    """Patterns here are leaves: which layers each matches."""
    return {p: {a.name for a in units.layers if a.name.rpartition(".")[2] == p} for p in bounds.patterns}


def test_a_recipe_without_bounds_has_none():
    assert not parse_bounds({}, [], MENU) and Bounds() == parse_bounds({}, [], MENU)


@given(
    st.dictionaries(
        st.sampled_from(LEAVES), st.tuples(st.sampled_from([0, 0.25, 0.5]), st.sampled_from([0.5, 0.75, 1])),
        max_size=4,
    ),
    st.sampled_from(["unit", "layer", "block"]),
)  # fmt: skip
def test_a_unit_takes_the_intersection_over_its_layers(shares, granularity):
    units = table(granularity)
    bounds = parse_bounds(shares, [], MENU)
    allowed = bounds.allowed(units, MENU, matches(units, bounds))
    for row, unit in zip(allowed, units, strict=True):
        leaves = {layer.name.rpartition(".")[2] for layer in unit.layers}
        for admitted, level in zip(row, MENU, strict=True):
            inside = [
                low <= float(level.sparsity) <= high for p, (low, high) in shares.items() if p in leaves
            ]
            assert admitted == all(inside)


@pytest.mark.parametrize("granularity, dense", [("unit", 3), ("layer", 1), ("block", 7)])
def test_what_shares_a_unit_with_a_protected_layer_is_dense(granularity, dense):
    units = table(granularity)
    bounds = parse_bounds({}, ["k_proj"], MENU)
    allowed = bounds.allowed(units, MENU, matches(units, bounds))
    only_dense = [u for u, row in zip(units, allowed, strict=True) if row.tolist() == [True] + 3 * [False]]
    assert [len(u.layers) for u in only_dense] == [dense] * 2
    assert all(row.all() for u, row in zip(units, allowed, strict=True) if u not in only_dense)


def test_dense_is_added_to_the_menu_for_the_protected_alone():
    menu, units = parse_menu(["4:8", "2:8"]), table()
    bounds = parse_bounds({}, ["o_proj"], menu)
    full = bounds.menu(menu)
    assert [level.name for level in full] == ["dense", "4:8", "2:8"]
    allowed = bounds.allowed(units, full, matches(units, bounds))
    for row, unit in zip(allowed, units, strict=True):
        assert row.tolist() == ([True, False, False] if "o_proj" in unit.name else [False, True, True])
    assert bounds.menu(MENU) == MENU and parse_bounds({}, [], menu).menu(menu) == menu


@pytest.mark.parametrize("shares, protect, found", [
    ({"q_proj": [0.5, 0.75], "k_proj": [0, 0.25]}, [], ["'q_proj': [1/2, 3/4]", "'k_proj': [0, 1/4]"]),
    ({"q_proj": [0.5, 0.75]}, ["v_proj"], ["'q_proj': [1/2, 3/4]", "protect 'v_proj'"]),
])  # fmt: skip
def test_bounds_that_contradict_each_other_are_named_with_their_unit(shares, protect, found):
    units, bounds = table(), parse_bounds(shares, protect, MENU)
    with pytest.raises(RecipeError, match=r"the bounds of layers.0.qkv_proj contradict") as error:
        bounds.allowed(units, MENU, matches(units, bounds))
    assert all(text in error.value.message for text in found) and "granularity: layer" in error.value.hint
    if not protect:
        assert bounds.allowed(table("layer"), MENU, matches(units, bounds)).any(axis=1).all()


def test_bounds_without_a_level_inside_name_unit_bounds_and_menu():
    units, bounds = table(), parse_bounds({"down_proj": [0.55, "7/10"]}, [], MENU)
    with pytest.raises(RecipeError) as error:
        bounds.allowed(units, MENU, matches(units, bounds))
    assert (
        error.value.message
        == "no level of dense, 6:8, 4:8, 2:8 is within the bounds of layers.0.down_proj: 'down_proj': [11/20, 7/10]"
    )
    assert "from 11/20 to 7/10" in error.value.hint


@pytest.mark.parametrize("value", [
    0.5, [0.5], [0.1, 0.2, 0.3], "0.1,0.2", None, ["low", "high"], [False, True], {"low": 0}, [0.5, None],
])  # fmt: skip
def test_what_are_no_bounds_is_shown_with_the_form(value):
    with pytest.raises(RecipeError, match="bounds of 'up_proj' are") as error:
        parse_bounds({"up_proj": value}, [], MENU)
    assert "[0.25, 0.5]" in error.value.hint


@pytest.mark.parametrize("value", [[0.5, 0.25], [-0.1, 0.5], [0.5, 1.5], [25, 50]])
def test_bounds_outside_zero_to_one_or_in_the_wrong_order_are_refused(value):
    with pytest.raises(RecipeError, match=f"bounds of 'up_proj' are .{value[0]}") as error:
        parse_bounds({"up_proj": value}, [], MENU)
    assert "0 <= least <= most <= 1" in error.value.hint


def test_bounds_are_read_exactly_and_written_as_fractions():
    bounds = parse_bounds({"*up_proj": [0.1, "2/3"]}, ["k_proj", "k_proj"], MENU)
    assert bounds.shares == {"*up_proj": (Fraction(1, 10), Fraction(2, 3))}
    assert bounds.to_dict() == {"bounds": {"*up_proj": ["1/10", "2/3"]}, "protect": ["k_proj"]}


def test_the_table_is_of_booleans():
    units, bounds = table(), parse_bounds({"q_proj": [0, 1]}, [], MENU)
    allowed = bounds.allowed(units, MENU, matches(units, bounds))
    assert allowed.dtype == np.bool_ and allowed.shape == (8, 4)
