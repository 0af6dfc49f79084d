"""vLLM's model of a smaller checkpoint: blocks of their own widths, without the halves that are dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.qwen3 import Qwen3Attention
from vllm.model_executor.models.utils import extract_layer_index

from msp_plugin.serving.vllm.small_config import widths_of
from msp_plugin.structure.widths import Widths


class SmallBlock(nn.Module):
    """A decoder block of Llama, Mistral, Qwen2 or Qwen3 with widths of its own.

    A dropped half has no modules, so that a dropped attention has no KV cache. Modules are vLLM's own: Qwen2's
    attention is Llama's with biases on q, k and v, as vLLM's class for Qwen2 takes the size of a head from their number.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        widths = widths_of(config)[extract_layer_index(prefix)]
        self.self_attn = _attention(vllm_config, widths, f"{prefix}.self_attn") if widths.heads else None
        if self.self_attn is not None:
            self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: nn.Module | None = None
        if widths.channels:
            self.mlp = LlamaMLP(
                hidden_size=config.hidden_size,
                intermediate_size=widths.channels,
                hidden_act=config.hidden_act,
                quant_config=vllm_config.quant_config,
                bias=getattr(config, "mlp_bias", False),
                prefix=f"{prefix}.mlp",
            )
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (output of the last half, hidden states before it), whose sum is the hidden state behind the block.

        Args:
            residual: None before the first half of the model.
        """
        if self.self_attn is not None:
            hidden_states, residual = _normed(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if self.mlp is not None:
            hidden_states, residual = _normed(self.post_attention_layernorm, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


class SmallForCausalLM(LlamaForCausalLM):
    """A smaller Llama, Mistral, Qwen2 or Qwen3; all four are the same around their blocks."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=SmallBlock)


def _normed(
    norm: RMSNorm, hidden_states: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (normed sum, sum) of what a half put out and the hidden state before it."""
    if residual is None:
        return norm(hidden_states), hidden_states
    normed, total = norm(hidden_states, residual)
    return normed, total


def _attention(vllm_config: VllmConfig, widths: Widths, prefix: str) -> Any:
    """Return vLLM's attention of a block with its own numbers of heads."""
    config = vllm_config.model_config.hf_config
    sizes: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_heads": widths.heads,
        "num_kv_heads": widths.kv_heads,
        "quant_config": vllm_config.quant_config,
        "cache_config": vllm_config.cache_config,
        "prefix": prefix,
    }
    bias = getattr(config, "attention_bias", False)
    if config.model_type != "qwen3":
        return LlamaAttention(
            config=config,
            max_position_embeddings=config.max_position_embeddings,
            bias=bias or config.model_type == "qwen2",
            bias_o_proj=bias,
            **sizes,
        )
    kinds = getattr(config, "layer_types", None) or ()
    sliding = bool(kinds) and kinds[extract_layer_index(prefix)] == "sliding_attention"
    return Qwen3Attention(
        rope_parameters=config.rope_parameters,
        max_position=config.max_position_embeddings,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        qkv_bias=bias,
        per_layer_sliding_window=config.sliding_window if sliding else None,
        **sizes,
    )
