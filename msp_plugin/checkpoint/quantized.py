"""Refuse to prune a model that is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from msp_plugin.checkpoint.packed_layers import packed_layers
from msp_plugin.errors import ModelError
from msp_plugin.formats.tensor_files import read_json
from msp_plugin.models.source import check_source, has_config
from msp_plugin.runtime.files import expanded

_HINT = (
    "prune the unquantized model, in bfloat16 or float16, and quantize the result: one recipe can do both, with a "
    "QuantizationModifier after the pruning"
)


def check_source_unquantized(
    source: str | Path, *, trust_remote_code: bool = False, hint: str = _HINT
) -> None:
    """Raise if the config of a directory or hub id says that its weights are quantized; no weight is read.

    Args:
        hint: the advice of the ModelError.

    Raises:
        ModelError: the weights are quantized, or there is no such model.
        FormatError: the config is damaged.
    """
    path = expanded(source)
    if has_config(path):
        config = read_json(path / "config.json")
    else:
        from transformers import AutoConfig

        check_source(source)
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).to_dict()
        except Exception as error:  # a config's values reach all of transformers
            raise ModelError(f"cannot read the config of {source}: {error}") from error
    if config.get("quantization_config") and packed_layers(config, str(source)) is None:
        raise ModelError(f"{source} is quantized ({_described(config['quantization_config'])})", hint=hint)


def check_unquantized(model: torch.nn.Module) -> None:
    """Raise if the weights of a loaded model are quantized.

    Raises:
        ModelError: the model was saved quantized, and not dequantized when it was loaded.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is not None and not isinstance(config, dict):
        config = {**vars(config), **config.to_dict()}
    if config and not config.get("dequantize"):
        raise ModelError(f"the model is quantized ({_described(config)})", hint=_HINT)


def _described(quantization: Any) -> str:
    """Return a few words on a quantization_config, e.g. "gptq, 4 bits"."""
    if not isinstance(quantization, dict):
        return "in an unknown form"
    bits = quantization.get("bits") or next((n for n in (4, 8) if quantization.get(f"load_in_{n}bit")), None)
    method = getattr(quantization.get("quant_method"), "value", quantization.get("quant_method"))
    parts = [method or "in an unknown form", quantization.get("format"), bits and f"{bits} bits"]
    return ", ".join(str(part) for part in parts if part)
