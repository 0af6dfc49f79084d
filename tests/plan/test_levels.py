import itertools
from fractions import Fraction

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.errors import RecipeError
from msp_plugin.plan.fractions import parse_sparsity
from msp_plugin.plan.levels import DENSE, Kind, Level, Pattern
from msp_plugin.plan.menus import DEFAULT_LEVELS, MENUS, menu_names, parse_menu
from msp_plugin.plan.units import Layer


@pytest.mark.parametrize("text", ["2:4", " 2 : 4 ", "2:4\n"])
def test_a_level_keeps_n_of_m(text):
    level = Level.parse(text)
    assert (level.n, level.m, level.name, str(level)) == (2, 4, "2:4", "2:4")
    assert level.sparsity == Fraction(1, 2) and not level.is_dense


@pytest.mark.parametrize("text", ["dense", "Dense", " DENSE ", "1:1", "4:4", "8:8"])
def test_dense_has_one_form(text):
    level = Level.parse(text)
    assert level == DENSE and level.name == "dense" and level.is_dense and level.sparsity == 0


def test_a_level_parses_to_itself():
    assert Level.parse(Pattern(3, 8)) == Pattern(3, 8)


@given(st.integers(1, 40), st.integers(1, 40))
def test_every_name_parses_back(n, m):
    if n <= m:
        level = Level.parse(f"{n}:{m}")
        assert Level.parse(level.name) == level
        assert level.sparsity == Fraction(m - n, m)


@pytest.mark.parametrize("text", ["2:4", "1:8", "7:8", "4:16"])
def test_an_unquoted_level_in_yaml_is_explained(text):
    number = yaml.safe_load(f"level: {text}")["level"]
    assert isinstance(number, int)
    with pytest.raises(RecipeError) as error:
        Level.parse(number)
    assert str(number) in error.value.message and "base 60" in error.value.message
    assert f'"{text}"' in error.value.hint


@pytest.mark.parametrize("text", ["5:4", "0:4", "0:0"])
def test_a_level_that_keeps_more_than_there_is_or_nothing_is_refused(text):
    with pytest.raises(RecipeError) as error:
        Level.parse(text)
    assert repr(text) in error.value.message and "1 <= N <= M" in error.value.hint


@pytest.mark.parametrize(
    "value",
    ["half", "2:4:8", "-2:4", "", 24, None, True, ["2:4"], {"2": 4}, "1", 1.0, -0.5, "-1/2", "3/2", "1/0", "70 %",
     float("nan"), float("inf"), "1e999999999", "2:4 in", "@2:4", "3:8 of 2:4"],
)  # fmt: skip
def test_what_is_no_level_is_named_and_the_form_is_shown(value):
    with pytest.raises(RecipeError) as error:
        Level.parse(value)
    assert repr(value) in error.value.message and '"2:4"' in error.value.hint


