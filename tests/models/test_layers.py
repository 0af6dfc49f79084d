import copy
import json
import shutil
from functools import partial

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from msp_plugin.errors import ModelError, NumericsError, RecipeError
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.layers import (
    allowed_levels,
    check_finite_weights,
    check_fit,
    decoder_blocks,
    prunable_layers,
)
from msp_plugin.models.load import load_model
from msp_plugin.models.offload import check_loadable
from msp_plugin.models.source import auto_class, load_tokenizer, max_length
from msp_plugin.plan.bounds import parse_bounds
from msp_plugin.plan.levels import parse_menu

LEAVES = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]


def layer_names(table):
    return [layer.name for layer in table.layers]


def test_the_linears_of_the_blocks_are_prunable_and_no_others(model):
    table = prunable_layers(model)
    assert list(table.names) == [f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in LEAVES]
    expected = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    )
    assert table.weights == expected and "lm_head" not in layer_names(table)


def test_a_layer_knows_its_shape_without_the_bias(qwen2):
    for layer in prunable_layers(qwen2).layers:
        assert tuple(qwen2.get_submodule(layer.name).weight.shape) == (layer.out_features, layer.in_features)


@pytest.mark.parametrize("targets, ignore, leaves", [
    (["q_proj"], [], ["self_attn.q_proj"] * 2),
    (["mlp.down_proj", "o_proj"], ["model.layers.1.mlp.down_proj"],
     ["self_attn.o_proj", "mlp.down_proj", "self_attn.o_proj"]),
    (["re:.*layers.0.mlp"], ["*up*"], ["mlp.gate_proj", "mlp.down_proj"]),
    (["Linear"], ["re:.*self_attn", "lm_head", "gate_proj", "up_proj"], ["mlp.down_proj"] * 2),
    (["model.layers.0.*_proj"], ["self_attn.q_proj", "k_proj", "v_proj", "re:model.layers.0.mlp"],
     ["self_attn.o_proj"]),
])  # fmt: skip
def test_patterns_are_names_endings_classes_shell_patterns_and_regular_expressions(
    llama, targets, ignore, leaves
):
    found = layer_names(prunable_layers(llama, targets, ignore))
    assert [".".join(name.split(".")[3:]) for name in found] == leaves


@pytest.mark.parametrize("kind", ["target", "ignore"])
def test_a_pattern_that_matches_nothing_names_the_nearest(llama, kind):
    patterns = {"target": (["Linear", "q_prj"], []), "ignore": (["Linear"], ["q_prj"])}[kind]
    with pytest.raises(RecipeError, match=f"{kind} 'q_prj' matches no module of LlamaForCausalLM") as error:
        prunable_layers(llama, *patterns)
    assert "did you mean 'q_proj'?" in error.value.hint and "Linear" in error.value.hint


def test_a_broken_regular_expression_is_explained(llama):
    with pytest.raises(RecipeError, match=r"pattern 're:\(' is no regular expression"):
        prunable_layers(llama, ["re:("])


def test_nothing_left_to_prune_is_an_error(llama):
    with pytest.raises(ModelError, match="no prunable linear under 'model.layers'") as error:
        prunable_layers(llama, ["Linear"], ["Linear"])
    assert "ignore ['Linear']" in error.value.message and "narrow ignore" in error.value.hint


def test_a_model_whose_blocks_hold_no_linear_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=32, n_positions=16))
    with pytest.raises(
        ModelError, match="blocks of GPT2LMHeadModel under 'transformer.h' hold no linear"
    ) as error:
        prunable_layers(model)
    assert "Conv1D" in error.value.message and "take another model" in error.value.hint


def test_the_blocks_are_the_list_as_long_as_the_config_says(llama):
    name, blocks = decoder_blocks(llama)
    assert name == "model.layers" and len(blocks) == 2
    llama.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="LlamaForCausalLM has no list of 7 decoder blocks") as error:
        decoder_blocks(llama)
    assert "decoder-only" in error.value.hint


