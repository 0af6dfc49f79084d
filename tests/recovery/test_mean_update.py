"""The mean update: dropped halves become biases of the halves before them, exactly."""

import json
import shutil

import pytest
import torch

import msp_plugin
from msp_plugin import Text
from msp_plugin.checkpoint.export import export_checkpoint
from msp_plugin.checkpoint.smaller import Small
from msp_plugin.errors import ModelError
from msp_plugin.models.load import load_model
from msp_plugin.records.run import RunRecord
from msp_plugin.recovery.mean_update import MeanUpdate
from msp_plugin.recovery.sources import load_original
from msp_plugin.runs.recover import recover

IDS = torch.arange(1, 20)[None]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"The cat sat on mat {i}, the dog on log {i * 7 % 23}.\n" for i in range(120)))
    return Text(str(path), samples=12, length=24, test_samples=4)


@pytest.fixture
def offset_dir(llama_dir, tmp_path):
    """A tiny Llama whose second block adds the same to every token, beside a little that depends on it."""
    folder = tmp_path / "dense"
    shutil.copytree(llama_dir, folder)
    model = load_model(llama_dir, "float32")
    with torch.no_grad():
        block = model.model.layers[1]
        block.self_attn.o_proj.weight.mul_(0.05)
        block.mlp.down_proj.weight.mul_(0.05)
        model.model.embed_tokens.weight.add_(
            torch.linspace(-0.3, 0.3, 64)
        )  # so that all tokens share a direction
    model.save_pretrained(folder)
    return folder


def zeroed(dense, folder):
    shutil.copytree(dense, folder)
    model = load_model(dense, "float32")
    with torch.no_grad():
        for module in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            module.weight.zero_()
    model.save_pretrained(folder)
    return folder


def by_hand(dense, data):
    """The updates of both halves of block 1, from the dense modules on the states of the model without them."""
    model = load_model(dense, "float32")
    block, rope = model.model.layers[1], model.model.rotary_emb
    attention, mlp = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    stream = []
    handle = block.input_layernorm.register_forward_pre_hook(
        lambda module, args: stream.append(args[0].detach())
    )
    with torch.no_grad():
        for sample in data:
            model(sample[None])
        handle.remove()
        for x in stream:
            cos_sin = rope(x, torch.arange(x.shape[1])[None])
            causal = torch.full((x.shape[1],) * 2, float("-inf")).triu(1)[None, None]
            attention += block.self_attn(block.input_layernorm(x), cos_sin, causal)[0].double().sum((0, 1))
        tokens = sum(x.shape[1] for x in stream)
        attention /= tokens
        for x in stream:
            mlp += block.mlp(block.post_attention_layernorm(x + attention.float())).double().sum((0, 1))
    return attention, mlp / tokens


@pytest.mark.parametrize(("form", "offload"), [("zeros", False), ("zeros", True), ("small", False)])
def test_the_update_is_the_mean_of_what_the_dense_halves_add(
    offset_dir, text, tmp_path, form, offload, monkeypatch
):
    sparse = zeroed(offset_dir, tmp_path / "zeros")
    if form == "small":
        export_checkpoint(sparse, Small(), tmp_path / "small")
        sparse = tmp_path / "small"
    seen = {}
    from msp_plugin.recovery.mean_update import MeanUpdate

    plain = MeanUpdate.recover
    monkeypatch.setattr(
        MeanUpdate,
        "recover",
        lambda self, inputs: (seen.update(data=inputs.data.samples), plain(self, inputs))[1],
    )
    run = recover(sparse, text, tmp_path / "out", original=offset_dir, method="mean_update", dtype="float32",
                  offload=offload)  # fmt: skip
    model = msp_plugin.load(run.path, "float32")
    attention, mlp = by_hand(offset_dir, seen["data"])
    bias = model.model.layers[0].mlp.down_proj.bias.detach().double()
    torch.testing.assert_close(bias, attention + mlp, rtol=1e-4, atol=1e-6)
    assert model.config.attention_bias and model.config.mlp_bias
    biases = {name for name, p in model.named_parameters() if name.endswith(".bias") and p.any()}
    assert biases == {"model.layers.0.mlp.down_proj.bias"}
    stages = {stage.name: stage for stage in RunRecord.beside(run.path).stages}
    assert stages["recover"].kl < 0.7 * stages["prune"].kl
    assert ("per_layer_config" in json.loads((run.path / "config.json").read_text())) == (form == "small")


