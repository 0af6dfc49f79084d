"""Make the modifier known to llm-compressor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msp_plugin.hosts.llm_compressor import require_host

if TYPE_CHECKING:
    from msp_plugin.hosts.llm_compressor.modifier import MixedSparsityModifier


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
