import copy
import json
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.errors import MSPError, RecipeError, VerificationError
from msp_plugin.plan.allocation import SCHEMA, VERSION, Allocation, make_allocation
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.menus import parse_menu
from msp_plugin.plan.units import Layer, Unit, UnitTable, group_layers

TABLE = UnitTable(
    (
        Unit("l.0.qkv_proj", 0, (Layer("l.0.q_proj", 8, 16), Layer("l.0.k_proj", 4, 16))),
        Unit("l.0.o_proj", 0, (Layer("l.0.o_proj", 16, 8),)),
        Unit("l.1.down_proj", 1, (Layer("l.1.down_proj", 16, 16),)),
    )
)
PROBLEM = AllocationProblem(TABLE, parse_menu(["dense", "6:8", "4:8", "2:8"]), Fraction(1, 2))


def allocation():
    return make_allocation(
        PROBLEM,
        PROBLEM.uniform(),
        {"fisher": (0.1, 2.5e-300, 3.0)},
        {"model": {"fingerprint": "ü"}, "seed": 0},
    )


def document():
    return json.loads(allocation().to_json())


def test_the_file_says_what_was_chosen_and_counted():
    data = document()
    assert (data["schema"], data["version"]) == (SCHEMA, VERSION)
    assert data["budget"] == {"target": "1/2", "weights": 576, "kept": 288, "zeros": 288, "sparsity": 0.5}
    assert data["units"][0] == {
        "name": "l.0.qkv_proj", "block": 0, "level": "4:8", "weights": 192, "zeros": 96,
        "sensitivity": {"fisher": 0.1},
        "layers": [{"name": "l.0.q_proj", "shape": [8, 16]}, {"name": "l.0.k_proj", "shape": [4, 16]}],
    }  # fmt: skip
    assert [unit["name"] for unit in data["units"]] == list(TABLE.names)
    assert data["provenance"] == {"model": {"fingerprint": "ü"}, "seed": 0}


def test_reading_gives_what_was_written(tmp_path):
    path = tmp_path / "allocation.json"
    path.write_text(allocation().to_json(), encoding="utf-8")
    found = Allocation.read(path)
    assert found == allocation()
    assert found.to_json() == path.read_text(encoding="utf-8")


def test_equal_allocations_give_equal_bytes():
    other = make_allocation(
        PROBLEM,
        PROBLEM.uniform(),
        {"fisher": (0.1, 2.5e-300, 3.0)},
        {"seed": 0, "model": {"fingerprint": "ü"}},
    )
    assert other.to_json().encode() == allocation().to_json().encode()
    assert allocation().to_json().endswith("}\n")


@given(
    st.lists(st.integers(0, 3), min_size=3, max_size=3),
    st.lists(st.floats(allow_nan=False), min_size=3, max_size=3),
)
def test_every_choice_survives_the_file(choice, values):
    levels = tuple(PROBLEM.menu[k] for k in choice)
    before = Allocation(TABLE, levels, Fraction(1, 3), {"a": tuple(values), "b": (1.0, 2.0, 3.0)})
    after = Allocation.from_dict(json.loads(before.to_json()))
    assert after == before and after.to_json() == before.to_json()


def test_a_level_counts_for_every_layer_of_its_unit():
    levels = parse_menu(["dense", "4:8", "2:8"])
    found = Allocation(TABLE, levels, Fraction(1, 2))
    assert {name: level.name for name, level in found.by_layer.items()} == {
        "l.0.q_proj": "dense", "l.0.k_proj": "dense", "l.0.o_proj": "4:8", "l.1.down_proj": "2:8",
    }  # fmt: skip
    assert found.budget.kept == 192 + 64 + 64 and not found.budget.exact


def test_a_choice_off_the_budget_is_the_allocators_bug():
    with pytest.raises(VerificationError) as error:
        make_allocation(PROBLEM, (0, 0, 0))
    assert "576" in error.value.message and "288" in error.value.message
    assert "bug of the allocator" in error.value.hint


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="no allocation file") as error:
        Allocation.read(tmp_path / "none.json")
    assert "none.json" in error.value.message


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[" * 200_000, b'{"schema": ' + b"1" * 5000 + b"}"],
    ids=["empty", "cut off", "not UTF-8", "too deep", "too long a number"],
)  # fmt: skip
def test_a_file_that_is_no_json_is_named(tmp_path, content):
    path = tmp_path / "allocation.json"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match="cannot read") as error:
        Allocation.read(path)
    assert "allocation.json" in error.value.message


