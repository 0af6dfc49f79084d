"""Save the experts that llm-compressor has split under the names that transformers loads.

transformers renames weights when it loads and saves a model. Its rules are for fused experts, and llm-compressor splits
those into linears, whose names the rules do not know.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import MergeModulelist, WeightRenaming

from msp_plugin.checkpoint.saved_names import weight_conversions
from msp_plugin.errors import ModelError

#: llm-compressor's names for the two matrices of an expert that transformers fuses into one.
_GATE_UP = ("gate_proj", "up_proj")
#: In transformers' rules, marks a target name of a split expert.
_SPLIT = r"experts.\1."


def name_experts(model: PreTrainedModel) -> None:
    """Make ``save_pretrained`` write the split experts of a model under the names that transformers loads.

    Raises:
        ModelError: transformers loads the experts of this architecture only fused.
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
    rules: Any = [one for own, parts in zip(conversions, split, strict=True) for one in (parts or [own])]
    model._weight_conversions = rules


def _of_experts(conversion: Any) -> list[WeightRenaming]:
    """Return a conversion's rules for split experts; empty for a conversion of other weights."""
    operations = getattr(conversion, "operations", ())
    if not any(isinstance(operation, MergeModulelist) for operation in operations):
        return []
    sources, (target,) = conversion._original_source_patterns, conversion._original_target_patterns
    leaves = _GATE_UP if len(sources) == 2 else (target.rpartition(".")[2],)
    renamings = []
    for source, leaf in zip(sources, leaves, strict=True):
        parent, _, stored = source.removesuffix(".weight").partition("*")
        one = WeightRenaming(rf"{re.escape(parent)}(\d+){re.escape(stored)}\.", rf"{parent}\1.{leaf}.")
        one.scope_prefix, one.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
        renamings.append(one)
    return renamings
