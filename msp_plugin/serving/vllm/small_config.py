"""How vLLM reads config.json of a smaller model: sizes that hold for all blocks, and the widths of each one."""

from __future__ import annotations

import functools
from dataclasses import astuple
from typing import Any

from transformers import PreTrainedConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.transformers_utils.config import HFConfigParser

from msp_plugin.errors import ServingError
from msp_plugin.structure.small_model import plain_config
from msp_plugin.structure.widths import KEY, Widths, global_widths, read_widths

#: vLLM's name of the model class that serves smaller models (small.py).
ARCHITECTURE = "MSPSmallForCausalLM"
#: The attribute of a config that holds the widths of each block, as tuples: configs are written as JSON.
WIDTHS = "msp_widths"
#: Types that the model class serves. Gemma's norms, embeddings and soft caps are others.
SERVED = ("llama", "mistral", "qwen2", "qwen3")


def register_small() -> None:
    """Let vLLM read and build smaller models, unless it does."""
    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    MODELS_CONFIG_MAP[ARCHITECTURE] = TensorParallel
    ModelRegistry.register_model(ARCHITECTURE, "msp_plugin.serving.vllm.small:SmallForCausalLM")
    parse = HFConfigParser.parse

    @functools.wraps(parse)
    def parse_small(self: HFConfigParser, model: Any, *args: Any, **kwargs: Any) -> Any:
        raw, config = parse(self, model, *args, **kwargs)
        return raw, served_config(raw, config, str(model))

    HFConfigParser.parse = parse_small


def served_config(raw: dict[str, Any], config: PreTrainedConfig, source: str) -> PreTrainedConfig:
    """Return the config that vLLM builds a model by: of a smaller model one with ``WIDTHS``, else the given one.

    Args:
        raw: the contents of config.json.
        config: the same, as transformers reads it.
        source: its directory or hub id, for errors.

    Raises:
        FormatError: the record of widths is damaged.
        ServingError: no model class serves smaller models of this type.
    """
    widths = read_widths(raw, source)
    if widths is None:
        return config
    if raw["model_type"] not in SERVED:
        raise ServingError(
            f"{source} is a smaller {raw['model_type']}; vLLM serves smaller models of the types {', '.join(SERVED)}",
            hint="msp export --to uniform where all blocks are equally wide, or serve the model with zeros",
        )
    usual = global_widths(raw)
    own = plain_config(raw)
    own.head_dim = raw.get("head_dim") or raw["hidden_size"] // usual.heads
    own.architectures = [ARCHITECTURE]
    # vLLM divides these by the tensor parallel size; heads that every block lost would stand in the way
    own.num_attention_heads = max(of_block.heads for of_block in widths)
    own.num_key_value_heads = max(of_block.kv_heads for of_block in widths)
    setattr(own, WIDTHS, [astuple(of_block) for of_block in widths])
    return own


def widths_of(config: PreTrainedConfig) -> list[Widths]:
    """Return the widths of each block of a served config."""
    return [Widths(*of_block) for of_block in getattr(config, WIDTHS)]


class TensorParallel(VerifyAndUpdateConfig):
    """Refuses processes that heads or channels of a block cannot be shared out to; vLLM asks it before it starts any."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raise ServingError unless every block's heads and channels can be shared out to the processes.

        KV heads may also be fewer than processes, if each stands whole in as many of them.
        """
        processes = vllm_config.parallel_config.tensor_parallel_size
        for block, own in enumerate(widths_of(vllm_config.model_config.hf_config)):
            shared = processes % own.kv_heads if 0 < own.kv_heads < processes else own.kv_heads % processes
            for count, uneven, kind in (
                (own.kv_heads, shared, "KV heads"),
                (own.heads, own.heads % processes, "query heads"),
                (own.channels, own.channels % processes, "channels"),
            ):
                if uneven:
                    raise ServingError(
                        f"block {block} has {count} {kind}, which {processes} tensor parallel processes cannot share",
                        hint=f"choose another tensor parallel size; see {KEY} in config.json for the widths of each block",
                    )
