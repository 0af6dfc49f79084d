"""The tokenizer of a checkpoint whose architecture changes: transformers chooses its class by the model's type too."""

from __future__ import annotations

from pathlib import Path

from msp_plugin.errors import FormatError, ModelError
from msp_plugin.models.source import load_tokenizer

#: What tokenizers of one vocabulary split differently: digits, spaces, lines, accents, other scripts.
PROBE = "def f(x):\n    return  x+12345\n\tCafé, naïve; it's 3.14 — 東京 привет 🙂 e\u0301"
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def same_tokens(first: Path, second: Path) -> bool | None:
    """Return True if the tokenizers of two checkpoints write a text in the same tokens.

    None if one has none, or one that needs code of its own.
    """
    if not all(any((path / name).is_file() for name in _FILES) for path in (first, second)):
        return None
    try:
        ids = [load_tokenizer(path)(PROBE, verbose=False).input_ids for path in (first, second)]
    except ModelError:
        return None
    return bool(ids[0] == ids[1])


def keep_tokenizer(source: Path, directory: Path) -> None:
    """Write the tokenizer as transformers builds it for the source, where the copied files mean another one now.

    Raises:
        FormatError: what is written means another one as well.
    """
    if same_tokens(source, directory) is not False:
        return
    load_tokenizer(source).save_pretrained(directory)
    if not same_tokens(source, directory):
        raise FormatError(
            f"with the config of the smaller model, transformers reads another tokenizer than that of {source}",
            hint="write it with msp export --to small",
        )
