"""The vLLM plugin: packed checkpoints (sparse24, bitmask), dense ones packed at load time, and smaller models.

vLLM finds ``register`` under the entry-point group ``vllm.general_plugins`` and calls it in every process of
a server. A ``VLLM_PLUGINS`` without ``msp_sparse24`` leaves it out; vLLM then refuses packed checkpoints and smaller models.
"""

from __future__ import annotations


def register() -> None:
    """Make the methods of packed checkpoints and smaller models known to vLLM; again, it changes nothing."""
    from msp_plugin.serving.vllm.config import register_configs
    from msp_plugin.serving.vllm.small_config import register_small

    register_configs()
    register_small()