def test_a_directory_is_no_allocation_file(tmp_path):
    with pytest.raises(RecipeError, match="cannot read"):
        Allocation.read(tmp_path)


@pytest.mark.parametrize("data", [None, [], 5, {}, {"schema": "other"}, {"schema": ["x"]}])
def test_other_json_is_not_an_allocation(data):
    with pytest.raises(RecipeError, match="x.json is not an allocation file") as error:
        Allocation.from_dict(data, "x.json")
    assert SCHEMA in error.value.hint


@pytest.mark.parametrize("version", [VERSION + 1, "1", None])
def test_another_version_is_named(version):
    with pytest.raises(RecipeError) as error:
        Allocation.from_dict(dict(document(), version=version))
    assert f"version {version!r}" in error.value.message and "update msp_plugin" in error.value.hint


def edit(path, value):
    data = document()
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return data


@pytest.mark.parametrize(
    "path, value",
    [
        (["units"], None), (["units"], 5), (["units"], [5]), (["units", 0, "layers"], None),
        (["units", 0, "layers"], [{}]), (["units", 0, "layers", 0, "shape"], [8]),
        (["units", 0, "layers", 0, "shape"], ["a", "b"]), (["units", 0, "block"], "first"),
        (["units", 0, "sensitivity"], 5), (["units", 0, "sensitivity"], {"fisher": "much"}), (["budget"], {}),
        (["budget", "target"], "1/0"), (["budget", "target"], "half"), (["budget", "target"], float("nan")),
        (["budget", "target"], float("inf")), (["budget", "kept"], float("inf")),
        (["budget", "kept"], "many"),
        (["units", 0, "block"], float("inf")), (["units", 0, "layers", 0, "shape"], [float("inf"), 8]),
    ],
)  # fmt: skip
def test_damaged_contents_are_refused(path, value):
    with pytest.raises(RecipeError, match="x.json is damaged"):
        Allocation.from_dict(edit(path, value), "x.json")


@pytest.mark.parametrize(
    "path, value",
    [
        (["units", 0, "weights"], 191), (["units", 0, "layers"], []), (["units", 1, "name"], "l.0.qkv_proj"),
        (["units", 0, "layers", 0, "shape"], [8, 17]), (["units", 0, "level"], "5:4"),
        (["units", 0, "level"], 124),
        (["units", 0, "level"], "3:5"),
    ],
)  # fmt: skip
def test_units_that_contradict_themselves_are_refused(path, value):
    with pytest.raises(RecipeError):
        Allocation.from_dict(edit(path, value))


def test_an_edited_level_that_misses_the_budget_says_both_counts():
    with pytest.raises(RecipeError) as error:
        Allocation.from_dict(edit(["units", 2, "level"], "2:8"), "x.json")
    assert "keep 224 weights" in error.value.message and "says 288" in error.value.message
    assert "budget.kept" in error.value.hint


def without_units():
    data = document()
    data["units"], data["budget"]["kept"] = [], 0
    return data


def with_sensitivity_of_some():
    data = document()
    del data["units"][2]["sensitivity"]["fisher"]
    return data


def with_a_layer_twice():
    data = document()
    data["units"][1]["layers"] *= 2
    data["units"][1]["weights"] *= 2
    data["budget"]["kept"] += 64
    return data


def with_a_layer_in_two_units():
    data = document()
    data["units"][1]["layers"] = copy.deepcopy(data["units"][2]["layers"])
    data["units"][1]["weights"] = 256
    data["budget"]["kept"] += 64
    return data


@pytest.mark.parametrize(
    "make", [without_units, with_sensitivity_of_some, with_a_layer_twice, with_a_layer_in_two_units,
             lambda: edit(["provenance"], 5), lambda: edit(["units", 0, "layers", 0, "shape"], [-8, -16]),
             lambda: edit(["budget", "target"], "7/2"), lambda: edit(["provenance", "bounds"], [1]),
             lambda: edit(["provenance", "protect"], 5), lambda: edit(["provenance", "protect"], [5]),
             lambda: edit(["provenance", "levels"], 5), lambda: edit(["provenance", "granularity"], [1]),
             lambda: edit(["provenance", "quantum"], "8")],
    ids=["no units", "sensitivity of some units", "a layer twice in its unit", "a layer in two units",
         "provenance is no mapping", "negative shape", "target above one",
         "bounds are a list", "protect is a number", "protect holds a number", "levels are a number",
         "granularity is a list", "quantum is a text"],
)  # fmt: skip
def test_contents_that_contradict_each_other_are_refused(make):
    with pytest.raises(RecipeError):
        Allocation.from_dict(make())


