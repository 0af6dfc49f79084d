"""allocation.json, run.json and compare.json: whatever they hold, they are read or refused by name."""

import json

import pytest
from hypothesis import given, settings

from msp_plugin.errors import RecipeError
from msp_plugin.plan.allocation import Allocation
from tests.fuzz.mutations import documents, json_files
from tests.fuzz.readers import (
    READERS,
    allocation_document,
    check,
    comparison_document,
    fill,
    run_document,
)

VALID = {"allocation": allocation_document(), "run": run_document(), "comparison": comparison_document()}


@pytest.mark.parametrize("name", VALID)
def test_the_valid_file_is_read(name, tmp_path):
    assert check(READERS[name], fill(tmp_path), json.dumps(VALID[name]).encode()) is None


@given(json_files(VALID["allocation"]))
def test_any_allocation_is_read_or_refused(directory, content):
    check(READERS["allocation"], directory, content)


@given(json_files(VALID["run"]))
def test_any_run_is_read_or_refused(directory, content):
    check(READERS["run"], fill(directory / "run"), content)


@given(json_files(VALID["comparison"]))
def test_any_comparison_is_read_or_refused(directory, content):
    check(READERS["comparison"], fill(directory / "comparison"), content)


@pytest.mark.parametrize("name", ["run", "comparison"])
def test_any_record_that_is_read_can_be_drawn(name, directory, monkeypatch):
    pytest.importorskip("jinja2", reason="no report is drawn: the extra `report` is not installed")
    pytest.importorskip("matplotlib", reason="no report is drawn: the extra `report` is not installed")

    @given(documents(VALID[name]))
    @settings(max_examples=12)
    def draw(document):
        page = fill(directory / "drawn")
        for other in ("run.json", "compare.json"):
            (page / other).unlink(missing_ok=True)
        try:
            content = json.dumps(document).encode()
        except (ValueError, RecursionError):
            return
        check(READERS[f"{name}'s page"], page, content)

    draw()


BAD = [
    (b'{"schema": "a", "schema": "b"}', "twice"),
    (b'{"a": ' + b"[" * 80 + b"]" * 80 + b"}", "nested deeper"),
    (b"\xef\xbb\xbf{}", "BOM"),
    (b"[" * 100_000, "nested deeper"),
]


@pytest.mark.parametrize(("content", "words"), BAD)
@pytest.mark.parametrize("name", ["allocation", "run", "comparison"])
def test_json_that_python_would_take_is_refused(name, content, words, tmp_path):
    error = check(READERS[name], fill(tmp_path), content)
    assert words in str(error)


def changed(way, value):
    data = allocation_document()
    at = data
    for key in way[:-1]:
        at = at[key]
    at[way[-1]] = value
    return data


@pytest.mark.parametrize(
    ("way", "value", "words"),
    [
        (["units", 0, "layers", 0, "shape"], [16.5, 32], "expected int"),
        (["units", 0, "layers", 0, "shape"], [True, 32], "expected int"),
        (["units", 0, "layers", 0, "shape"], [0, 32], "has the shape"),
        (["units", 0, "layers", 0, "name"], None, "name is None"),
        (["units", 0, "block"], "0", "block is '0'"),
        (["units", 0, "block"], -1, "block = -1"),
        (["units", 0, "sensitivity", "fisher"], True, "sensitivity is True"),
        (["units", 0, "level"], "3:5", "does not divide"),
        (["budget", "kept"], 2848.0, "kept is 2848.0"),
    ],
)
def test_an_allocation_that_says_nonsense_is_refused_by_name(way, value, words):
    with pytest.raises(RecipeError, match="x.json") as error:
        Allocation.from_dict(changed(way, value), "x.json")
    assert words in error.value.message
