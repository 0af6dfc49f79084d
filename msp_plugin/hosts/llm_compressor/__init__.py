"""llm-compressor: the modifier that lives in its recipes, and the driver of its methods."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from msp_plugin.errors import HostError

if TYPE_CHECKING:
    from msp_plugin.hosts.llm_compressor.modifier import MixedSparsityModifier


def require_host() -> None:
    """Raise unless llm-compressor is installed.

    Raises:
        HostError: it is not; the extra that brings it is named.
    """
    if importlib.util.find_spec("llmcompressor") is None:
        raise HostError("llm-compressor is not installed", hint="pip install 'msp_plugin[llmcompressor]'")


def register_modifier() -> type[MixedSparsityModifier]:
    """Make ``MixedSparsityModifier`` known to llm-compressor's recipes and return it.

    Raises:
        HostError: llm-compressor is not installed.
    """
    require_host()
    from llmcompressor.modifiers.factory import ModifierFactory

    from msp_plugin.hosts.llm_compressor.modifier import MixedSparsityModifier

    ModifierFactory.register(MixedSparsityModifier.__name__, MixedSparsityModifier)
    return MixedSparsityModifier