ODD = ["2:4", "dense", "1/3", float("inf"), -1, 0, 10**40]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def paths(value, at=()):
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*at, key))


@given(st.sampled_from(sorted(paths(document()), key=str)), JSON)
def test_whatever_one_value_is_replaced_by_reading_gives_an_allocation_or_our_error(path, value):
    data = edit(path, value)
    try:
        found = Allocation.from_dict(data)
    except MSPError:
        return
    assert isinstance(found, Allocation)


@given(JSON)
def test_whatever_json_is_read_only_our_error_comes_out(value):
    for data in (value, {"schema": SCHEMA, "version": VERSION, "units": value, "budget": value}):
        with pytest.raises(MSPError):
            Allocation.from_dict(data)


def test_an_allocation_fits_the_model_it_was_made_for_with_all_or_some_of_its_layers():
    allocation().check_matches(TABLE)
    allocation().check_matches(
        UnitTable((Unit("l.2.down_proj", 2, (Layer("l.2.down_proj", 16, 16),)), *reversed(TABLE.units)))
    )


@pytest.mark.parametrize(
    "units",
    [
        TABLE.units[:2],
        (*TABLE.units[:2], Unit("l.1.down_proj", 1, (Layer("l.1.down_proj", 16, 32),))),
        (*TABLE.units[:2], Unit("l.2.down_proj", 2, (Layer("l.2.down_proj", 16, 16),))),
    ],
    ids=["fewer layers", "another shape", "another name"],
)
def test_another_models_table_is_refused_with_the_layers_that_differ(units):
    with pytest.raises(VerificationError, match="for another model: 1 of its 4 layers") as error:
        allocation().check_matches(UnitTable(units))
    assert "l.1.down_proj [16, 16]" in error.value.message and "allocate anew" in error.value.hint


@pytest.mark.parametrize("granularity, count", [("unit", 2), ("layer", 3), ("block", 1)])
def test_an_allocation_of_every_granularity_is_read_as_it_was_written(tmp_path, granularity, count):
    leaves = [("q_proj", 8), ("k_proj", 4), ("o_proj", 8)]
    layers = [(0, Layer(f"l.0.{leaf}", out, 16)) for leaf, out in leaves]
    table = group_layers(layers, granularity)
    problem = AllocationProblem(table, PROBLEM.menu, Fraction(1, 2))
    found = make_allocation(problem, problem.uniform(), provenance={"granularity": granularity})
    path = tmp_path / "allocation.json"
    path.write_text(found.to_json())
    assert Allocation.read(path) == found and len(found.table) == count
    assert set(found.by_layer) == {layer.name for _, layer in layers}
    found.check_matches(group_layers(layers))


def test_a_choice_that_the_bounds_forbid_is_the_allocators_bug():
    allowed = [[True, True, True, True], [True, False, True, True], [True, True, True, True]]
    problem = AllocationProblem(TABLE, PROBLEM.menu, Fraction(1, 2), allowed)
    assert make_allocation(problem, (2, 2, 2))
    with pytest.raises(VerificationError, match="took 6:8 for l.0.o_proj") as error:
        make_allocation(AllocationProblem(TABLE, PROBLEM.menu, Fraction(1, 4), allowed), (1, 1, 1))
    assert "bug of the allocator" in error.value.hint


STORED = {"l.0.q_proj": "text.l.0.q_proj", "l.1.down_proj": "text.l.1.w2"}


def test_names_in_files_are_written_where_they_differ_and_read_again():
    assert "stored" not in document()
    given = replace(allocation(), stored=STORED)
    again = Allocation.from_dict(json.loads(given.to_json()))
    assert again == given and again.stored == STORED
    found = again.as_stored()
    assert list(found.by_layer) == ["text.l.0.q_proj", "l.0.k_proj", "l.0.o_proj", "text.l.1.w2"]
    assert list(found.table.names) == ["l.0.qkv_proj", "l.0.o_proj", "text.l.1.w2"]
    assert (found.levels, found.budget, found.stored) == (given.levels, given.budget, {})


@pytest.mark.parametrize("stored, message", [
    (["l.0.q_proj"], "stored is no mapping"), ({"l.0.q_proj": 1}, "stored is no mapping"),
    ({"nobody": "x"}, "names other layers"), ({"l.0.q_proj": "l.0.k_proj"}, "two layers have one place"),
])  # fmt: skip
def test_names_in_files_that_cannot_be_are_refused(stored, message):
    with pytest.raises(RecipeError, match=message):
        Allocation.from_dict({**document(), "stored": stored})
