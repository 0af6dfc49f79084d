"""config.json of a model whose blocks are equally wide: plain transformers read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msp_plugin.errors import ModelError
from msp_plugin.structure.widths import GLOBAL_ACCESS, KEY, Widths, refusal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: What is written for a model whose own type cannot hold its sizes: keys of its own that the other lacks, and the other's.
_LLAMA_ONLY = ("attention_bias", "mlp_bias", "pretraining_tp")
_MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
_QWEN2_ONLY = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
_SEED_OSS = {
    "model_type": "seed_oss", "architectures": ["SeedOssForCausalLM"], "attention_bias": True, "attention_out_bias": False,
    "mlp_bias": False, "residual_dropout": 0.0,
}  # fmt: skip


def uniform_config(
    raw: Mapping[str, Any], config: PreTrainedConfig, widths: Widths, blocks: Sequence[int], head_dim: int
) -> dict[str, Any]:
    """Return config.json of a model whose blocks all have the same widths.

    A Llama whose heads do not divide its hidden size becomes a Mistral without sliding window, which computes the same:
    transformers' LlamaConfig refuses such sizes, even with ``head_dim`` given. A Qwen2 that lost heads becomes a Seed-OSS,
    which computes the same: vLLM's Qwen2 takes the size of a head from the number of heads.

    Args:
        raw: config.json of the model before.
        config: the same, as transformers reads it.
        blocks: those of the model before that stay, in order.

    Raises:
        ModelError: transformers refuses the config, and no other architecture computes the same.
    """
    depth = config.num_hidden_layers
    written = {key: value for key, value in raw.items() if key not in (KEY, GLOBAL_ACCESS)}
    written |= {
        "num_hidden_layers": len(blocks),
        "num_attention_heads": widths.heads,
        "num_key_value_heads": widths.kv_heads,
        "intermediate_size": widths.channels,
        "head_dim": head_dim,
    }
    types = getattr(config, "layer_types", None)
    if isinstance(types, list) and len(types) == depth:
        written["layer_types"] = [types[block] for block in blocks]
    # with what config.json leaves to defaults, which are others there
    every = {**config.to_dict(), **written}
    every = {key: value for key, value in every.items() if key not in (KEY, GLOBAL_ACCESS, "_name_or_path")}
    if raw["model_type"] == "qwen2" and widths.heads * head_dim != config.hidden_size:
        seed_oss = {key: value for key, value in every.items() if key not in _QWEN2_ONLY} | _SEED_OSS
        if not config.use_sliding_window and refusal(seed_oss) is None:
            return seed_oss
    if (why := refusal(written)) is None:
        return written
    if raw["model_type"] == "llama" and not any(raw.get(key) for key in ("attention_bias", "mlp_bias")):
        mistral = {key: value for key, value in every.items() if key not in _LLAMA_ONLY} | _MISTRAL
        if refusal(mistral) is None:
            return mistral
    raise ModelError(
        f"transformers refuses the config of the smaller {raw['model_type']} model: {why}",
        hint="msp export --to small writes it",
    )
