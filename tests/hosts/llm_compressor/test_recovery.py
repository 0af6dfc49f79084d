"""``RecoveryModifier`` in recipes: through ``oneshot``, and through ``msp run``."""

import json

import pytest
import torch
from torch.utils.data import DataLoader

from msp_plugin import MixedSparsityModifier, RecoveryModifier, Text, prune, run_recipe
from msp_plugin.data.sources import load_texts
from msp_plugin.data.tokenize import tokenize
from msp_plugin.demo import demo_model_path
from msp_plugin.errors import ModelError, RecipeError
from msp_plugin.models.load import load_model
from msp_plugin.models.source import load_tokenizer
from msp_plugin.passes.losses import mean_kl

PRUNE = {"sparsity": 0.5, "levels": ["2:4"], "method": "magnitude", "allocator": "uniform"}
QUICK = {"name": "blockwise", "epochs": 1, "rates": [0.06]}


@pytest.fixture(scope="module")
def calibration():
    tokenizer = load_tokenizer(demo_model_path("qwen2"))
    return tokenize(
        tokenizer, load_texts("demo:calibration"), samples=8, length=48, source="demo:calibration"
    )


@pytest.fixture
def model():
    return load_model(demo_model_path("qwen2"), "float32")


def run(model, modifiers, calibration, **kwargs):
    from llmcompressor import oneshot

    samples = [{"input_ids": sample} for sample in calibration.samples]
    return oneshot(model=model, recipe=modifiers, dataset=DataLoader(samples, batch_size=1), **kwargs)


def zeros(model):
    return {
        n: m.weight == 0 for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n
    }


def test_a_line_behind_the_pruning_recovers_with_the_pruned_models_zeros(model, calibration, tmp_path):
    pruned = load_model(demo_model_path("qwen2"), "float32")
    run(pruned, [MixedSparsityModifier(**PRUNE)], calibration)
    line = RecoveryModifier(method=QUICK, cache=str(tmp_path / "cache"))
    run(model, [MixedSparsityModifier(**PRUNE), line], calibration, output_dir=str(tmp_path / "out"))
    before, after = zeros(pruned), zeros(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    dense = load_model(demo_model_path("qwen2"), "float32")
    assert mean_kl(dense, model, calibration) < 0.9 * mean_kl(dense, pruned, calibration)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == ["prune", "recover"]
    assert record["stages"][-1]["recovery"]["method"]["epochs"] == 1
    assert "RecoveryModifier" in (tmp_path / "out" / "recipe.yaml").read_text()
    assert not list((tmp_path / "cache" / "recovery").iterdir())
