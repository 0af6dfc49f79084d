"""config.json of a model whose blocks are equally wide: plain transformers read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msp_plugin.errors import ModelError
from msp_plugin.structure.widths import GLOBAL_ACCESS, KEY, Widths, refusal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Keys of Llama's config that Mistral's lacks.
_LLAMA_ONLY = ("attention_bias", "mlp_bias", "pretraining_tp")


def uniform_config(
    raw: Mapping[str, Any], config: PreTrainedConfig, widths: Widths, blocks: Sequence[int], head_dim: int
) -> dict[str, Any]:
    """Return config.json of a model whose blocks all have the same widths.

    A Llama whose heads do not divide its hidden size becomes a Mistral without sliding window, which computes the same:
    transformers' LlamaConfig refuses such sizes, even with ``head_dim`` given.

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
    if (why := refusal(written)) is None:
        return written
    if raw["model_type"] == "llama" and not any(raw.get(key) for key in ("attention_bias", "mlp_bias")):
        mistral = {key: value for key, value in written.items() if key not in _LLAMA_ONLY}
        mistral |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        if refusal(mistral) is None:
            return mistral
    raise ModelError(
        f"transformers refuses the config of the smaller {raw['model_type']} model: {why}",
        hint="msp export --to small writes it",
    )
