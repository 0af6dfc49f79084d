"""Widths as levels: what a unit keeps, which units they fit, and how files say it."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from msp_plugin.errors import BudgetError, RecipeError
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.bounds import parse_bounds
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.levels import DENSE, Level, Pattern
from msp_plugin.plan.menus import has_widths, menu_names, parse_menu
from msp_plugin.plan.units import Groups, Layer, Unit, UnitTable


def attention(name="attention", kv_heads=4, shared=2, size=8, hidden=32):
    """An attention whose KV heads each serve ``shared`` query heads."""
    rows = {"q_proj": kv_heads * shared * size, "k_proj": kv_heads * size, "v_proj": kv_heads * size}
    inner = [Layer(f"{name}.{leaf}", out, hidden, Groups(kv_heads), True) for leaf, out in rows.items()]
    last = Layer(f"{name}.o_proj", hidden, rows["q_proj"], Groups(kv_heads))
    return Unit(name, 0, (*inner, last))


def mlp(name="mlp", channels=48, quantum=8, hidden=32):
    inner = [
        Layer(f"{name}.{leaf}", channels, hidden, Groups(channels, quantum), True)
        for leaf in ("gate_proj", "up_proj")
    ]
    return Unit(name, 0, (*inner, Layer(f"{name}.down_proj", hidden, channels, Groups(channels, quantum))))


@pytest.mark.parametrize(
    "text, name",
    [
        ("3/4 wide", "3/4 wide"),
        ("0.75 wide", "3/4 wide"),
        (" 6/8  WIDE ", "3/4 wide"),
        ("1/2 wide 2:4", "1/2 wide 2:4"),
        ("0.5 wide 3:8 in 2:4", "1/2 wide 3:8 in 2:4"),
        ("1/2 wide 0.7", "1/2 wide 7/10"),
        ("1/2 wide dense", "1/2 wide"),
    ],
)
def test_a_width_has_one_name_from_which_it_is_read_again(text, name):
    level = Level.parse(text)
    assert level.name == str(level) == name and Level.parse(name) == level and not level.is_dense
    assert level.narrows and not level.servable


@pytest.mark.parametrize(
    "text, words",
    [
        ("1 wide", "keeps '1' of the heads or channels"),
        ("0 wide", "keeps '0' of the heads or channels"),
        ("9/8 wide", "keeps '9/8'"),
        ("x wide", "keeps 'x'"),
        ("-1/2 wide", "keeps '-1/2'"),
        ("1/0 wide", "keeps '1/0'"),
        ("1/2 wide 3/4 wide", "is not a level"),
        ("1/2 wide dropped", "is not a level"),
        ("1/2 wider", "is not a level"),
        ("wide", "is not a level"),
    ],
)
def test_texts_that_are_no_width_are_refused(text, words):
    with pytest.raises(RecipeError, match=words):
        Level.parse(text)


def counted(level, unit):
    """Count what stays of a unit by filling matrices with ones, and zeroing heads, channels and patterns of them."""
    kept = 0
    for layer in unit.layers:
        ones = np.ones((layer.out_features, layer.in_features), dtype=int)
        ones = ones.T if not layer.inner else ones
        size = len(ones) // layer.groups.count
        ones = ones[: level.groups(unit) * size]
        ones = ones.T if not layer.inner else ones
        if not level.inside.is_dense:
            n, m = level.inside.n, level.inside.m
            ones = ones.copy()
            for row in ones:
                for start in range(0, len(row), m):
                    row[start + n : start + m] = 0
        kept += int(ones.sum())
    return kept


@pytest.mark.parametrize("text", ["1/2 wide", "3/4 wide", "1/4 wide 2:4", "1/2 wide 1:8"])
def test_a_width_keeps_as_many_weights_as_are_counted(text):
    level = Level.parse(text)
    for unit in (attention(), attention(kv_heads=8, shared=1), mlp(), mlp(channels=64, quantum=16)):
        assert level.misfit(unit) is None and level.kept(unit) == counted(level, unit)
        assert level.kept(unit) == sum(level.kept(layer) for layer in unit.layers)


@pytest.mark.parametrize(
    "share, groups, quantum, kept",
    [
        ("3/4", 48, 8, 32),  # 4.5 steps: the smaller one
        ("7/8", 48, 8, 40),  # 5.25
        ("5/8", 48, 8, 32),  # 3.75
        ("3/4", 3, 1, 2),  # 2.25
        ("1/2", 3, 1, 1),  # 1.5
        ("7/8", 2, 1, 2),  # 1.75: all
        ("1/8", 3, 1, 0),  # 0.375: none
    ],
)
def test_a_unit_keeps_the_nearest_multiple_of_its_quantum(share, groups, quantum, kept):
    level, layer = Level.parse(f"{share} wide"), Layer("layer", groups, 4, Groups(groups, quantum), True)
    assert level.groups(layer) == kept
    fits = 0 < kept < groups
    assert (level.misfit(layer) is None) == (level.width(layer) is not None) == fits
    if not fits:
        with pytest.raises(RecipeError, match=f"keeps {'all' if kept else 'none'} of the {groups} heads"):
            level.kept(layer)


def test_a_width_does_not_fit_what_has_no_groups_or_what_its_pattern_does_not_divide():
    assert "not known to be" in Level.parse("1/2 wide").misfit(Unit("x", 0, (Layer("x", 8, 8),)))
    narrow = mlp(channels=12, quantum=2)
    assert Level.parse("1/2 wide").misfit(narrow) is None
    assert Level.parse("1/2 wide 2:4").misfit(narrow) == "does not divide in_features = 6 of mlp.down_proj"


def test_menus_by_name_and_their_order():
    assert menu_names(parse_menu("depth")) == ["dense", "dropped"]
    assert menu_names(parse_menu("width"))[:3] == ["dense", "7/8 wide", "3/4 wide"]
    assert menu_names(parse_menu("mixed,1/2 wide 2:4"))[-4:] == [
        "1/2 wide 2:4",
        "1/4 wide",
        "1/8 wide",
        "dropped",
    ]
    assert menu_names(parse_menu("1/2 wide,2:4,dense")) == ["dense", "2:4", "1/2 wide"]
    assert has_widths(parse_menu("mixed")) and not has_widths(parse_menu("depth,2:4"))


def test_levels_that_do_not_fit_a_unit_or_make_the_same_of_it_are_not_allowed_to_it():
    table = UnitTable((attention(kv_heads=2, shared=1), mlp()))
    problem = AllocationProblem(table, parse_menu("width"), Fraction(1, 4))
    allowed = [
        [level.name for level, may in zip(problem.menu, row, strict=True) if may] for row in problem.allowed
    ]
    assert allowed[0] == ["dense", "3/4 wide"]  # 1 of 2 heads; 5/8 to 3/8 keep as many, others all or none
    assert allowed[1] == ["dense", "7/8 wide", "3/4 wide", "1/2 wide", "3/8 wide", "1/4 wide"]
    assert problem.neighbours(0, 0, 3) == (problem.menu.index(Level.parse("3/4 wide")),)
    choice = problem.uniform()
    assert (
        problem.allowed[np.arange(2), list(choice)].all()
        and problem.total_kept(choice) == problem.budget.kept
    )


def test_the_budget_is_met_exactly_by_every_sum_of_heads_and_channels():
    table = UnitTable((attention("a"), mlp("b"), attention("c"), mlp("d")))
    head, step = 32 * 8 * 6, 3 * 32 * 8  # weights of a KV head with two query heads, and of eight channels
    for heads in range(1, 5):
        for steps in range(1, 8):
            zeros = Fraction(heads * head + steps * step, table.weights)
            problem = AllocationProblem(table, parse_menu("mixed"), zeros)
            assert problem.budget.exact


def test_a_menu_without_a_level_for_some_unit_is_refused_by_name():
    table = UnitTable((attention(kv_heads=1, shared=2), mlp()))
    with pytest.raises(BudgetError, match="is allowed for attention"):
        AllocationProblem(table, parse_menu("1/2 wide,1/4 wide"), Fraction(1, 2))


def test_bounds_hold_a_units_own_share():
    unit, menu = mlp(), parse_menu("width")  # 3/4 wide keeps 4 of 6 steps: a third is zero
    bounds = parse_bounds({"down_proj": [0, "0.3"]}, [], menu)
    allowed = bounds.allowed(UnitTable((unit,)), menu, {"down_proj": {"mlp.down_proj"}})
    assert [level.name for level, may in zip(menu, allowed[0], strict=True) if may] == ["dense", "7/8 wide"]


def allocation():
    table = UnitTable((attention(), mlp()))
    return Allocation(table, (Level.parse("3/4 wide"), Level.parse("1/2 wide 2:4")), Fraction(1, 2))


def test_an_allocation_with_widths_is_read_as_it_was_written():
    written = allocation()
    read = Allocation.from_dict(written.to_dict())
    assert read.levels == written.levels and read.budget == written.budget
    assert [layer.groups for layer in read.table.layers] == [layer.groups for layer in written.table.layers]
    stored = replace(written, stored={"mlp.down_proj": "other.down_proj"}).as_stored()
    assert stored.by_layer["other.down_proj"].kept(stored.table[1].layers[-1]) == 32 * 24 // 2


def test_groups_are_in_the_file_only_where_the_menu_has_widths():
    plain = Allocation(
        UnitTable((Unit("mlp", 0, (Layer("mlp.down_proj", 8, 8),)),)), (Pattern(2, 4),), Fraction(1, 2)
    )
    assert "groups" not in plain.to_json() and allocation().to_json().count('"groups"') == 2


@pytest.mark.parametrize(
    "groups, words",
    [
        ({"count": 5, "quantum": 1, "columns": ["mlp.down_proj"]}, "does not split into 5 groups"),
        ({"count": 48, "quantum": 7, "columns": ["mlp.down_proj"]}, "in steps of 7"),
        ({"count": 0, "quantum": 1, "columns": []}, "does not split into 0 groups"),
        ({"count": "48", "quantum": 1, "columns": []}, "count is '48', expected int"),
        ({"quantum": 1, "columns": []}, "KeyError: 'count'"),
        ([], "groups is"),
    ],
)
def test_damaged_groups_are_refused(groups, words):
    data = allocation().to_dict()
    data["units"][1]["groups"] = groups
    with pytest.raises(RecipeError, match=f"is damaged.*{words}"):
        Allocation.from_dict(data)


def test_a_width_of_a_unit_whose_groups_are_gone_from_the_file_is_refused():
    data = allocation().to_dict()
    del data["units"][1]["groups"]
    with pytest.raises(RecipeError, match="unit 'mlp': level 1/2 wide 2:4 is for the attention or the MLP"):
        Allocation.from_dict(data)


def test_dense_is_no_width():
    assert not DENSE.narrows and DENSE.width(mlp()) is None


def test_the_order_of_a_menu_is_that_of_its_levels_however_it_is_written():
    levels = ["3/4 wide 1/3", "1/2 wide", "dense"]
    assert parse_menu(levels) == parse_menu(levels[::-1])


def test_an_error_inside_a_width_shows_the_whole_text():
    with pytest.raises(RecipeError, match=r"level '3/4 wide 2;4'"):
        Level.parse("3/4 wide 2;4")


def test_a_unit_that_no_width_fits_is_named_with_the_reason():
    table = UnitTable((attention(kv_heads=3), mlp()))
    with pytest.raises(BudgetError, match=r"for attention; 7/8 wide keeps all of the 3 heads") as error:
        AllocationProblem(table, parse_menu(["7/8 wide", "1/8 wide"]), Fraction(1, 2))
    assert "dense" in error.value.hint


def test_a_target_between_what_whole_heads_can_keep_is_refused_with_the_reachable_range():
    table = UnitTable((attention(kv_heads=3),))
    with pytest.raises(BudgetError, match="reach"):
        print(AllocationProblem(table, parse_menu(["1/2 wide"]), Fraction(1, 2)).budget)
