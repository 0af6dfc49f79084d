"""Check a model's directory or hub id, read its config and load its tokenizer, without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from msp_plugin.errors import ModelError, RecipeError, nearest, shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")
#: Names that model families give the longest sequence in their configs.
POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_seq_length",
    "n_ctx",
    "seq_length",
)


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the transformers class that loads a model: for images and text if config.json names such a class.

    Some models have both classes, e.g. Llama 4; the one for text would leave the vision tower out.
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
    known: dict[str, torch.dtype | None]
    known = {
        "auto": None,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    return known[dtype]


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


def has_config(path: Path) -> bool:
    """Return True if a model's directory is at a path.

    Raises:
        ModelError: one may not look there, or it cannot be a path.
    """
    try:
        return (path / "config.json").is_file()
    except OSError as error:
        raise ModelError(
            f"cannot read the model at {shown(str(path))}: {error.strerror}",
            hint="give a model's directory that you may read, or a hub id",
        ) from None


def check_source(source: str | Path) -> None:
    """Raise if a source is a path without a model, before it is taken for a hub id.

    Raises:
        ModelError: the directory does not exist, or has no config.json.
    """
    path = Path(source)
    if path.is_dir():
        if not has_config(path):
            raise ModelError(f"{path} has no config.json", hint="give a model's directory or a hub id")
    elif path.exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise ModelError(
            f"there is no model directory at {source}", hint="give a model's directory or a hub id"
        )


def max_length(source: str | Path, *, trust_remote_code: bool = False) -> int | None:
    """Return the longest sequence, in tokens, that a model allows; None if its config does not say."""
    return _first_count(source, POSITIONS, trust_remote_code)


def vocabulary(source: str | Path, *, trust_remote_code: bool = False) -> int | None:
    """Return the number of tokens that a model has embeddings for; None if its config does not say."""
    return _first_count(source, ("vocab_size",), trust_remote_code)


def _first_count(source: str | Path, keys: Sequence[str], trust_remote_code: bool) -> int | None:
    """Return the value of the first key that a model's config has, None if it has none of them.

    Raises:
        ModelError: the config cannot be read, or the value is not a positive integer.
    """
    from transformers import AutoConfig

    check_source(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).get_text_config()
        values = {key: getattr(config, key, None) for key in keys}
    except Exception as error:  # a config's values reach all of transformers
        raise ModelError(f"cannot read the config of {source}: {error}") from error
    for key, value in values.items():
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if value is not None:
            raise ModelError(f"{source}: {key} is {shown(value)}, expected a positive integer")
    return None
