"""llm-compressor: the modifier that lives in its recipes, and the driver of its methods."""

from __future__ import annotations

import importlib.util

from msp_plugin.errors import HostError


def require_host() -> None:
    """Raise unless llm-compressor is installed.

    Raises:
        HostError: it is not; the extra that brings it is named.
    """
    if importlib.util.find_spec("llmcompressor") is None:
        raise HostError("llm-compressor is not installed", hint="pip install 'msp_plugin[llmcompressor]'")
