"""llm-compressor as a host: our modifier in its recipes, and its modifiers for our levels."""

from __future__ import annotations

import importlib.util

from msp_plugin.errors import HostError

#: Arguments that llm-compressor gives to every modifier, beside our options.
HOST_KEYS = frozenset(
    {
        "index",
        "group",
        "start",
        "end",
        "update",
        "initialized_",
        "finalized_",
        "started_",
        "ended_",
        "requires_calibration_data",
    }
)


def require_host() -> None:
    """Raise unless llm-compressor is installed.

    Raises:
        HostError: it is not; the hint names the extra that installs it.
    """
    if importlib.util.find_spec("llmcompressor") is None:
        raise HostError("llm-compressor is not installed", hint="pip install 'msp_plugin[llmcompressor]'")
