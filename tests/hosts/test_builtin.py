"""The built-in host gives what llm-compressor gives, and needs no package of it."""

import importlib
import sys
from dataclasses import replace
from fractions import Fraction
from importlib.abc import MetaPathFinder
from pathlib import Path

import pytest
import torch

import msp_plugin
from msp_plugin import Allocation, Level, Text
from msp_plugin.errors import RecipeError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.models.load import load_model

LEVELS = ("2:4", "3:8", "2:8", "1:8", "dense", "2:4", "2:8", "7:8")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    lines = (f"the {i}th cat sat on mat {i * i % 97} and the dog {i % 13} did not" for i in range(300))
    path.write_text("\n".join(lines))
    return Text(str(path), samples=6, length=20, test_samples=0, batch=2)


@pytest.fixture
def allocation(llama_dir, tmp_path):
    units = prunable_layers(load_model(llama_dir, "float32"))
    kept = sum(
        Level.parse(level).kept(a) for unit, level in zip(units, LEVELS, strict=True) for a in unit.layers
    )
    made = Allocation(units, tuple(map(Level.parse, LEVELS)), 1 - Fraction(kept, units.weights), {}, {})
    path = tmp_path / "allocation.json"
    path.write_text(made.to_json())
    return str(path)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", pytest.param("magnitude", marks=pytest.mark.slow)])
def test_it_prunes_bit_for_bit_as_llm_compressor_does(method, llama_dir, text, allocation, tmp_path):
    line = {"allocation": allocation, "method": method}
    own = msp_plugin.prune(llama_dir, text, tmp_path / "own", dtype="float32", baseline=False, **line)
    recipe = {"a_stage": {"b_modifiers": {"MixedSparsityModifier": line}}}
    theirs = msp_plugin.run_recipe(
        recipe, llama_dir, text, tmp_path / "theirs", dtype="float32", baseline=False
    )
    weights = [dict(load_model(run.path, "float32").named_parameters()) for run in (own, theirs)]
    assert weights[0].keys() == weights[1].keys()
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
    assert (own.path / "allocation.json").read_bytes() == (theirs.path / "allocation.json").read_bytes()
    assert own.record.sparsity == theirs.record.sparsity


def test_an_edited_allocation_whose_baseline_has_no_levels_is_named(
    llama_dir, text, allocation, tmp_path, edit_json
):
    edited = {"levels": ["dense", "2:4"], "bounds": {"q_proj": ["3/4", "3/4"]}}
    edit_json(Path(allocation), lambda data: data["provenance"].update(edited))
    with pytest.raises(RecipeError, match=r"allocation.json has no uniform baseline: no level of dense, 2:4"):
        msp_plugin.prune(
            llama_dir,
            replace(text, test_samples=2),
            tmp_path / "out",
            allocation=allocation,
            method="magnitude",
        )


def test_pruning_loads_no_host(llama_dir, text, tmp_path, monkeypatch):
    class Refused(MetaPathFinder):
        asked = []

        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "llmcompressor":
                self.asked.append(name)
                raise ImportError(name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "llmcompressor"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refused(), *sys.meta_path])
    msp_plugin.prune(llama_dir, text, tmp_path / "own", sparsity=0.5, allocator="uniform")
    assert Refused.asked == []
    with pytest.raises(ImportError):
        importlib.import_module("llmcompressor")
