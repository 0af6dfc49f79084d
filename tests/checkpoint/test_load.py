"""``load``: the same model from either form, from a directory or the hub's cache, and no damaged one."""

import json
import sys

import pytest
import torch
import transformers.dynamic_module_utils
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import msp_plugin
from msp_plugin.checkpoint.export import Dense, export_checkpoint
from msp_plugin.checkpoint.load import load
from msp_plugin.checkpoint.packed_export import Sparse24
from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.cli.arguments import resolve_model
from msp_plugin.errors import FormatError, ModelError, MSPError, RecipeError

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def logits(data):
    def logits(model):
        with torch.no_grad():
            return model(torch.stack(data.samples)).logits

    return logits


@pytest.fixture
def packed(packed_dir, copied):
    """A packed checkpoint to damage, without checksums that would notice first."""
    path = copied(packed_dir, "packed")
    (path / "export.json").unlink()
    return path


# the same model


def test_a_model_in_the_home_directory_is_found(llama_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(llama_dir.parent))
    name = f"~/{llama_dir.name}"
    source = ModelSource(name)
    source.check()
    assert source.load() and source.tokenizer() and resolve_model(name) == str(source.name) == str(llama_dir)
    nobody = ModelSource("~nobody-of-this-name/model")
    with pytest.raises(ModelError, match="no model directory at ~nobody-of-this-name/model"):
        nobody.check()


def test_the_package_offers_it(run_dir, bits):
    assert bits(msp_plugin.load(run_dir)) == bits(load(run_dir))


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_both_forms_give_the_dense_models_bits_and_logits_in_every_dtype(
    stored, dtype, make_run, tmp_path, bits, logits
):
    run = make_run(tmp_path / "run", dtype=stored)
    export_checkpoint(run, Sparse24(shard_bytes=40_000), tmp_path / "packed")
    expected = AutoModelForCausalLM.from_pretrained(run, dtype=dtype).eval()
    assert expected.lm_head.weight.dtype == (stored if dtype == "auto" else getattr(torch, dtype))
    for path in (run, tmp_path / "packed"):
        model = load(path, dtype)
        assert type(model) is type(expected) and not model.training
        assert bits(model) == bits(expected)
        assert torch.equal(logits(model), logits(expected))
        assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_tied_model_is_tied_and_has_its_biases(qwen2, make_run, tmp_path, bits, logits):
    run = make_run(tmp_path / "run", qwen2)
    export_checkpoint(run, Sparse24(), tmp_path / "packed")
    model, expected = load(tmp_path / "packed"), AutoModelForCausalLM.from_pretrained(run)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert bits(model) == bits(expected) and torch.equal(logits(model), logits(expected))
    assert float(model.model.layers[0].self_attn.q_proj.bias.abs().sum().detach()) > 0


def test_a_loaded_packed_model_is_dense_in_its_config_too(packed_dir, tmp_path, bits):
    model = load(packed_dir)
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert bits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")) == bits(model)


def test_generation_settings_come_along_in_both_forms(make_run, tmp_path, edit_json):
    run = make_run(tmp_path / "run")
    settings = {"eos_token_id": [7, 9], "temperature": 0.5, "do_sample": True}
    edit_json(run / "generation_config.json", lambda data: data.update(settings))
    export_checkpoint(run, Sparse24(), tmp_path / "packed")
    for path in (run, tmp_path / "packed"):
        found = load(path).generation_config.to_dict()
        assert {key: found[key] for key in settings} == settings, path


def test_a_packed_checkpoint_without_generation_settings_loads(packed):
    (packed / "generation_config.json").unlink()
    assert load(packed).generation_config is not None


def test_an_ordinary_dense_model_loads_as_ever(llama_dir, llama, bits):
    assert bits(load(llama_dir, "float32")) == bits(llama)


def test_a_loaded_model_can_be_trained_and_moved(packed_dir):
    model = load(packed_dir, "float32")
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# what is not there or not known