@pytest.mark.parametrize("n, m", [(n, m) for m in (1, 2, 3, 4, 5, 6, 8) for n in range(1, m + 1)])
def test_servable_agrees_with_all_masks_of_a_period(n, m):
    period = next(p for p in range(4, 200, 4) if p % m == 0)
    one_group = [[int(i in kept) for i in range(m)] for kept in itertools.combinations(range(m), n)]
    fits = True
    for groups in itertools.product(one_group, repeat=period // m):
        mask = list(itertools.chain(*groups))
        if any(sum(mask[i : i + 4]) > 2 for i in range(0, period, 4)):
            fits = False
            break
    assert Pattern(n, m).servable == fits


@given(st.integers(1, 9), st.integers(1, 16), st.integers(1, 12), st.integers(1, 9))
def test_kept_counts_n_in_every_group(n, m, groups, out):
    if n <= m:
        kept = Pattern(n, m).kept(Layer("x", out, groups * m))
        assert kept == out * groups * n
        assert Fraction(kept, out * groups * m) == 1 - Pattern(n, m).sparsity


def test_a_width_that_m_does_not_divide_is_refused_with_the_remainder():
    with pytest.raises(RecipeError) as error:
        Pattern(2, 8).kept(Layer("x", 4, 20))
    assert "2:8" in error.value.message and "20" in error.value.message
    assert "remainder 4" in error.value.hint


def test_a_menu_is_sorted_from_dense_to_sparse_and_from_free_to_strict():
    menu = parse_menu(["1:8", "dense", "4:8", "2:4", "7:8"])
    assert menu_names(menu) == ["dense", "7:8", "4:8", "2:4", "1:8"]


def test_a_menu_may_be_written_with_commas():
    assert parse_menu("1:8, dense,2:4,") == parse_menu(["dense", "2:4", "1:8"])


def test_the_default_menu_steps_by_one_eighth():
    assert [level.sparsity for level in parse_menu(DEFAULT_LEVELS)] == [Fraction(i, 8) for i in range(8)]


@pytest.mark.parametrize("levels", [[], "", " , "])
def test_an_empty_menu_is_refused(levels):
    with pytest.raises(RecipeError, match="empty") as error:
        parse_menu(levels)
    assert "at least one" in error.value.hint


@pytest.mark.parametrize(
    "levels, name", [(["2:4", "1:4", " 2:4"], "2:4"), (["dense", "4:4"], "dense"), ("1:8,1:8", "1:8")]
)
def test_a_level_named_twice_is_refused_by_name(levels, name):
    with pytest.raises(RecipeError, match=f"twice: {name}") as error:
        parse_menu(levels)
    assert "once" in error.value.hint


@pytest.mark.parametrize(
    "value, exact",
    [
        (0, Fraction(0)), (0.0, Fraction(0)), (0.1, Fraction(1, 10)), (0.75, Fraction(3, 4)),
        ("0.7", Fraction(7, 10)),
        ("5/8", Fraction(5, 8)), (" 0.5 ", Fraction(1, 2)), (Fraction(1, 3), Fraction(1, 3)),
        ("5e-1", Fraction(1, 2)),
    ],
)  # fmt: skip
def test_sparsity_is_read_exactly_as_written(value, exact):
    assert parse_sparsity(value) == exact


@pytest.mark.parametrize(
    "value, share", [(75, "0.75"), (75.0, "0.75"), ("62.5", "0.625"), (100, "1"), (2, "0.02")]
)
def test_a_percentage_is_recognised_and_rewritten(value, share):
    with pytest.raises(RecipeError, match=r"outside \[0, 1\)") as error:
        parse_sparsity(value)
    assert repr(value) in error.value.message and f"for {value} % write {share}" in error.value.hint


@pytest.mark.parametrize("value", [1, 1.0, "1", -0.1, "-1/2", 101, Fraction(3, 2) * 100])
def test_a_sparsity_outside_zero_to_one_is_refused(value):
    with pytest.raises(RecipeError, match=r"outside \[0, 1\)") as error:
        parse_sparsity(value)
    assert "share of zeros" in error.value.hint and "% write" not in error.value.hint


@pytest.mark.parametrize("value", ["much", "", None, True, False, float("nan"), float("inf"), "1/0", [0.5]])
def test_a_sparsity_that_is_no_number_is_refused(value):
    with pytest.raises(RecipeError, match="is not a number") as error:
        parse_sparsity(value)
    assert repr(value) in error.value.message and "0.75" in error.value.hint


@pytest.mark.parametrize("text", ["3:8 in 2:4", "3:8@2:4", " 3 : 8 IN 2 : 4 ", "3:8in2:4", "3:8 @ 2:4"])
def test_a_level_inside_2_4_has_one_name(text):
    level = Level.parse(text)
    assert (level.n, level.m, level.kind, level.name) == (3, 8, Kind.NM_IN_24, "3:8 in 2:4")
    assert level.sparsity == Fraction(5, 8) and level.servable and not level.is_dense
    assert Level.parse(level.name) == level != Pattern(3, 8)
    assert level.kept(Layer("x", 5, 16)) == 30 and level.group(16) == (3, 8)


@pytest.mark.parametrize("text, name", [
    ("4:8 in 2:4", "2:4"), ("8:16 in 2:4", "2:4"), ("2:8 in 2:4", "2:8"), ("1:16@2:4", "1:16"),
    ("5:16 in 2:4", "5:16 in 2:4"),
])  # fmt: skip
def test_a_level_that_is_inside_2_4_anyway_has_its_plain_name(text, name):
    assert Level.parse(text).name == name and Level.parse(text) == Level.parse(name)


@pytest.mark.parametrize("text", ["5:8 in 2:4", "3:6 in 2:4", "3:8 in 4:8", "3:8 in 1:4", "8:8 in 2:4"])
def test_what_does_not_fit_inside_2_4_is_refused(text):
    with pytest.raises(RecipeError) as error:
        Level.parse(text)
    assert repr(text) in error.value.message and "multiple of 4 and N <= M/2" in error.value.hint


@pytest.mark.parametrize(
    "text", ["0.7", "7/10", 0.7, ".7", " 0.70 ", "14/20", "7e-1", "7 / 10", Fraction(7, 10)]
)
def test_a_share_of_zeros_has_one_name(text):
    level = Level.parse(text)
    assert (level.name, level.kind, level.sparsity) == ("7/10", Kind.SHARE, Fraction(7, 10))
    assert Level.parse(level.name) == level and not level.servable and not level.is_dense


@pytest.mark.parametrize("text", ["0", 0, 0.0, "0/3", "0.0"])
def test_no_zeros_is_dense(text):
    assert Level.parse(text) == DENSE


@given(st.fractions(0, Fraction(99, 100), max_denominator=200), st.integers(1, 300), st.integers(1, 9))
def test_a_share_keeps_of_every_row_what_is_left_rounded_down(zeros, width, out):
    level, row = Level.parse(str(zeros)), 0
    while Fraction(row + 1, width) <= 1 - zeros:
        row += 1
    if row == 0:
        with pytest.raises(RecipeError, match=f"keeps nothing of in_features = {width}"):
            level.kept(Layer("x", out, width))
        assert level.misfit(Layer("x", out, width)) == f"keeps nothing of in_features = {width} of x"
        return
    layer = Layer("x", out, width)
    assert level.kept(layer) == out * row and level.misfit(layer) is None
    assert Level.parse(level.name) == level
    assert level.group(width) == ((row, width) if zeros else (1, 1))


def test_a_menu_is_sorted_by_sparsity_and_then_from_free_to_strict():
    names = ["1/2", "8:16", "4:8", "2:4", "5/8", "6:16", "3:8", "6:16 in 2:4", "3:8 in 2:4", "0.7"]
    assert menu_names(parse_menu(reversed(names))) == [*names[:-1], "7/10"]


def test_a_menu_may_be_named():
    assert parse_menu("default") == parse_menu(["default"]) == parse_menu(DEFAULT_LEVELS)
    assert menu_names(parse_menu(" Servable ")) == ["dense", "2:4", "3:8 in 2:4", "2:8", "1:8", "1:16"]


def test_a_named_menu_takes_further_levels_and_repeats_none():
    assert menu_names(parse_menu("servable,1:4,2:4,0.9")) == [
        "dense", "2:4", "3:8 in 2:4", "2:8", "1:4", "1:8", "9/10", "1:16"
    ]  # fmt: skip
    assert set(parse_menu("default,servable")) == {*parse_menu("default"), *parse_menu("servable")}


def test_every_level_of_the_servable_menu_but_dense_runs_on_2_4_kernels():
    assert [level.name for level in parse_menu(MENUS["servable"]) if not level.servable] == ["dense"]
