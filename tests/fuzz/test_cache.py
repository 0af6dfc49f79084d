"""What the cache holds, however damaged: it is read as it was written, or measured anew."""

import shutil

import pytest
import torch
from hypothesis import given

from msp_plugin.database.store import LayerErrors, LevelDatabase
from msp_plugin.errors import VerificationError
from msp_plugin.plan.menus import parse_menu
from msp_plugin.plan.units import Layer
from msp_plugin.runtime.journal import Journal
from tests.fuzz.mutations import byte_files

LAYER = Layer("l.0.up_proj", 4, 8)
WEIGHTS = {"2:4": torch.arange(32.0).reshape(4, 8) * (torch.arange(8) % 4 < 2), "1:4": torch.eye(4, 8)}
ERRORS = {name: LayerErrors(0.5, 0.25) for name in ("dense", "2:4", "1:4")}


def database(root):
    return LevelDatabase(root, {"model": "a"}, parse_menu(["dense", "2:4", "1:4"]))


@pytest.fixture(scope="module")
def layer(directory):
    database(directory / "database").write(LAYER, WEIGHTS, ERRORS)
    return database(directory / "database").file(LAYER.name).read_bytes()


@pytest.fixture(scope="module")
def journal(directory):
    written = Journal(directory / "of.jsonl", {"model": "a"})
    for key in "abc":
        written.get(key, lambda key=key: {"value": key, "seconds": 0.5})
    written.close()
    return (directory / "of.jsonl").read_bytes()


def test_any_layer_of_a_database_is_whole_or_built_anew(directory, layer):
    @given(byte_files(layer))
    def read(content):
        found = database(directory / "other")
        found.path.mkdir(parents=True, exist_ok=True)
        found.file(LAYER.name).write_bytes(content)
        if found.has(LAYER):
            for name, weight in WEIGHTS.items():
                assert torch.equal(found.weight(LAYER.name, name), weight)
        else:
            try:
                found.weight(LAYER.name, "2:4")
            except VerificationError as error:
                assert "built anew" in error.hint
        shutil.rmtree(found.path)

    read()


def test_any_line_of_a_journal_is_as_it_was_written_or_measured_anew(directory, journal):
    @given(byte_files(journal))
    def read(content):
        path = directory / "damaged.jsonl"
        path.write_bytes(content)
        found = Journal(path, {"model": "a"})
        for key in "abc":
            value = found.get(key, lambda: "anew")
            assert value == "anew" or value == {"value": key, "seconds": 0.5}
        found.close()
        again = Journal(path, {"model": "a"})
        for key in "abc":
            assert again.get(key, lambda: "twice") == found.get(key, lambda: "twice")

    read()