def test_levels_that_do_not_divide_a_width_name_the_first_units(llama):
    table = prunable_layers(llama)
    check_fit(table, parse_menu(["dense", "3:64"]))
    with pytest.raises(RecipeError) as error:
        check_fit(table, parse_menu(["dense", "1:8", "1:128"]))
    assert "level 1:128 does not fit 6 of 8 units: it does not divide in_features = 64" in error.value.message
    assert "in_features = 64 of model.layers.0.self_attn.q_proj" in error.value.message
    assert error.value.message.count("in_features") == 3 and "leave 1:128 out" in error.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(llama, value):
    table = prunable_layers(llama)
    check_finite_weights(llama, table)
    with torch.no_grad():
        llama.get_submodule("model.layers.1.mlp.up_proj").weight[3, 5] = value
    with pytest.raises(NumericsError, match="1 layers .* e.g. model.layers.1.mlp.up_proj") as error:
        check_finite_weights(llama, table)
    assert "download" in error.value.hint


def test_the_fingerprint_follows_every_parameter_and_nothing_else(model):
    before = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == before
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        kept = flat[-1].clone()
        flat[-1] += 1
        assert fingerprint(model) != before, name
        flat[-1] = kept
    assert fingerprint(model) == before


def test_the_fingerprint_tells_dtypes_and_configs_apart(llama):
    before = fingerprint(llama)
    other = copy.deepcopy(llama)
    other.config.rms_norm_eps = 1e-3
    assert fingerprint(other) != before
    assert fingerprint(llama.bfloat16()) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_keeps_its_fingerprint_when_it_is_saved_and_loaded(model, tmp_path, dtype):
    before = fingerprint(model.to(dtype))
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    loaded = load_model(tmp_path / "b")
    assert next(loaded.parameters()).dtype == dtype
    assert fingerprint(loaded) == fingerprint(model) == before


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


@pytest.mark.parametrize("pattern", ["mlp", "model.layers.0", "LlamaAttention", "re:.*mlp$"])
def test_a_pattern_that_names_a_container_only_is_refused(llama, pattern):
    with pytest.raises(RecipeError, match="but no linear"):
        prunable_layers(llama, ignore=[pattern])


def test_fused_experts_are_refused_with_a_way_out():
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(ModelError, match="fused experts") as error:
        prunable_layers(MixtralForCausalLM(config))
    assert "oneshot" in error.value.hint


def test_weights_that_no_hook_loads_are_refused(llama):
    check_loadable(llama)
    with torch.device("meta"):
        llama.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.empty(128, 64))
    table = prunable_layers(llama)
    for check in (partial(check_loadable, llama), partial(check_finite_weights, llama, table)):
        with pytest.raises(ModelError, match="model.layers.0.mlp.up_proj are offloaded") as error:
            check()
        assert "device_map" in error.value.hint


