"""The embedded demo: two small trained models and a corpus that every machine with Python has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from msp_plugin.errors import ModelError, nearest

if TYPE_CHECKING:
    from msp_plugin.data.samples import Text

#: `msp demo` prunes the first: its units differ more, so that a search gains more.
DEMO_MODELS = ("qwen2", "llama")


def demo_model_path(name: str = "qwen2") -> Path:
    """Return the directory of an embedded model, ``"qwen2"`` or ``"llama"``.

    Raises:
        ModelError: there is no embedded model of that name.
    """
    if name not in DEMO_MODELS:
        raise ModelError(f"there is no demo model {name!r}", hint=nearest(name, DEMO_MODELS))
    return Path(__file__).parent / name


def given_name(model: str | Path) -> str:
    """Return the name that commands take for a model: ``demo:NAME`` for an embedded one, else as it is."""
    path = Path(model)
    return f"demo:{path.name}" if path == Path(__file__).parent / path.name else str(model)


def demo_text() -> Text:
    """Return the text of the demo: separate library files for calibration, search and test."""
    from msp_plugin.data.samples import Text

    return Text(
        data="demo:calibration",
        search="demo:search",
        test="demo:test",
        samples=64,
        length=256,
        test_samples=128,
        batch=16,
    )
