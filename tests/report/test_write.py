"""What is refused: records that cannot be read, files that are no reports, packages that are missing."""

import json
import sys

import pytest

from msp_plugin.errors import OutputError, PluginError, RecipeError
from msp_plugin.plugins.manager import Plugins
from msp_plugin.report import write_report


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_names_the_extra(package, records, report, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PluginError, match=rf"needs {package}.*\n.*pip install 'msp_plugin\[report\]'"):
        report(records())


def test_records_that_cannot_be_read_say_what_was_expected(records, report, tmp_path, edit_json):
    cases = {
        "there is no .*/nowhere": tmp_path / "nowhere",
        "holds neither run.json nor compare.json": tmp_path,
    }
    for text, path in cases.items():
        with pytest.raises(RecipeError, match=text):
            report(path)
    changes = {
        "no record of a run": lambda d: {**d, "schema": "other"},
        "version 3, this package reads 1 and 2": lambda d: {**d, "version": 3},
        r"damaged: search\.curve\.0": lambda d: {**d, "search": {"curve": [["x", 1]]}},
        "is not a JSON object": lambda d: [d],
    }
    for i, (text, change) in enumerate(changes.items()):
        path = records(f"changed{i}")
        edit_json(path / "run.json", change)
        with pytest.raises(RecipeError, match=text):
            report(path)
    path = records("broken")
    (path / "run.json").write_text("{")
    with pytest.raises(RecipeError, match="as JSON"):
        report(path)
    path = records("lone")
    (path / "allocation.json").unlink()
    with pytest.raises(RecipeError, match="has no allocation.json"):
        report(path)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"schema": "x"}))
    with pytest.raises(RecipeError, match=r'schema is .x.\n.*"msp_plugin/compare"'):
        report(other)


def test_reports_are_written_over_and_nothing_else_is(msp, records, tmp_path):
    path = records()
    for _ in range(2):
        assert msp("report", path).out == f"Written: {path / 'report.html'}\n"
    (path / "notes.txt").write_text("mine")
    assert "exists and is not a report" in msp("report", path, "--out", path / "notes.txt", code=2).err
    assert "is a directory" in msp("report", path, "--out", path, code=2).err
    assert "there is no" in msp("report", tmp_path / "nowhere", code=2).err
    assert (path / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in path.iterdir()) == [
        "allocation.json", "notes.txt", "report.html", "run.json",
    ]  # fmt: skip
    with pytest.raises(OutputError, match="cannot write"):
        write_report(path, path / "notes.txt" / "x.html", plugins=Plugins(entry_points=False))


def test_the_command_shows_an_example_in_its_help(msp):
    assert "report" in msp("--help").out and "Example: msp report" in msp("report", "--help").out
