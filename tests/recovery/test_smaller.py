"""Recovery of models that lost heads, channels, halves and blocks: shapes, widths and zeros stay."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import msp_plugin
from msp_plugin import Text
from msp_plugin.checkpoint.export import export_checkpoint
from msp_plugin.checkpoint.smaller import Small, Uniform
from msp_plugin.errors import ModelError, RecipeError
from msp_plugin.models.load import load_model
from msp_plugin.records.run import RunRecord
from msp_plugin.runs.recover import recover

TRAINED = {"tokens": 2000, "step_tokens": 96, "evaluations": 2, "learning_rate": 1e-3}
METHODS = [
    {"name": "blockwise", "epochs": 2, "rates": [0.06]},
    {"name": "full", **TRAINED},
    {"name": "lora", "rank": 4, **TRAINED},
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"The cat sat on mat {i}, the dog on log {i * 7 % 23}.\n" for i in range(120)))
    return Text(str(path), samples=12, length=24, test_samples=4)


def smaller(llama_dir, folder, exporter, zero):
    """Write a smaller model of the tiny Llama with some zeros besides; return its directory."""
    zeros = folder / "zeros"
    shutil.copytree(llama_dir, zeros)
    model = load_model(llama_dir, "float32")
    with torch.no_grad():
        zero(model.model.layers)
    model.save_pretrained(zeros)
    export_checkpoint(zeros, exporter, folder / exporter.name)
    return folder / exporter.name


def uneven(layers):
    layers[0].mlp.down_proj.weight[:, :40] = 0
    layers[1].self_attn.o_proj.weight.zero_()
    layers[1].mlp.down_proj.weight[:, 100:] = 0
    layers[1].mlp.up_proj.weight[:100:2, ::2] = 0  # a mask that stays


def half_as_deep(layers):
    layers[1].self_attn.o_proj.weight.zero_()
    layers[1].mlp.down_proj.weight.zero_()
    layers[0].self_attn.o_proj.weight[:, :32] = 0


def channels_and_halves(layers):
    layers[0].mlp.down_proj.weight[:, :40] = 0
    layers[0].mlp.gate_proj.weight[:40] = 0
    layers[0].mlp.up_proj.weight[:40] = 0
    for weight in layers[1].self_attn.parameters():
        weight.zero_()


@pytest.mark.parametrize(
    "method",
    [METHODS[0], pytest.param(METHODS[1], marks=pytest.mark.slow), METHODS[2]],
    ids=lambda method: method["name"],
)
def test_a_smaller_model_is_recovered_in_its_own_shapes(llama_dir, text, tmp_path, method):
    if method["name"] == "lora":
        method = {**method, "masked_merge": True}
    small = smaller(llama_dir, tmp_path, Small(), uneven)
    run = recover(small, text, tmp_path / "out", original=llama_dir, method=method, dtype="float32")
    before, after = (load_file(folder / "model.safetensors") for folder in (small, run.path))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert weight.shape == after[name].shape
        if "proj" in name:
            assert torch.equal(weight == 0, after[name] == 0), name
    assert any(not torch.equal(before[name], after[name]) for name in before)
    config = json.loads((run.path / "config.json").read_text())["per_layer_config"]
    assert config == json.loads((small / "config.json").read_text())["per_layer_config"]
    stages = {stage.name: stage for stage in RunRecord.beside(run.path).stages}
    assert stages["recover"].kl < stages["prune"].kl
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.isfinite(msp_plugin.load(run.path, "float32")(ids).logits).all()


def config_alone(folder):
    """Return a copy of a checkpoint without readable weights, for refusals that must not need them."""
    shutil.copytree(folder, folder.with_name("damaged"))
    (folder.with_name("damaged") / "model.safetensors").write_bytes(b"")
    return folder.with_name("damaged")


def test_a_model_without_blocks_is_recovered_on_outputs_and_refused_block_by_block(llama_dir, text, tmp_path):
    flat = smaller(llama_dir, tmp_path, Uniform(), half_as_deep)
    damaged = config_alone(flat)
    for name in ("blockwise", "mean_update", "weight_update"):
        with pytest.raises(
            ModelError, match=f"has 1 blocks and its original 2, so {name} cannot hold them side by side"
        ):
            recover(damaged, text, tmp_path / "no", original=llama_dir, method=name, dtype="float32")
    run = recover(flat, text, tmp_path / "out", original=llama_dir, method=METHODS[2], dtype="float32")
    stages = {stage.name: stage for stage in RunRecord.beside(run.path).stages}
    assert stages["recover"].kl < stages["prune"].kl
    assert load_model(run.path, "float32").config.num_hidden_layers == 1


def one_attention_less(layers):
    layers[0].self_attn.o_proj.weight.zero_()
    layers[0].mlp.down_proj.weight[::2, ::2] = 0  # a mask that stays


def narrow_everywhere(layers):
    for layer in layers:
        layer.mlp.down_proj.weight[:, :40] = 0


@pytest.mark.parametrize(
    "case", [(Small(), uneven), (Uniform(), narrow_everywhere)], ids=["small", "uniform"]
)
def test_weight_update_refuses_layers_that_lost_heads_or_channels(llama_dir, text, tmp_path, case):
    damaged = config_alone(smaller(llama_dir, tmp_path, *case))
    with pytest.raises(
        ModelError, match="lost heads or channels, and weight_update compares layers of one shape"
    ):
        recover(damaged, text, tmp_path / "no", original=llama_dir, method="weight_update", dtype="float32")


def test_weight_update_takes_a_model_that_lost_only_a_half(llama_dir, text, tmp_path):
    small = smaller(llama_dir, tmp_path, Small(), one_attention_less)
    run = recover(small, text, tmp_path / "out", original=llama_dir, method="weight_update", dtype="float32")
    stages = {stage.name: stage for stage in RunRecord.beside(run.path).stages}
    assert stages["recover"].kl < stages["prune"].kl


def test_a_model_with_more_than_its_original_is_refused(llama_dir, text, tmp_path):
    flat = smaller(llama_dir, tmp_path, Uniform(), half_as_deep)
    with pytest.raises(ModelError, match="is not the original"):
        recover(llama_dir, text, tmp_path / "out", original=flat, method=METHODS[0], dtype="float32")


def test_lora_on_zeros_within_smaller_layers_is_refused_without_a_masked_merge(llama_dir, text, tmp_path):
    small = smaller(llama_dir, tmp_path, Small(), uneven)
    with pytest.raises(RecipeError, match="would fill 1,600 pruned weights in"):
        recover(small, text, tmp_path / "out", original=llama_dir, method=METHODS[2], dtype="float32")


def test_lora_on_zeroed_heads_channels_and_halves_is_that_of_the_smaller_model(llama_dir, text, tmp_path):
    """The zeros stay, and cutting them out afterwards gives a model that computes the same."""
    smaller(llama_dir, tmp_path, Small(), channels_and_halves)
    zeros = tmp_path / "zeros"
    run = recover(zeros, text, tmp_path / "out", original=llama_dir, method=METHODS[2], dtype="float32")
    stages = {stage.name: stage for stage in RunRecord.beside(run.path).stages}
    assert stages["recover"].kl < stages["prune"].kl
    before, after = (load_file(folder / "model.safetensors") for folder in (zeros, run.path))
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    export_checkpoint(run.path, Small(), tmp_path / "recovered-small")
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        whole, cut = (
            msp_plugin.load(p, "float32")(ids).logits for p in (run.path, tmp_path / "recovered-small")
        )
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "share"),
    [
        ({"name": "blockwise", "epochs": 2}, 0.8),
        ({"name": "lora", "tokens": 60_000, "step_tokens": 1024, "learning_rate": 1e-3}, 0.8),
        ({"name": "full", "tokens": 60_000, "step_tokens": 1024, "learning_rate": 5e-4}, 0.8),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_the_demo_model_comes_nearer_to_the_whole_one(tmp_path, method, share):
    """Without an attention, an MLP, and the least quarter of the others' channels; share: of the KL that may be left."""
    from msp_plugin.demo import demo_model_path

    dense = demo_model_path("llama")

    def zero(layers):
        layers[4].self_attn.o_proj.weight.zero_()
        layers[2].mlp.down_proj.weight.zero_()
        for layer in layers:
            weight = layer.mlp.down_proj.weight
            weight[:, weight.norm(dim=0).argsort()[: weight.shape[1] // 4]] = 0

    small = smaller(dense, tmp_path, Small(), zero)
    text = Text("demo:calibration", test="demo:test", samples=48, length=128, test_samples=16)
    run = recover(small, text, tmp_path / "out", original=dense, method=method, dtype="float32")
    stages = {stage.name: stage for stage in RunRecord.beside(run.path).stages}
    before, after = (load_file(folder / "model.safetensors") for folder in (small, run.path))
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert stages["recover"].kl < share * stages["prune"].kl, (stages["prune"].kl, stages["recover"].kl)
    print(method["name"], stages["prune"], stages["recover"])
