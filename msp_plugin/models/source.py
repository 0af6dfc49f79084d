"""A model's source: its config, its tokenizer, and what they say before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from msp_plugin.errors import FormatError, ModelError, RecipeError, nearest, shown
from msp_plugin.formats.tensor_files import TensorFiles, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")
#: Sizes of a config that become modules and memory before a tensor is looked at.
_SIZES = (
    "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "num_hidden_layers",
)  # fmt: skip
#: What the configs of model families call the longest sequence.
_POSITIONS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_seq_length", "n_ctx",
    "seq_length",
)  # fmt: skip
#: How much longer than the longest stored tensor a size may be: quantized weights hold eight or more in one number.
_PACKED = 32


def auto_class(config: PreTrainedConfig) -> Any:
    """Return transformers' class that loads a model: the one for images and text where config.json names such a model.

    A model may be known for both, e.g. Llama 4, and then the class for text alone would leave the vision tower out.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):  # the repository's own
        return AutoModelForCausalLM
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    named = whole in (config.architectures or ())
    if named or (whole is not None and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def check_dtype(dtype: str) -> torch.dtype | None:
    """Return the dtype of a name; None for ``auto``.

    Raises:
        RecipeError: an unknown dtype.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"dtype {dtype!r} is unknown", hint=nearest(dtype, DTYPES))
    return None if dtype == "auto" else getattr(torch, dtype)


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a directory or hub id.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    check_source(source)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises that type itself
        raise ModelError(f"cannot load a tokenizer from {source}: {error}") from error


def check_source(source: str | Path) -> None:
    """Fail early on a path that is not there, before a hub is asked for it, and on a config that lies.

    Raises:
        ModelError: there is no model, or a size in its config is none that its tensors could have.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json", hint="give a model's directory or a hub id")
        _check_sizes(path)
    elif path.exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise ModelError(
            f"there is no model directory at {source}", hint="give a model's directory or a hub id"
        )


def _check_sizes(path: Path) -> None:
    try:
        config = read_json(path / "config.json")
        tensors = TensorFiles(path) if any(path.glob("*.safetensors")) else {}
    except FormatError:  # whoever reads the damaged file says so
        return
    text = config.get("text_config")
    # Beside a text_config, sizes outside of it stand for nothing.
    part = text if isinstance(text, dict) else config
    longest = max((length for info in tensors.values() for length in info.shape), default=2**24)
    for key in _SIZES:
        most = _PACKED * longest if key != "num_hidden_layers" else len(tensors) or 2**14
        value = part.get(key)
        sizes = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= most for n in sizes):
            raise ModelError(
                f"{path / 'config.json'}: {key} = {shown(value)} is no size of the tensors beside it",
                hint="config.json is damaged or from another model",
            )


def max_length(source: str | Path, *, trust_remote_code: bool = False) -> int | None:
    """Return the longest sequence that a model's config allows, None if it does not say."""
    return _count_of(source, _POSITIONS, trust_remote_code)


def vocabulary(source: str | Path, *, trust_remote_code: bool = False) -> int | None:
    """Return how many tokens a model's config has embeddings for, None if it does not say."""
    return _count_of(source, ("vocab_size",), trust_remote_code)


def _count_of(source: str | Path, keys: Sequence[str], trust_remote_code: bool) -> int | None:
    """Return the first of the config's values that is there.

    Raises:
        ModelError: the config cannot be read, or the value is no count.
    """
    from transformers import AutoConfig

    check_source(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).get_text_config()
        found = {key: getattr(config, key, None) for key in keys}
    except Exception as error:  # a config's values reach all of transformers
        raise ModelError(f"cannot read the config of {source}: {error}") from error
    key, value = next(((k, v) for k, v in found.items() if v is not None), (None, None))
    if key is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ModelError(f"{source}: {key} is {shown(value)}, no count")
    return value
