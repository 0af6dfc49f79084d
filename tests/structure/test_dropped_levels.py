"""A run of ``msp prune`` with dropped halves, made smaller for real."""

import json
from fractions import Fraction

import pytest
import torch

import msp_plugin
from msp_plugin import Allocation, Level, Text
from msp_plugin.checkpoint.export import allowed_forms, export_checkpoint
from msp_plugin.checkpoint.packed_export import Sparse24
from msp_plugin.checkpoint.smaller import Small, Uniform
from msp_plugin.models.layers import prunable_layers
from msp_plugin.models.load import load_model


@pytest.fixture
def pruned(llama_dir, tmp_path):
    """Return the run's directory: of the second block nothing is left, of the first one's MLP every second weight."""
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(f"the {i}th cat sat on mat {i * i % 97} and the dog did not" for i in range(200))
    )
    table = prunable_layers(load_model(llama_dir, "float32"), granularity="half")
    levels = tuple(map(Level.parse, ("dense", "2:4", "dropped", "dropped")))
    zeros = sum(unit.weights - level.kept(unit) for unit, level in zip(table, levels, strict=True))
    given = tmp_path / "allocation.json"
    given.write_text(Allocation(table, levels, Fraction(zeros, table.weights)).to_json())
    samples = Text(str(text), samples=4, length=20, test_samples=0, batch=2)
    options = {"dtype": "float32", "baseline": False, "method": "wanda", "allocation": str(given)}
    return msp_plugin.prune(llama_dir, samples, tmp_path / "run", **options).path


def test_dropped_levels_are_left_out_of_both_forms(pruned, tmp_path, same_outputs):
    whole = load_model(pruned, "float32")
    for exporter in (Small(), Uniform()):
        export_checkpoint(pruned, exporter, tmp_path / exporter.name)
        same_outputs(whole, msp_plugin.load(tmp_path / exporter.name, "float32"))
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["per_layer_config"]["1"]["skip"] == ["attention", "mlp"]
    assert json.loads((tmp_path / "uniform" / "config.json").read_text())["num_hidden_layers"] == 1
    small = msp_plugin.load(tmp_path / "small", "float32")
    kept = whole.model.layers[0].mlp.down_proj.weight
    assert torch.equal(small.model.layers[0].mlp.down_proj.weight, kept) and not kept.all()


@pytest.mark.parametrize("form, method", [("small", "l2"), ("uniform", "magnitude"), ("sparse24", "wanda")])
def test_a_searched_run_allows_the_form_that_was_asked_for(form, method, llama_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(f"the {i}th cat sat on mat {i * i % 97} and the dog did not" for i in range(200))
    )
    run = msp_plugin.prune(
        llama_dir,
        Text(str(text), samples=8, length=20, test_samples=0),
        tmp_path / "run",
        sparsity=0.5,
        method=method,
        form=form,
        quantum=4 if form == "small" else 64,
        allocator={"name": "search", "tokens": 40, "holdout": 40, "max_tokens": 4000},
        dtype="float32",
        baseline=False,
        cache=str(tmp_path / "cache"),
    )
    exporters = [exporter() for exporter in (Small, Uniform, Sparse24)]
    assert allowed_forms(run.path, exporters)[form]["refused"] is None
