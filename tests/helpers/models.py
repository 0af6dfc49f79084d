"""Tiny seeded models with random weights, each for what is special about its family."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from msp_plugin.data.calibration import CalibrationSet

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}


def llama(**sizes):
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes})).float().eval()


def qwen2(**sizes):
    """Biases in the attention, and a head that is tied to the embedding."""
    torch.manual_seed(2)
    model = Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **sizes}, tie_word_embeddings=True)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    return model


def granite():
    """The logits are the head's output, scaled."""
    torch.manual_seed(3)
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=2.5)).eval()


def gemma2():
    """The logits are the head's output, capped by a tanh."""
    torch.manual_seed(4)
    config = Gemma2Config(
        **SIZES, head_dim=16, final_logit_softcapping=0.5, attn_implementation="eager", sliding_window=64
    )
    return Gemma2ForCausalLM(config).eval()


def phi():
    """The head has a bias."""
    torch.manual_seed(5)
    model = PhiForCausalLM(PhiConfig(**SIZES, resid_pdrop=0.0, embd_pdrop=0.0)).eval()
    with torch.no_grad():
        model.lm_head.bias.normal_(0.0, 2.0)
    return model


def falcon():
    """Adds in place to what a linear gave."""
    torch.manual_seed(4)
    config = FalconConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        new_decoder_architecture=True,
        num_kv_heads=1,
    )
    return FalconForCausalLM(config).eval()


def images_and_text(kind, text, vision):
    """A model of images and text whose two towers have two blocks each."""
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    language = {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 32}
    config = AutoConfig.for_model(
        kind,
        text_config={**shared, **language, "model_type": text},
        vision_config={**shared, "image_size": 28, "patch_size": 14, "model_type": vision},
    )
    return AutoModelForImageTextToText.from_config(config)


#: The two models that most tests take, by the name of their fixture.
MODELS = {"llama": llama, "qwen2": qwen2}


def certain_llama():
    """A float16 model that is nearly certain of a text, so that the gradients of its loss are small, and that text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, initializer_range=0.1,
    )  # fmt: skip
    model, text = LlamaForCausalLM(config), torch.arange(2048) % 7
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        model(text[None, :32], labels=text[None, :32]).loss.backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval().half(), CalibrationSet((text,), "seven tokens")
