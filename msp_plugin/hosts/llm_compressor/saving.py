"""Names under which the experts that llm-compressor has split are saved.

llm-compressor splits fused experts into linears,
whose names it leaves to those rules, which do not know them.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import (
    MergeModulelist,
    WeightRenaming,
)

from msp_plugin.checkpoint.saved_names import weight_conversions
from msp_plugin.errors import ModelError

#: The linears that llm-compressor makes of one expert's two matrices that transformers puts into one.
_GATE_UP = ("gate_proj", "up_proj")
#: How the name of a linear of an expert looks among the names that transformers maps.
_SPLIT = r"experts.\1."


def name_experts(model: PreTrainedModel) -> None:
    """Let the experts that llm-compressor has split be saved under the names from which transformers loads them.

    Raises:
        ModelError: transformers loads the experts of this architecture only in one piece.
    """
    from llmcompressor.modeling.moe.linearize import get_linearized_moes

    if not get_linearized_moes(model):
        return
    conversions = weight_conversions(model)
    if any(_SPLIT in target for c in conversions for target in c.target_patterns):
        return  # the model was loaded with split experts
    split = [_of_experts(conversion) for conversion in conversions]
    if not any(split):
        raise ModelError(
            f"{type(model).__name__} stores its experts fused; llm-compressor splits them and would save a "
            "checkpoint that transformers cannot load",
            hint="prune a model whose checkpoint holds each expert's matrices one by one, such as Mixtral or Qwen3-MoE",
        )
    model._weight_conversions = [
        one for own, parts in zip(conversions, split, strict=True) for one in (parts or [own])
    ]


def _of_experts(conversion: Any) -> list[WeightRenaming]:
    """Return how a conversion's experts are renamed where they stay apart; empty if it is not of experts."""
    operations = getattr(conversion, "operations", ())
    if not any(isinstance(operation, MergeModulelist) for operation in operations):
        return []
    sources, (target,) = conversion._original_source_patterns, conversion._original_target_patterns
    leaves = _GATE_UP if len(sources) == 2 else (target.rpartition(".")[2],)
    found = []
    for source, leaf in zip(sources, leaves, strict=True):
        parent, _, stored = source.removesuffix(".weight").partition("*")
        one = WeightRenaming(rf"{re.escape(parent)}(\d+){re.escape(stored)}\.", rf"{parent}\1.{leaf}.")
        one.scope_prefix, one.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
        found.append(one)
    return found
