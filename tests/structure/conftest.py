"""Tiny random models of each type whose structure is known, and zeros in heads, channels and halves of them."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
#: LlamaConfig and Gemma's want a hidden size that the heads divide.
DIVIDED = {**SIZES, "num_attention_heads": 8, "num_key_value_heads": 4}
FULL = ["full_attention"] * 4
TYPES = {
    "llama": (LlamaConfig, DIVIDED),
    "llama with biases": (LlamaConfig, {**DIVIDED, "attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {**SIZES, "sliding_window": None}),
    "mistral with a window": (MistralConfig, {**SIZES, "sliding_window": 5}),
    "qwen2": (Qwen2Config, {**SIZES, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, SIZES),
    "seed_oss": (SeedOssConfig, SIZES),
    "gemma": (GemmaConfig, SIZES),
    "gemma2": (Gemma2Config, {**DIVIDED, "layer_types": FULL}),
    "gemma2 mixed": (Gemma2Config, {**DIVIDED, "sliding_window": 5}),
    "gemma3_text": (Gemma3TextConfig, {**DIVIDED, "layer_types": FULL}),
}


@pytest.fixture(scope="session")
def tiny():
    """Return a tiny random model in float32 by its name in TYPES; biases are random too."""

    def tiny(name, seed=0, **sizes):
        config, usual = TYPES[name]
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config(**{**usual, **sizes})).float().eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_(0, 0.1)
        return model

    return tiny


class Zeroing:
    """Zeros heads, channels and halves of a model by plain indexing."""

    def __init__(self, model):
        self.blocks, self.config = model.model.layers, model.config

    def head(self, block, head, how="o_proj"):
        """Zero a KV head: the columns of its query heads, or the rows (and biases) of its values."""
        attention, size = self.blocks[block].self_attn, self.config.head_dim
        shared = self.config.num_attention_heads // self.config.num_key_value_heads * size
        with torch.no_grad():
            if how == "o_proj":
                attention.o_proj.weight[:, head * shared : (head + 1) * shared] = 0
            else:
                self._rows(attention.v_proj, slice(head * size, (head + 1) * size))

    def channel(self, block, channel, how="down_proj"):
        """Zero a channel: its column, or its row (and bias) of gate or up."""
        mlp = self.blocks[block].mlp
        with torch.no_grad():
            if how == "down_proj":
                mlp.down_proj.weight[:, channel] = 0
            else:
                self._rows(getattr(mlp, how), channel)

    def half(self, block, kind):
        """Zero all that an attention or MLP adds to the hidden state."""
        module = self.blocks[block]
        output = module.self_attn.o_proj if kind == "attention" else module.mlp.down_proj
        with torch.no_grad():
            self._rows(output, slice(None))

    @staticmethod
    def _rows(layer, rows):
        layer.weight[rows] = 0
        if layer.bias is not None:
            layer.bias[rows] = 0

    def at_random(self, seed, drop_attention=True):
        """Zero some of everything, but never every attention; return what was zeroed."""
        generator = torch.Generator().manual_seed(seed)

        def draw(count):
            return int(torch.randint(0, count, (), generator=generator))

        kept, zeroed = draw(4), {"heads": set(), "channels": set(), "halves": set()}
        for block in range(len(self.blocks)):
            for head in range(self.config.num_key_value_heads):
                if draw(3) == 0 and (block != kept or head):
                    self.head(block, head, ("o_proj", "v_proj")[draw(2)])
                    zeroed["heads"].add((block, head))
            for channel in range(self.config.intermediate_size):
                if draw(3) == 0:
                    self.channel(block, channel, ("down_proj", "gate_proj", "up_proj")[draw(3)])
                    zeroed["channels"].add((block, channel))
            if drop_attention and block != kept and draw(3) == 0:
                self.half(block, "attention")
                zeroed["halves"].add((block, "attention"))
            if draw(4) == 0:
                self.half(block, "mlp")
                zeroed["halves"].add((block, "mlp"))
        return zeroed


@pytest.fixture(scope="session")
def zeroing():
    return Zeroing


@pytest.fixture(scope="session")
def same_outputs():
    """Check that two models give the same logits within float32's rounding, and the same greedy tokens."""

    def same_outputs(model, other, *, generate=True):
        ids = torch.randint(0, SIZES["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            expected, found = model(ids).logits, other(ids).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
        assert torch.equal(expected.argmax(-1), found.argmax(-1))
        if not generate:
            return
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        for cached in (True, False):
            tokens = [m.generate(ids, use_cache=cached, **options) for m in (model, other)]
            assert torch.equal(*tokens)

    return same_outputs


@pytest.fixture
def exported(tmp_path):
    """Save a model, export it, and return both directories."""
    from msp_plugin.checkpoint.export import export_checkpoint

    def exported(model, exporter, name="out"):
        source = tmp_path / f"source of {name}"
        model.save_pretrained(source)
        export_checkpoint(source, exporter, tmp_path / name)
        return source, tmp_path / name

    return exported
