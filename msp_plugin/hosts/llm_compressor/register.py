"""Make the modifiers known to llm-compressor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msp_plugin.hosts.llm_compressor import require_host

if TYPE_CHECKING:
    from msp_plugin.hosts.llm_compressor.modifier import MixedSparsityModifier


def register_modifier() -> type[MixedSparsityModifier]:
    """Make our modifiers known to llm-compressor's recipes and return ``MixedSparsityModifier``.

    Raises:
        HostError: llm-compressor is not installed.
    """
    require_host()
    from llmcompressor.modifiers.factory import ModifierFactory

    from msp_plugin.hosts.llm_compressor.modifier import MixedSparsityModifier
    from msp_plugin.hosts.llm_compressor.recovery import RecoveryModifier

    for modifier in (MixedSparsityModifier, RecoveryModifier):
        ModifierFactory.register(modifier.__name__, modifier)
    return MixedSparsityModifier
