"""The vLLM plugin: packed checkpoints (sparse24, bitmask), and dense ones packed for 2:4 kernels at load time.

vLLM finds ``register`` under the entry-point group ``vllm.general_plugins`` and calls it in every process of
a server. A ``VLLM_PLUGINS`` without ``msp_sparse24`` leaves it out; vLLM then refuses packed checkpoints.
"""

from __future__ import annotations


def register() -> None:
    """Make the quantization methods ``sparse24`` and ``bitmask`` known to vLLM; calling it again changes nothing."""
    from msp_plugin.serving.vllm.config import register_configs

    register_configs()
