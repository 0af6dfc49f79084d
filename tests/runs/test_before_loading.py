"""What a model's config alone shows is refused before weights are loaded, or fetched from a hub."""

import pytest

import msp_plugin
from msp_plugin import Text, VerificationError
from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.errors import BudgetError, RecipeError
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
    ({"levels": ["dense", "7:8"]}, BudgetError, "7/8|0.125|reach"),
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


def test_an_allocation_of_another_model(llama_dir, qwen2_dir, text, tmp_path, no_model, make_problem):
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
