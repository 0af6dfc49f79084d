"""Refuse, before the search, a model that llm-compressor's calibration by blocks cannot run."""

from __future__ import annotations

import torch

from msp_plugin.errors import ModelError
from msp_plugin.models.layers import text_config


def shares_keys(model: torch.nn.Module) -> bool:
    """Return True if later blocks read the keys and values of earlier ones, as in Gemma 3n and Gemma 4."""
    return bool(getattr(text_config(model), "num_kv_shared_layers", 0))


def check_by_block(model: torch.nn.Module) -> None:
    """Raise if llm-compressor's calibration cannot run the model block by block.

    Its pipeline hands only hidden states from block to block; each block gets a fresh copy of everything else.

    Raises:
        ModelError: later blocks read keys and values of earlier ones.
    """
    if shares_keys(model):
        raise ModelError(
            f"later blocks of {type(model).__name__} read keys and values of earlier ones, which llm-compressor's "
            "calibration by blocks loses",
            hint="prune it with `msp prune` or run_recipe, which calibrate such a model in one pass, or by "
            "method magnitude with the uniform allocator, which need no calibration",
        )
