"""Find the names of a model's layers in its files: transformers may rename or reshape tensors when it saves them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key

from msp_plugin.errors import ModelError


def saved_names(model: PreTrainedModel, layers: Iterable[str]) -> dict[str, str]:
    """Return the name in ``save_pretrained``'s files of each layer whose name changes there.

    Raises:
        ModelError: a layer is saved as part of another tensor, or reshaped.
    """
    undone = [conversion.reverse_transform() for conversion in reversed(weight_conversions(model))]
    renamings = [conversion for conversion in undone if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in undone if isinstance(conversion, WeightConverter)]
    names = {}
    for layer in layers:
        name, converter = rename_source_key(f"{layer}.weight", renamings, converters, reverse=True)
        if converter is not None or not name.endswith(".weight"):
            raise ModelError(
                f"transformers stores {layer} of {type(model).__name__} in another shape or with other "
                "layers in one tensor, in which its zeros could not be checked",
                hint="add it to ignore",
            )
        names[layer] = name.removesuffix(".weight")
    return {layer: name for layer, name in names.items() if name != layer}


def weight_conversions(model: PreTrainedModel) -> list[Any]:
    """Return the conversions that transformers undoes when it saves a model (revert_weight_conversion)."""
    applied: list[Any] | None = getattr(model, "_weight_conversions", None)
    if applied is not None:
        return applied
    known = get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in known if not isinstance(conversion, PrefixChange)]
