"""The blocks of a model and the layers of its table."""

from functools import partial

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from msp_plugin.errors import ModelError, NumericsError, RecipeError
from msp_plugin.models.layers import (
    allowed_levels,
    check_finite_weights,
    check_fit,
    decoder_blocks,
    prunable_layers,
)
from msp_plugin.models.offload import check_loadable
from msp_plugin.plan.bounds import parse_bounds
from msp_plugin.plan.menus import parse_menu
from tests.helpers import models

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
    with pytest.raises(RecipeError, match=r"pattern 're:\(' is not a regular expression"):
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


@pytest.mark.parametrize("kind, text, vision", [
    ("llava", "llama", "clip_vision_model"), ("gemma3", "gemma3_text", "siglip_vision_model"),
])  # fmt: skip
def test_the_blocks_are_the_language_models_where_the_vision_tower_is_as_deep(kind, text, vision):
    model = models.images_and_text(kind, text, vision)
    deep = [name for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2]
    assert len(deep) == 2 and deep[0] != "model.language_model.layers"
    assert decoder_blocks(model)[0] == "model.language_model.layers"
    assert all(name.startswith("model.language_model.") for name in layer_names(prunable_layers(model)))


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


def test_all_levels_that_do_not_fit_are_named_at_once(llama):
    with pytest.raises(RecipeError, match="level 3:7 does not fit .*; nor do 2:7, 1:128") as error:
        check_fit(prunable_layers(llama), parse_menu(["dense", "3:7", "2:7", "1:128"]))
    assert "leave 3:7, 2:7, 1:128 out" in error.value.hint and "0.5" in error.value.hint


def test_ignored_patterns_may_name_what_is_not_pruned_anyway(llama):
    table = prunable_layers(llama, ignore=["re:.*norm.*", "lm_head", "re:.*layers.0.*"])
    assert {name.split(".")[2] for name in layer_names(table)} == {"1"}
    with pytest.raises(RecipeError, match="target 're:.\\*norm.\\*' matches .* no linear"):
        prunable_layers(llama, targets=["re:.*norm.*"])


@pytest.mark.parametrize("pattern", ["mlp", "*.mlp", "re:.*mlp$"])
def test_the_hint_for_a_container_names_the_linears_inside(llama, pattern):
    with pytest.raises(RecipeError) as error:
        prunable_layers(llama, ignore=[pattern])
    advice = error.value.hint.split('"')[1]
    assert not [name for name in layer_names(prunable_layers(llama, ignore=[advice])) if "mlp" in name]


def test_a_part_with_parameters_and_linears_is_still_a_container():
    config = AutoConfig.for_model("mamba", hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config)
    assert dict(model.backbone.layers[0].mixer.named_parameters(recurse=False))
    for pattern in ("mixer", "re:.*layers.0.mixer$|nothing"):
        with pytest.raises(RecipeError, match="but no linear") as error:
            prunable_layers(model, ignore=[pattern])
        advice = error.value.hint.split('"')[1]
        assert prunable_layers(model, ignore=[advice.replace("*mixer", "*0.mixer")]).layers
