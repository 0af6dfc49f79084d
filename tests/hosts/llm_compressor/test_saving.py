"""The names under which a pruned model is saved, and what lies beside it."""

import json

import pytest
import torch
import yaml
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)
from transformers.core_model_loading import Chunk, WeightConverter

from msp_plugin import MixedSparsityModifier
from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import Dense, export_checkpoint
from msp_plugin.checkpoint.saved_names import saved_names
from msp_plugin.errors import ModelError
from msp_plugin.hosts.llm_compressor.export import PlainRecipe
from msp_plugin.hosts.llm_compressor.saving import name_experts
from msp_plugin.models.layers import prunable_layers
from msp_plugin.models.load import load_model
from msp_plugin.plan.allocation import Allocation

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 32,
}  # fmt: skip
EXPERTS = {**SIZES, "num_local_experts": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture
def llava_dir(tmp_path, tokenizer):
    config = AutoConfig.for_model(
        "llava", text_config={**SIZES, "model_type": "llama"}, vision_config=VISION, image_token_index=5
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "llava")
    tokenizer.save_pretrained(tmp_path / "llava")
    (tmp_path / "llava" / "preprocessor_config.json").write_text('{"size": 28}', encoding="utf-8")
    return tmp_path / "llava"


UNIFORM = {"sparsity": 0.5, "levels": ["2:4"], "allocator": "uniform", "method": "wanda"}


def prune(model, make_samples, out, options=UNIFORM):
    from llmcompressor import oneshot

    loader = DataLoader([{"input_ids": sample} for sample in make_samples().samples], batch_size=3)
    oneshot(model=model, recipe=[MixedSparsityModifier(**options)], dataset=loader, output_dir=str(out))
    return out


def test_the_allocation_says_where_the_files_call_a_layer_otherwise(llava_dir, make_samples, tmp_path):
    out = prune(load_model(llava_dir), make_samples, tmp_path / "out")
    allocation = Allocation.read(out / "allocation.json")
    module = "model.language_model.layers.0.mlp.up_proj"
    assert allocation.stored[module] == "language_model.model.layers.0.mlp.up_proj"
    assert set(allocation.stored) == set(allocation.by_layer)
    checkpoint = Checkpoint.open(out)
    assert set(checkpoint.allocation.by_layer) == set(allocation.stored.values())
    assert (checkpoint.weight(allocation.stored[module]) == 0).double().mean() == 0.5


def test_a_plain_recipe_names_modules_and_not_tensors(llava_dir, make_samples, tmp_path):
    out = prune(load_model(llava_dir), make_samples, tmp_path / "out")
    export_checkpoint(out, PlainRecipe(), tmp_path / "recipe")
    recipe = yaml.safe_load((tmp_path / "recipe" / "recipe.yaml").read_text(encoding="utf-8"))
    (modifiers,) = recipe["keep_2_of_4_stage"].values()
    assert "model.language_model.layers.1.self_attn.q_proj" in modifiers["WandaPruningModifier"]["targets"]


def test_an_allocation_saved_with_a_checkpoint_prunes_the_model_again(llava_dir, make_samples, tmp_path):
    first = prune(load_model(llava_dir), make_samples, tmp_path / "first")
    given = {"allocation": str(first / "allocation.json"), "method": "wanda"}
    second = prune(load_model(llava_dir), make_samples, tmp_path / "second", given)
    for name in ("allocation.json", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_vision_tower_is_saved_as_it_was_with_the_processors_files(llava_dir, make_samples, tmp_path):
    out = prune(load_model(llava_dir), make_samples, tmp_path / "out")
    before, after = Checkpoint.open(llava_dir).tensors, Checkpoint.open(out).tensors
    tower = [name for name in before if "vision" in name]
    assert tower and all(torch.equal(before.read(name), after.read(name)) for name in tower)
    export_checkpoint(out, Dense(), tmp_path / "dense")
    for directory in (out, tmp_path / "dense"):
        assert (directory / "preprocessor_config.json").read_text(encoding="utf-8") == '{"size": 28}'


def test_a_model_of_text_alone_keeps_its_names_and_gets_no_processor(llama_dir, make_samples, tmp_path):
    out = prune(load_model(llama_dir), make_samples, tmp_path / "out")
    assert "stored" not in json.loads((out / "allocation.json").read_text(encoding="utf-8"))
    assert not list(out.glob("*processor*"))


def test_split_experts_are_saved_under_the_names_that_transformers_loads(tmp_path, tokenizer, make_samples):
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**EXPERTS)).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    out = prune(AutoModelForCausalLM.from_pretrained(tmp_path / "source"), make_samples, tmp_path / "out")
    assert set(Checkpoint.open(out).tensors) == set(Checkpoint.open(tmp_path / "source").tensors)
    stored = Allocation.read(out / "allocation.json").stored
    assert stored["model.layers.1.mlp.experts.1.up_proj"] == "model.layers.1.block_sparse_moe.experts.1.w3"
    load_model(out)


def test_experts_that_are_named_already_stay_so():
    from llmcompressor.modeling.moe.linearize import linearize_moe

    model = MixtralForCausalLM(MixtralConfig(**EXPERTS))
    name_experts(model)
    assert not hasattr(model, "_weight_conversions")  # they are fused
    linearize_moe(model)
    name_experts(model)
    once = model._weight_conversions
    name_experts(model)
    assert model._weight_conversions is once


def test_a_router_that_is_a_linear_is_not_pruned():
    from llmcompressor.modeling.moe.linearize import linearize_moe

    model = PhimoeForCausalLM(PhimoeConfig(**EXPERTS))
    linearize_moe(model)
    routers = [name for name, module in model.named_modules() if name.endswith(".router")]
    assert routers and all(isinstance(model.get_submodule(name), torch.nn.Linear) for name in routers)
    assert not set(routers) & {layer.name for layer in prunable_layers(model).layers}


def test_layers_that_transformers_stores_in_one_tensor_are_refused(llama):
    llama._weight_conversions = [
        WeightConverter(
            "mlp.gate_up_proj.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)]
        )
    ]
    assert saved_names(llama, ["model.layers.0.self_attn.q_proj"]) == {}
    with pytest.raises(
        ModelError, match=r"stores model\.layers\.0\.mlp\.up_proj of LlamaForCausalLM"
    ) as error:
        saved_names(llama, ["model.layers.0.mlp.up_proj"])
    assert "ignore" in error.value.hint