def test_adding_it_there_is_adding_it_to_the_output_of_the_dropped_half(offset_dir, text, tmp_path):
    sparse = zeroed(offset_dir, tmp_path / "zeros")
    run = recover(sparse, text, tmp_path / "out", original=offset_dir, method="mean_update", dtype="float32")
    found, bare = msp_plugin.load(run.path, "float32"), load_model(sparse, "float32")
    update = found.model.layers[0].mlp.down_proj.bias.detach()
    bare.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output + update)
    export_checkpoint(run.path, Small(), tmp_path / "small")
    with torch.no_grad():
        expected = bare(IDS).logits
        for model in (found, msp_plugin.load(tmp_path / "small", "float32")):
            torch.testing.assert_close(
                model(IDS).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max())
            )
    assert json.loads((tmp_path / "small" / "config.json").read_text())["per_layer_config"]["1"]["skip"] == [
        "attention", "mlp",
    ]  # fmt: skip


def mean_inputs(model, layer, data):
    """The mean over tokens of a layer's inputs."""
    seen = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for sample in data:
            model(sample[None])
    handle.remove()
    return torch.cat([each.flatten(0, 1) for each in seen]).double().mean(dim=0)


@pytest.mark.parametrize("form", ["zeros", "small"])
def test_channels_that_are_gone_become_flaps_bias(offset_dir, text, tmp_path, form, monkeypatch):
    """W_gone mean(z_gone), with means of the model in which all before it is done."""
    folder = tmp_path / "zeros"
    shutil.copytree(offset_dir, folder)
    model = load_model(offset_dir, "float32")
    gone = {"model.layers.0.mlp": slice(0, 40), "model.layers.1.mlp": slice(40, 100)}
    with torch.no_grad():
        for name, channels in gone.items():
            mlp = model.get_submodule(name)
            mlp.down_proj.weight[:, channels] = 0
            mlp.up_proj.weight[channels] = 0
            mlp.gate_proj.weight[channels] = 0
    model.save_pretrained(folder)
    sparse, seen, plain = folder, {}, MeanUpdate.recover
    if form == "small":
        export_checkpoint(folder, Small(), tmp_path / "small")
        sparse = tmp_path / "small"
    monkeypatch.setattr(
        MeanUpdate,
        "recover",
        lambda self, inputs: (seen.update(data=inputs.data.samples), plain(self, inputs))[1],
    )
    run = recover(sparse, text, tmp_path / "out", original=offset_dir, method="mean_update", dtype="float32")
    dense, found = load_model(offset_dir, "float32"), msp_plugin.load(run.path, "float32")
    for name, channels in gone.items():
        layer = f"{name}.down_proj"
        weight = dense.get_parameter(f"{layer}.weight").double()
        bias = weight[:, channels] @ mean_inputs(dense, layer, seen["data"])[channels]
        torch.testing.assert_close(found.get_parameter(f"{layer}.bias").double(), bias, rtol=1e-4, atol=1e-6)
        assert bias.abs().max() > 1e-3
        mlp = dense.get_submodule(name)  # from here on the dense model is the recovered one
        with torch.no_grad():
            mlp.down_proj.weight[:, channels] = 0
            mlp.down_proj.bias = torch.nn.Parameter(bias.float())