@pytest.mark.parametrize("source", ["/nowhere/model", "./nowhere", "a/b/c"])
def test_a_missing_directory_is_named(source):
    with pytest.raises(ModelError, match="no model directory at"):
        load(source)


def test_a_hub_id_that_is_nowhere_is_named():
    with pytest.raises(ModelError, match="cannot load someone/nothing"):
        load("someone/nothing")


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(tmp_path)


def test_an_unknown_dtype_is_refused_in_both_forms(run_dir, packed_dir):
    for path in (run_dir, packed_dir):
        with pytest.raises(RecipeError, match="dtype 'float8' is unknown"):
            load(path, "float8")


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff"])
def test_a_config_that_is_no_object_is_damage(content, packed):
    (packed / "config.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"config\.json"):
        load(packed)


def test_a_model_type_that_transformers_does_not_know_is_refused(packed, edit_json):
    edit_json(packed / "config.json", lambda data: data.update(model_type="unheard_of"))
    with pytest.raises(ModelError, match="cannot load a causal language model"):
        load(packed)


def test_packed_tensors_under_a_config_that_names_none_are_no_dense_model(packed, edit_json):
    edit_json(packed / "config.json", lambda data: data.pop("quantization_config") and None)
    with pytest.raises(FormatError, match=r"is stored packed, but config\.json does not name it"):
        load(packed)


def test_a_model_without_safetensors_is_left_to_transformers(llama_dir, copied, llama, bits):
    path = copied(llama_dir)
    (path / "model.safetensors").unlink()
    torch.save(llama.state_dict(), path / "pytorch_model.bin")
    assert bits(load(path, "float32")) == bits(llama)


# checksums


@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_one_flipped_bit_is_found_by_its_checksum(form, file, packed_dir, copied, tmp_path):
    path = copied(packed_dir)
    if form == "dense":
        export_checkpoint(packed_dir, Dense(), tmp_path / "dense")
        path = tmp_path / "dense"
    load(path)
    content = bytearray((path / file).read_bytes())
    content[-2] ^= 1  # of a weight, or of white space
    (path / file).write_bytes(content)
    with pytest.raises(FormatError, match="is not what was exported|cannot read .* as JSON") as error:
        load(path)
    assert file in error.value.message


def test_checksums_can_be_left_out(packed_dir, copied, rewrite):
    path = rewrite(copied(packed_dir), {"model.norm.weight": lambda t: t + 1})
    with pytest.raises(FormatError, match=r"model\.safetensors has other bytes"):
        load(path)
    assert float(load(path, checksums=False).model.norm.weight[0].detach()) == 2


def test_a_newer_or_damaged_manifest_is_refused(packed_dir, copied, edit_json):
    path = copied(packed_dir)
    edit_json(path / "export.json", lambda data: data.update(version=2))
    with pytest.raises(FormatError, match="has version 2"):
        load(path)
    load(path, checksums=False)


def test_a_shard_that_the_manifest_names_and_is_gone_is_found(run_dir, tmp_path):
    export_checkpoint(run_dir, Sparse24(shard_bytes=40_000), tmp_path / "out")
    next((tmp_path / "out").glob("model-00002-*")).unlink()
    with pytest.raises(FormatError, match="lacks model-00002"):
        load(tmp_path / "out")


# damage that no checksum covers


@pytest.mark.parametrize("keep", [0, 7, 500, -1])
def test_truncated_tensors_are_damage(keep, packed):
    content = (packed / "model.safetensors").read_bytes()
    (packed / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(FormatError, match="is not a complete safetensors file"):
        load(packed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{UP}.bitmask": lambda t: t ^ 16}, f"{UP}: the bitmask does not store two"),
        ({f"{UP}.shape": lambda t: t.flip(0)}, f"{UP}.shape says"),
        ({f"{UP}.shape": lambda t: t * 2**56}, f"{UP}.shape says"),
        ({f"{UP}.shape": lambda t: t.double()}, f"{UP} is not a packed weight"),
        ({f"{UP}.shape": None}, f"there is no {UP}.shape"),
        ({"model.norm.weight": None}, "no model.norm.weight"),
        ({"model.extra.weight": torch.zeros(3)}, "model.extra.weight has no place"),
    ],
    ids=["bitmask", "turned shape", "huge shape", "shape of floats", "no shape", "no norm", "one too many"],
)
def test_damaged_tensors_are_named(changes, words, packed, rewrite):
    with pytest.raises(FormatError, match=words):
        load(rewrite(packed, changes))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(hidden_size=96),
        lambda config: config.update(num_hidden_layers=1),
        lambda config: config.update(num_hidden_layers=3),
        lambda config: config.update(hidden_act="unheard_of"),
        lambda config: config["quantization_config"]["sparsity_config"]["targets"].append(
            "model.layers.9.up"
        ),
        lambda config: config["quantization_config"]["sparsity_config"].update(targets=["Linear"]),
        lambda config: config["quantization_config"]["sparsity_config"].update(format="marlin-24"),
        lambda config: config.pop("quantization_config") and None,
    ],
)
def test_a_config_of_another_model_raises_our_errors_only(change, packed, edit_json):
    edit_json(packed / "config.json", change)
    with pytest.raises(MSPError):
        load(packed)


