"""The embedded demo: two small trained models and a corpus that every machine with Python has."""

from __future__ import annotations

from pathlib import Path

DEMO_MODELS = ("llama", "qwen2")


def demo_model_path(name: str = "llama") -> Path:
    """Return the directory of an embedded model, ``"llama"`` or ``"qwen2"``."""
    return Path(__file__).parent / name
