"""The vLLM plugin: 2:4 sparse checkpoints, and dense ones packed at load time.

vLLM finds ``register`` under the entry-point group ``vllm.general_plugins`` and calls it in every process of a
server. ``VLLM_PLUGINS`` leaves it out; what vLLM says of a packed checkpoint then is in the README.
"""

from __future__ import annotations


def register() -> None:
    """Make the quantization method ``sparse24`` known to vLLM; calling it again changes nothing."""
    from msp_plugin.serving.vllm.config import NAME, register_config

    register_config(NAME)