# code


@pytest.fixture
def trap(packed, edit_json, tmp_path, monkeypatch):
    """A packed checkpoint whose config names code that leaves a mark when it is run."""
    mark = tmp_path / "executed"
    (packed / "own.py").write_text(
        f"open({str(mark)!r}, 'w')\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
        "class OwnConfig(Config): model_type = 'own'\n"
        "class OwnModel(Model): config_class = OwnConfig\n"
    )
    named = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_json(packed / "config.json", lambda data: data.update(auto_map=named))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return packed, mark


def test_code_that_a_checkpoint_names_is_not_run(trap, run_dir, bits):
    path, mark = trap
    assert bits(load(path)) == bits(load(run_dir)) and not mark.exists()


def test_a_model_that_is_code_alone_is_refused_and_the_code_not_run(trap, edit_json):
    path, mark = trap
    edit_json(path / "config.json", lambda data: data.update(model_type="own"))
    with pytest.raises(ModelError, match="trust_remote_code"):
        load(path)
    assert not mark.exists()


def test_code_is_run_where_it_is_trusted(trap, edit_json, run_dir):
    path, mark = trap
    edit_json(path / "config.json", lambda data: data.update(model_type="own"))
    model = load(path, trust_remote_code=True)
    assert mark.exists() and type(model).__name__ == "OwnModel"
    expected = dict(load(run_dir).named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


# the hub


def test_a_model_larger_than_its_tensors_is_incomplete(make_run, tmp_path, edit_json):
    torch.manual_seed(5)
    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    run = make_run(tmp_path / "run", LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)))
    export_checkpoint(run, Sparse24(), tmp_path / "packed")
    (tmp_path / "packed" / "export.json").unlink()
    edit_json(tmp_path / "packed" / "config.json", lambda data: data.update(num_hidden_layers=3))
    with pytest.raises(
        FormatError, match=r"does not hold the tensors of LlamaForCausalLM: no model\.layers\.2\."
    ):
        load(tmp_path / "packed")


def test_a_loaded_model_does_not_hang_on_its_file(packed):
    model = load(packed)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    (packed / "model.safetensors").write_bytes(b"\0" * (packed / "model.safetensors").stat().st_size)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("named", ["float32", "float16", "bfloat16", None])
@pytest.mark.parametrize("form", ["run_dir", "packed_dir"])
def test_both_forms_load_in_the_dtype_that_their_config_names(form, named, request, copied, edit_json):
    path = copied(request.getfixturevalue(form))
    (path / "export.json").unlink(missing_ok=True)
    edit_json(path / "config.json", lambda config: config.update(dtype=named))
    assert load(path).lm_head.weight.dtype == (getattr(torch, named) if named else torch.bfloat16)