def test_weights_that_a_hook_loads_for_whole_blocks_are_refused(llama):
    """Accelerate's preload_module_classes: no layer can be loaded on its own."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(llama, execution_device="cpu", preload_module_classes=["LlamaDecoderLayer"])
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj are offloaded"):
        check_finite_weights(llama, prunable_layers(llama))


def test_the_longest_sequence_comes_from_the_config(llama_dir):
    assert max_length(llama_dir) == load_model(llama_dir).config.max_position_embeddings


@pytest.mark.parametrize("granularity, count", [("unit", 8), ("layer", 14), ("half", 4), ("block", 2)])
def test_a_granularity_regroups_the_same_layers(model, granularity, count):
    table = prunable_layers(model, granularity=granularity)
    assert len(table) == count
    assert layer_names(table) == layer_names(prunable_layers(model))
    assert table.weights == prunable_layers(model).weights


def test_bounds_and_protection_become_a_table_of_allowed_levels(llama):
    table, menu = prunable_layers(llama), parse_menu(["dense", "4:8", "2:8"])
    bounds = parse_bounds({"re:.*mlp": [0.5, 0.75], "up_proj": [0, 0.5]}, ["model.layers.0.*k_proj"], menu)
    allowed = dict(zip(table.names, allowed_levels(llama, table, menu, bounds).tolist(), strict=True))
    assert allowed["model.layers.0.self_attn.qkv_proj"] == [True, False, False]
    assert allowed["model.layers.1.self_attn.qkv_proj"] == [True, True, True]
    assert allowed["model.layers.1.mlp.gate_up_proj"] == [False, True, False]
    assert allowed["model.layers.1.mlp.down_proj"] == [False, True, True]
    assert allowed_levels(llama, table, menu, parse_bounds({}, [], menu)) is None


@pytest.mark.parametrize("kind, bounds", [("bounds", ({"q_prj": [0, 1]}, [])), ("protect", ({}, ["q_prj"]))])
def test_bounds_of_a_pattern_that_matches_nothing_name_the_nearest(llama, kind, bounds):
    table, menu = prunable_layers(llama), parse_menu(["dense", "4:8"])
    with pytest.raises(RecipeError, match=f"{kind} 'q_prj' matches no module") as error:
        allowed_levels(llama, table, menu, parse_bounds(*bounds, menu))
    assert "did you mean 'q_proj'?" in error.value.hint


@pytest.mark.parametrize("pattern", ["lm_head", "o_proj"])
def test_protecting_what_is_not_pruned_anyway_is_an_error(llama, pattern):
    table, menu = prunable_layers(llama, ignore=["o_proj"]), parse_menu(["dense", "4:8"])
    with pytest.raises(RecipeError, match=f"protect '{pattern}' matches no layer that is pruned"):
        allowed_levels(llama, table, menu, parse_bounds({}, [pattern], menu))


def test_a_share_that_keeps_nothing_of_a_row_names_the_layers(llama):
    table = prunable_layers(llama)
    check_fit(table, parse_menu(["0.7", "63/64", "3:8 in 2:4"]))
    with pytest.raises(
        RecipeError, match="level 99/100 does not fit 6 of 8 units: it keeps nothing of in_features"
    ):
        check_fit(table, parse_menu(["0.99"]))


def test_the_fingerprint_follows_buffers_that_a_checkpoint_holds_and_no_others(llama):
    block = llama.model.layers[0]
    block.register_buffer("saved", torch.zeros(3))
    block.register_buffer("passing", torch.zeros(3), persistent=False)
    before = fingerprint(llama)
    block.passing += 1
    assert fingerprint(llama) == before
    block.saved += 1
    assert fingerprint(llama) != before


def test_the_fingerprint_follows_code_that_no_version_stands_for(llama):
    before = fingerprint(llama)
    mlp = llama.model.layers[0].mlp

    class Doubled(type(mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    mlp.__class__ = Doubled
    assert fingerprint(llama) != before


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


TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 32,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def seeing(kind, text, vision):
    config = AutoConfig.for_model(
        kind, text_config={**TEXT, "model_type": text}, vision_config={**VISION, "model_type": vision}
    )
    return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize("kind, text, vision", [
    ("llava", "llama", "clip_vision_model"), ("gemma3", "gemma3_text", "siglip_vision_model"),
])  # fmt: skip
def test_the_blocks_are_the_language_models_where_the_vision_tower_is_as_deep(kind, text, vision):
    model = seeing(kind, text, vision)
    deep = [name for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2]
    assert len(deep) == 2 and deep[0] != "model.language_model.layers"
    assert decoder_blocks(model)[0] == "model.language_model.layers"
    assert all(name.startswith("model.language_model.") for name in layer_names(prunable_layers(model)))


def test_a_model_of_images_and_text_loads_whole(tmp_path):
    model = seeing("llava", "llama", "clip_vision_model")
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
    seeing("llava", "llama", "clip_vision_model").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "vocab_size": 257152}), encoding="utf-8")  # as PaliGemma's have it
    load_model(tmp_path)
    config["text_config"]["vocab_size"] = 10**9
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="cannot load a causal language model"):
        load_model(tmp_path)


def test_an_encoder_and_a_decoder_are_refused():
    model = T5ForConditionalGeneration(
        T5Config(d_model=32, d_ff=32, d_kv=16, num_layers=2, num_heads=2, vocab_size=64)
    )
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is an encoder and a decoder"):
        prunable_layers(model)


def test_a_convolution_is_no_expert_and_stays_as_it_is():
    config = AutoConfig.for_model(
        "mamba2", vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2, num_heads=4, head_dim=16,
        n_groups=1, chunk_size=16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert model.backbone.layers[0].mixer.conv1d.weight.dim() == 3
    leaves = {name.rpartition(".")[2] for name in layer_names(prunable_layers(model))}
    assert leaves == {"in_proj", "out_proj"}
