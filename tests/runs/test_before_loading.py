"""What a model's config alone shows is refused before weights are loaded, or fetched from a hub."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import msp_plugin
from msp_plugin import Text, VerificationError
from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.errors import BudgetError, ModelError, RecipeError
from msp_plugin.plan.levels import Level
from msp_plugin.plugins.manager import Plugins
from msp_plugin.runs.compare import Grid, compare
from msp_plugin.runs.prune import search
from msp_plugin.runs.sensitivity import measure_sensitivity
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import resolve

ERRORS = [
    ({"ignore": ["qproj"]}, RecipeError, "qproj"),
    ({"targets": ["model.layers.9.*"]}, RecipeError, "layers.9"),
    ({"protect": ["re:.*gate_prj"]}, RecipeError, "gate_prj"),
    ({"levels": ["dense", "3:7"]}, RecipeError, "3:7"),
    ({"levels": ["dense", "7:8"]}, BudgetError, "0.125"),
    ({"levels": "width", "method": "l2", "quantum": 7}, RecipeError, "quantum = 7"),
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"the {i}th cat sat on mat {i * i % 97}" for i in range(200)))
    return Text(str(path), samples=8, length=16, test_samples=4)


@pytest.mark.parametrize("options, error, found", ERRORS)
def test_options_that_do_not_fit_the_model(options, error, found, llama_dir, text, tmp_path, no_model):
    with pytest.raises(error, match=found):
        msp_plugin.prune(llama_dir, text, tmp_path / "out", sparsity=0.5, **options)
    with pytest.raises(error, match=found):
        search(ModelSource(llama_dir), text, resolve(Options(sparsity=0.5, **options), Plugins()))


def test_an_allocation_of_another_model(llama_dir, text, tmp_path, no_model, make_problem):
    from msp_plugin.plan.allocation import make_allocation

    problem = make_problem([(4, 8), (4, 16)], ["dense", "4:8", "2:8"], 0.5)
    (tmp_path / "allocation.json").write_text(make_allocation(problem, problem.uniform()).to_json())
    with pytest.raises(VerificationError, match="for another model"):
        msp_plugin.prune(llama_dir, text, tmp_path / "out", allocation=str(tmp_path / "allocation.json"))


def test_a_misspelt_layer_of_a_comparison_or_a_measurement(llama_dir, text, no_model):
    with pytest.raises(RecipeError, match="qproj"):
        compare(
            ModelSource(llama_dir),
            text,
            Grid(["1/2"], ["magnitude"], {"uniform": "uniform"}, options={"ignore": ["qproj"]}),
        )
    estimator = Plugins().build("estimators", "fisher")
    with pytest.raises(RecipeError, match="qproj"):
        measure_sensitivity(ModelSource(llama_dir), text, estimator, ignore=["qproj"])


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


@pytest.mark.parametrize("form, levels, changed, found", [
    ("uniform", ["dense", "dropped"], {"attention_bias": True}, "adds a bias"),
    ("sparse24", ["dense", "2:4"], {"hidden_size": 40, "intermediate_size": 40}, "multiple of"),
    ("bitmask", ["dense", "0.02"], {}, "packing does not pay"),
])  # fmt: skip
def test_a_form_that_cannot_hold_a_model(form, levels, changed, found):
    exporter, menu = Plugins().build("exporters", form), [Level.parse(level) for level in levels]
    with torch.device("meta"):
        fits, model = (LlamaForCausalLM(LlamaConfig(**(SIZES | part))) for part in ({}, changed))
    with pytest.raises(ModelError, match=found):
        exporter.check_model(model, menu, "block")
    exporter.check_model(fits, menu if changed else [Level.parse("0.5")], "block")


def test_a_smaller_model_of_a_hub_is_not_judged_by_its_full_shapes(llama_dir, monkeypatch):
    whole = ModelSource(llama_dir).empty()
    monkeypatch.setattr("msp_plugin.checkpoint.source.empty_model", lambda name, **options: whole)
    assert ModelSource("someone/whole").empty() is whole
    whole.config.per_layer_config = {"0": {"num_key_value_heads": 1}}
    assert ModelSource("someone/smaller").empty() is None
    assert ModelSource(llama_dir).empty() is whole
