"""Mixed sparsity for LLMs: search how sparse each layer may be, prune it so, prove it.

``from msp_plugin import MixedSparsityModifier`` makes the modifier known to llm-compressor, from
Python and from YAML. ``load`` gives a ready model from a checkpoint of either form. ``hookimpl`` marks the functions of a plugin. Importing this package imports
neither torch nor a host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["MixedSparsityModifier", "LayerwisePruner", "hookimpl", "load"]

if TYPE_CHECKING:
    from msp_plugin.checkpoint.load import load
    from msp_plugin.hosts.llm_compressor.modifier import MixedSparsityModifier
    from msp_plugin.plugins.hookspecs import hookimpl
    from msp_plugin.pruning.base import LayerwisePruner


def __getattr__(name: str):
    if name == "MixedSparsityModifier":
        from msp_plugin.hosts.llm_compressor import register_modifier

        return register_modifier()
    if name == "LayerwisePruner":
        from msp_plugin.pruning.base import LayerwisePruner

        return LayerwisePruner
    if name == "hookimpl":
        from msp_plugin.plugins.hookspecs import hookimpl

        return hookimpl
    if name == "load":
        from msp_plugin.checkpoint.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
