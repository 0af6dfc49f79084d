"""llm-compressor: the modifier that lives in its recipes, and the driver of its methods."""

from __future__ import annotations

import importlib.util

from msp_plugin.errors import HostError

#: Arguments that llm-compressor itself gives to every modifier, beside our options.
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
        HostError: it is not; the extra that brings it is named.
    """
    if importlib.util.find_spec("llmcompressor") is None:
        raise HostError("llm-compressor is not installed", hint="pip install 'msp_plugin[llmcompressor]'")
