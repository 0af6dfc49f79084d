"""Windows: the parts of a model that are trained at a time."""

import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from msp_plugin.models.layers import decoder_blocks
from msp_plugin.recovery.windows import windows

COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
MLP = {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
#: By family: how it is built, whether its blocks have halves, and in which half each norm is.
FAMILIES = {
    "llama": (None, {"input_layernorm": 1, "post_attention_layernorm": 2}),
    "gemma2": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**COMMON, **MLP, head_dim=8)),
        {
            "input_layernorm": 1,
            "post_attention_layernorm": 1,
            "pre_feedforward_layernorm": 2,
            "post_feedforward_layernorm": 2,
        },
    ),
    "olmo2": (
        lambda: Olmo2ForCausalLM(Olmo2Config(**COMMON, **MLP)),
        {"post_attention_layernorm": 1, "post_feedforward_layernorm": 2},
    ),
    "opt": (
        lambda: OPTForCausalLM(
            OPTConfig(**COMMON, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32)
        ),
        {"self_attn_layer_norm": 1, "final_layer_norm": 2},
    ),
    "falcon": (
        lambda: FalconForCausalLM(
            FalconConfig(**COMMON, parallel_attn=True, new_decoder_architecture=False, alibi=False)
        ),
        None,  # attention and MLP read the same norm: no stream passes between them alone
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request, llama):
    build, halves = FAMILIES[request.param]
    if build is None:
        return llama, halves
    torch.manual_seed(0)
    return build().float().eval(), halves


@torch.no_grad()
def outputs(model, ids):
    """The output of each block in the model's own forward pass."""
    found = []
    handles = [
        block.register_forward_hook(lambda m, a, out: found.append(out[0] if isinstance(out, tuple) else out))
        for block in decoder_blocks(model)[1]
    ]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_windows_in_a_row_give_the_blocks_own_outputs_bit_for_bit(family, make_samples, count_hooks):
    model, halves = family
    sample, *others = make_samples(3, 20).samples
    ids, hooks = torch.stack(others), count_hooks(model)
    expected = outputs(model, ids)
    found = windows(model, sample, 0)
    assert len(found) == (4 if halves else 2)
    hidden = None
    for window in found:
        with torch.no_grad():
            hidden = window.run(model, ids, hidden)
        if window.half != 1:
            assert torch.equal(hidden, expected[window.last])
    assert count_hooks(model) == hooks
    assert not any("forward" in vars(module) for module in model.modules())


def test_each_parameter_of_a_block_is_in_one_half(family, make_samples):
    model, halves = family
    found = windows(model, make_samples(1, 20).samples[0], 0)
    for number, block in enumerate(decoder_blocks(model)[1]):
        for name, _ in block.named_parameters():
            places = [window.half for window in found if window.contains(number, name)]
            assert len(places) == 1, name
            for norm, half in (halves or {}).items():
                if name.startswith(f"{norm}."):
                    assert places == [half]


def test_windows_of_several_blocks_hold_all_blocks_once(llama, make_samples):
    sample = make_samples(1, 20).samples[0]
    assert [(w.first, w.last, w.half) for w in windows(llama, sample, 1)] == [(0, 0, 0), (1, 1, 0)]
    (whole,) = windows(llama, sample, 3)
    assert torch.equal(whole.run(llama, sample[None], None), outputs(llama, sample[None])[-1])