def test_what_cannot_be_updated_is_refused_or_noted(llama_dir, qwen2_dir, text, tmp_path):
    def damaged(source, name, damage):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        model = load_model(source, "float32")
        with torch.no_grad():
            damage(model.model.layers)
        model.save_pretrained(folder)
        return folder

    other = damaged(qwen2_dir, "qwen2", lambda layers: layers[1].mlp.down_proj.weight.zero_())
    with pytest.raises(
        ModelError, match="the projections of qwen2 that write to the hidden state have no biases"
    ):
        recover(other, text, tmp_path / "b", original=qwen2_dir, method="mean_update", dtype="float32")
    first = damaged(llama_dir, "first", lambda layers: layers[0].self_attn.o_proj.weight.zero_())
    run = recover(first, text, tmp_path / "c", original=llama_dir, method="mean_update", dtype="float32")
    (note, *_) = run.record.stages[-1].recovery.notes
    assert note == "model.layers.0.self_attn has no half before it, so nothing stands for it"


def test_a_zero_of_the_dense_model_is_no_loss(llama_dir, text, tmp_path):
    """A half that has only such zeros costs no pass: the tokens are those of block 0, once, and block 1's MLP."""
    model = load_model(llama_dir, "float32")
    weights = model.model.layers[0].mlp.up_proj.weight[:1, :1], model.model.layers[1].mlp.down_proj.weight
    folders = tmp_path / "dense", tmp_path / "sparse"
    for folder, weight in zip(folders, weights, strict=True):
        shutil.copytree(llama_dir, folder)
        weight.data.zero_()
        model.save_pretrained(folder)
    run = recover(
        folders[1], text, tmp_path / "out", original=folders[0], method="mean_update", dtype="float32"
    )
    work = run.record.stages[-1].recovery
    assert work.tokens == work.data.tokens


def test_an_update_that_does_not_help_leaves_the_model_as_it_was(offset_dir, text, tmp_path, monkeypatch):
    """The loss is made to rise, whatever the biases do."""
    losses = iter((1.0, 2.0))
    monkeypatch.setattr(MeanUpdate, "_loss", lambda self, inputs: next(losses))
    run = recover(
        zeroed(offset_dir, tmp_path / "sparse"), text, tmp_path / "out", original=offset_dir, method="mean_update",
        dtype="float32",
    )  # fmt: skip
    work = RunRecord.beside(run.path).stages[-1].recovery
    assert "no bias was changed" in work.notes[-1] and [loss for _, loss in work.curve] == [1.0, 1.0]
    config = json.loads((run.path / "config.json").read_text())
    assert not config["attention_bias"] and not config["mlp_bias"]
    assert not [name for name, _ in load_model(run.path).named_parameters() if name.endswith(".bias")]


def test_models_that_are_stored_in_two_types_are_compared_in_that_of_the_sparse_one(
    offset_dir, text, tmp_path, caplog, monkeypatch
):
    types, place = [], "msp_plugin.runs.recover.load_original"
    monkeypatch.setattr(place, lambda *a, **k: types.append(load_original(*a, **k)) or types[-1])
    other = tmp_path / "bfloat16"
    shutil.copytree(offset_dir, other)
    load_model(offset_dir, "bfloat16").save_pretrained(other)
    zeroed(offset_dir, tmp_path / "run")
    found = {}
    for name, original in (("two", other), ("one", offset_dir)):
        recover(tmp_path / "run", text, tmp_path / name, original=original, method="mean_update")
        found[name] = load_model(tmp_path / name).model.layers[0].mlp.down_proj.bias
    assert found["one"].abs().max() > 0.01
    torch.testing.assert_close(found["two"], found["one"], rtol=0.05, atol=0.01)
    assert "is it the model that was pruned?" not in caplog.text
    assert [model.dtype for model in types] == [torch.float32] * 2


@pytest.mark.parametrize("method", ["weight_update", "mean_update"])
def test_another_recovery_may_follow(method, offset_dir, text, tmp_path):
    zeroed(offset_dir, tmp_path / "run")
    recover(tmp_path / "run", text, tmp_path / "first", original=offset_dir, method="mean_update")
    run = recover(tmp_path / "first", text, tmp_path / "second", original=offset_dir, method=method)
    assert [stage.name for stage in run.record.stages][-2:] == ["recover", "recover"]
