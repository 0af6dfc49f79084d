"""The vLLM plugin: 2:4 sparse checkpoints, and dense ones packed at load time.

vLLM finds ``register`` under the entry-point group ``vllm.general_plugins`` and calls it in every process of
a server. A ``VLLM_PLUGINS`` without ``msp_sparse24`` leaves it out; vLLM then refuses packed checkpoints.
"""

from __future__ import annotations


def register() -> None:
    """Make the quantization method ``sparse24`` known to vLLM; calling it again changes nothing."""
    from msp_plugin.serving.vllm.config import NAME, register_config

    register_config(NAME)
