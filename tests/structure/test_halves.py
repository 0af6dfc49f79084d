"""Halves are found from a model's own shapes; models whose heads or channels are coupled otherwise are refused."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3nTextConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
)

from msp_plugin.errors import ModelError
from msp_plugin.structure.halves import FAMILIES, find_halves

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_groups_are_those_of_the_config(name, tiny):
    model = tiny(name)
    config, halves = model.config, find_halves(model)
    assert [(half.block, half.kind) for half in halves] == [
        (block, kind) for block in range(4) for kind in ("attention", "mlp")
    ]
    for half in halves:
        if half.kind == "attention":
            assert half.groups == config.num_key_value_heads
            assert half.query_heads == config.num_attention_heads
        else:
            assert half.groups == config.intermediate_size and half.query_heads == 0
    weights = sum(
        model.get_submodule(layer).weight.numel() for half in halves for layer in (*half.inputs, half.output)
    )
    norms = {norm for half in halves for norm in half.norms}
    inside = {name for name, _ in model.model.layers.named_parameters()}
    in_heads = [name for name in inside if "q_norm" in name or "k_norm" in name]
    assert weights == sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    assert len(norms) == sum(name.endswith("norm.weight") for name in inside) - len(in_heads)


def test_a_group_is_one_kv_head_with_its_own_query_heads(tiny):
    attention, mlp = find_halves(tiny("llama"))[:2]
    assert attention.inputs == {
        "model.layers.0.self_attn.q_proj": 16,
        "model.layers.0.self_attn.k_proj": 8,
        "model.layers.0.self_attn.v_proj": 8,
    }
    assert attention.columns == 16 and attention.silencing == ("model.layers.0.self_attn.v_proj",)
    assert set(mlp.inputs.values()) == {1} and mlp.silencing == tuple(mlp.inputs)


def test_a_gate_that_is_not_zero_at_zero_silences_nothing(tiny):
    model = tiny("llama", hidden_act="sigmoid")
    assert find_halves(model)[1].silencing == ("model.layers.0.mlp.up_proj",)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MixtralConfig(**TINY, num_local_experts=2), "is a mixture of experts"),
        (Phi3Config(**TINY), "fuses projections in gate_up_proj, qkv_proj"),
        (FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4), "fuses projections"),
        (Olmo2Config(**TINY), "is of type 'olmo2'"),
        (
            Gemma3nTextConfig(
                **{**TINY, "num_hidden_layers": 4}, num_kv_shared_layers=2, vocab_size_per_layer_input=96,
                hidden_size_per_layer_input=8, laurel_rank=4, layer_types=["full_attention"] * 4,
                activation_sparsity_pattern=[0.0] * 4,
            ),
            "share the keys and values",
        ),
    ],
    ids=["mixture of experts", "fused", "fused qkv", "unknown", "shared keys"],
)  # fmt: skip
def test_other_couplings_are_refused_by_name(config, words):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=words) as error:
        find_halves(model)
    assert "gemma, gemma2, gemma3_text, llama" in error.value.hint


def test_a_block_that_is_there_twice_is_refused(tiny):
    model = tiny("llama")
    model.model.layers[3] = model.model.layers[1]
    with pytest.raises(
        ModelError, match=r"model\.layers\.3\.\S+ of LlamaForCausalLM is model\.layers\.1\.\S+ once"
    ):
        find_halves(model)


def test_a_weight_that_belongs_to_no_half_is_refused(tiny):
    model = tiny("llama")
    model.model.layers[2].scale = torch.nn.Parameter(torch.ones(32))
    with pytest.raises(
        ModelError, match=r"model\.layers\.2 has weights that belong to no half, e\.g\. scale"
    ):
        find_halves(model)
