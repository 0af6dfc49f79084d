"""Models and tokenizers from directories."""

import json
import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from msp_plugin.checkpoint.saving import check_savable
from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.errors import ModelError, RecipeError
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.layers import prunable_layers
from msp_plugin.models.load import load_model
from msp_plugin.models.source import auto_class, load_tokenizer, max_length
from tests.helpers import models


@pytest.mark.parametrize("dtype, expected", [
    ("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16),
    ("float16", torch.float16),
])  # fmt: skip
def test_a_directory_loads_in_the_asked_dtype_and_in_eval_mode(llama_dir, dtype, expected):
    model = load_model(llama_dir, dtype)
    assert {p.dtype for p in model.parameters()} == {expected} and not model.training


def test_a_tied_model_loads_with_its_biases(qwen2_dir, qwen2):
    loaded = load_model(str(qwen2_dir))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    bias = "model.layers.0.self_attn.q_proj"
    assert torch.equal(loaded.get_submodule(bias).bias, qwen2.get_submodule(bias).bias)


def test_a_tokenizer_loads_from_the_same_directory(llama_dir, tokenizer):
    text = "the dog sat"
    assert load_tokenizer(llama_dir)(text).input_ids == tokenizer(text).input_ids


def test_an_unknown_dtype_names_the_nearest(llama_dir):
    with pytest.raises(RecipeError, match="dtype 'bfloat61' is unknown") as error:
        load_model(llama_dir, "bfloat61")
    assert "did you mean 'bfloat16'?" in error.value.hint


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("source", ["/nowhere/model", "./nowhere", "~/nowhere-at-all", "a/b/c"])
def test_a_path_that_is_not_there_is_no_hub_id(load, source):
    with pytest.raises(ModelError, match=f"no model directory at {source}") as error:
        load(source)
    assert "hub id" in error.value.hint


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_file_is_no_model(load, llama_dir):
    with pytest.raises(ModelError, match="no model directory at .*config.json"):
        load(llama_dir / "config.json")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_directory_without_a_config_is_no_model(load, tmp_path):
    with pytest.raises(ModelError, match="has no config.json"):
        load(tmp_path)


def test_a_directory_without_weights_is_no_model(llama_dir, tmp_path):
    shutil.copy(llama_dir / "config.json", tmp_path)
    with pytest.raises(ModelError, match="cannot load a causal language model from") as error:
        load_model(tmp_path)
    assert "safetensors" in error.value.hint


def test_truncated_weights_are_no_model(llama_dir, tmp_path):
    shutil.copytree(llama_dir, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot load a causal language model from"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("content", ["{ broken", json.dumps({"model_type": "no_such_type"}), json.dumps({})])
def test_a_broken_config_is_no_model(llama_dir, tmp_path, content):
    shutil.copytree(llama_dir, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(content)
    with pytest.raises(ModelError, match="cannot load a causal language model from"):
        load_model(tmp_path / "m")


def test_a_directory_without_a_tokenizer_says_so(llama, tmp_path):
    llama.save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match="cannot load a tokenizer from"):
        load_tokenizer(tmp_path / "m")


def test_a_hub_id_that_cannot_be_reached_is_explained():
    with pytest.raises(ModelError, match="cannot load a causal language model from nobody/nothing"):
        load_model("nobody/nothing")


def test_the_longest_sequence_comes_from_the_config(llama_dir):
    assert max_length(llama_dir) == load_model(llama_dir).config.max_position_embeddings


@pytest.mark.parametrize("config, most", [
    ({"model_type": "llama", "max_position_embeddings": 77}, 77),
    ({"model_type": "gpt2", "n_positions": 77}, 77),
    ({"model_type": "mpt", "max_seq_len": 77}, 77),
    ({"model_type": "ctrl", "n_positions": 77}, 77),
    ({"model_type": "gpt_neo", "max_position_embeddings": 77}, 77),
    ({"model_type": "llama", "max_position_embeddings": 77, "seq_length": -1}, 77),
    ({"model_type": "bloom"}, None),
    ({"model_type": "bloom", "seq_length": 77}, 77),
    ({"model_type": "mpt", "max_seq_len": 0}, "max_seq_len is 0, expected a positive integer"),
])  # fmt: skip
def test_the_longest_sequence_has_a_name_in_each_family(config, most, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if isinstance(most, str):
        with pytest.raises(ModelError, match=most):
            max_length(tmp_path)
    else:
        assert max_length(tmp_path) == most


def test_a_model_of_images_and_text_loads_whole(tmp_path):
    model = models.images_and_text("llava", "llama", "clip_vision_model")
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model) and fingerprint(loaded) == fingerprint(model)


@pytest.mark.parametrize("named, expected", [
    ("Llama4ForConditionalGeneration", AutoModelForImageTextToText), ("Llama4ForCausalLM", AutoModelForCausalLM),
])  # fmt: skip
def test_the_class_is_the_one_that_the_config_names_where_transformers_knows_two(named, expected):
    assert auto_class(AutoConfig.for_model("llama4", architectures=[named])) is expected
    assert (
        auto_class(AutoConfig.for_model("llama", architectures=["LlamaForCausalLM"])) is AutoModelForCausalLM
    )


def test_sizes_outside_of_the_language_models_config_stand_for_nothing(tmp_path):
    models.images_and_text("llava", "llama", "clip_vision_model").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "vocab_size": 257152}), encoding="utf-8")  # as PaliGemma's have it
    load_model(tmp_path)
    config["text_config"]["vocab_size"] = 10**9
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="cannot load a causal language model"):
        load_model(tmp_path)


def test_tensors_that_the_model_has_no_place_for_are_named(llama_dir, tmp_path, caplog):
    shutil.copytree(llama_dir, tmp_path / "more")
    config = json.loads((tmp_path / "more" / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    (tmp_path / "more" / "config.json").write_text(json.dumps(config))
    load_model(tmp_path / "more")
    assert "tensors that LlamaForCausalLM has no place for, e.g. model.layers." in caplog.text


@pytest.mark.parametrize("load", [ModelSource.check, ModelSource.load])
def test_a_name_that_is_too_long_for_a_path_is_explained(load):
    with pytest.raises(ModelError, match="File name too long"):
        load(ModelSource("a" * 300))


def test_a_generation_config_that_cannot_be_loaded_is_named(llama_dir, tmp_path):
    shutil.copytree(llama_dir, tmp_path / "odd")
    (tmp_path / "odd" / "generation_config.json").write_text('{"max_new_tokens": "abc"}')
    with pytest.raises(ModelError, match="cannot load") as error:
        load_model(tmp_path / "odd")
    assert "generation_config.json" in error.value.hint


def test_a_model_in_memory_is_no_source(llama):
    with pytest.raises(ModelError, match="the model is a LlamaForCausalLM") as error:
        ModelSource(llama)
    assert "oneshot" in error.value.hint


def test_a_model_that_is_loaded_with_an_adapter_is_refused(llama_dir, tmp_path):
    peft = pytest.importorskip("peft")
    whole = tmp_path / "whole"
    shutil.copytree(llama_dir, whole)
    adapted = peft.get_peft_model(load_model(whole), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(whole)
    model = load_model(whole)
    for check in (prunable_layers, check_savable):
        with pytest.raises(ModelError, match="loaded with an adapter") as error:
            check(model)
        assert "merge" in error.value.hint
