"""How each linear is served: one log line, and a file for ``msp verify``."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

log = logging.getLogger("vllm.msp_plugin")

#: The environment variable that names the file, one JSON line per layer and process.
REPORT = "MSP_SERVING_REPORT"
#: Our entry in vLLM's ``additional_config``.
KEY = "msp_plugin_sparse24"


@dataclass(frozen=True)
class LayerReport:
    """One linear as vLLM runs it.

    Args:
        layer: vLLM's name.
        packed: the checkpoint's layers in it that are stored packed or were packed at load time.
        kernel: ``cusparselt``, ``cutlass`` or ``dense``.
        reason: why it is dense, or empty.
        bytes: of the weight as it is kept for serving.
        dense_bytes: of the same weight dense.
        rank: of the process in its tensor parallel group.
        failed: True if it is dense because its sparse kernel failed or was wrong.
    """

    layer: str
    packed: tuple[str, ...]
    kernel: str
    reason: str
    bytes: int
    dense_bytes: int
    rank: int
    failed: bool = False


class Report:
    """Collects the layers of one model and logs once, when the last of them is ready.

    Args:
        name: of the quantization method, with which the log line begins.
    """

    def __init__(self, name: str = "sparse24") -> None:
        self.name = name
        self._expected: set[str] = set()
        self._layers: dict[str, LayerReport] = {}

    def expect(self, layer: str) -> None:
        """Note a linear that will be reported."""
        self._expected.add(layer)

    def add(self, layer: LayerReport) -> None:
        """Report a linear that is ready; after the last one, log all of them."""
        self._layers[layer.layer] = layer
        path = os.environ.get(REPORT)
        if path:
            # One short write for each layer: lines of several processes do not mix.
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(layer)) + "\n")
        self._enter_compile_key()  # not only at the end: vLLM may load some layers of a model alone
        if self._layers.keys() >= self._expected:
            log.info("%s", self.line())
            self._layers = {}  # a reload reports every layer again

    def _enter_compile_key(self) -> None:
        """Make the key of vLLM's compile cache depend on which kernel serves which layer.

        Compiled graphs hold the kernel of each layer as a constant, but vLLM's key covers the model's path
        and config only: the same path with other weights would find a graph for other kernels.
        """
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        if config is None or not isinstance(config.additional_config, dict):
            return
        chosen = json.dumps(sorted((layer.layer, layer.kernel) for layer in self._layers.values()))
        config.additional_config[KEY] = hashlib.sha256(chosen.encode()).hexdigest()

    def line(self) -> str:
        """Return the log line: layers and bytes by kernel, and which layers are dense and why."""
        layers = self._layers.values()
        kernels = Counter(layer.kernel for layer in layers)
        stored, dense = sum(a.bytes for a in layers), sum(a.dense_bytes for a in layers)
        counts = ", ".join(f"{n} on {kernel}" for kernel, n in sorted(kernels.items()))
        reasons: dict[str, list[str]] = {}
        for layer in layers:
            if layer.kernel == "dense":
                reasons.setdefault(layer.reason, []).append(layer.layer)
        why = "; ".join(
            f"dense because {reason}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''} ({len(names)})"
            for reason, names in sorted(reasons.items())
        )
        ratio = stored / dense if dense else 1
        return f"{self.name}: {counts}; {stored:,} bytes, {ratio:.3f} of dense" + (f"; {why}" if why else "")
