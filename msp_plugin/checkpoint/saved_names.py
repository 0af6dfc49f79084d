"""Names under which transformers saves a model's layers: it renames and reshapes tensors between memory and files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key

from msp_plugin.errors import ModelError


def saved_names(model: PreTrainedModel, layers: Iterable[str]) -> dict[str, str]:
    """Return by layer its name in the files that ``save_pretrained`` writes, for layers that change theirs.

    Raises:
        ModelError: a layer is saved as a part of another tensor, or reshaped.
    """
    undone = [conversion.reverse_transform() for conversion in reversed(weight_conversions(model))]
    renamings = [one for one in undone if isinstance(one, WeightRenaming)]
    converters = [one for one in undone if isinstance(one, WeightConverter)]
    names = {}
    for layer in layers:
        name, converter = rename_source_key(f"{layer}.weight", renamings, converters, reverse=True)
        if converter is not None or not name.endswith(".weight"):
            raise ModelError(
                f"transformers stores {layer} of {type(model).__name__} in another shape or with other layers in one "
                "tensor, in which its zeros could not be checked",
                hint="add it to ignore",
            )
        names[layer] = name.removesuffix(".weight")
    return {layer: name for layer, name in names.items() if name != layer}


def weight_conversions(model: PreTrainedModel) -> list[Any]:
    """Return what transformers undoes when it saves a model, as its revert_weight_conversion finds it."""
    loaded = getattr(model, "_weight_conversions", None)
    if loaded is not None:
        return loaded
    known = get_model_conversion_mapping(model, add_legacy=False)
    return [one for one in known if not isinstance(one, PrefixChange)]
