"""vLLM's view of a sparse24 checkpoint: which linears are packed, and what serves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from msp_plugin.checkpoint.checkpoint import Checkpoint, packed_layers
from msp_plugin.errors import FormatError, ServingError
from msp_plugin.formats.sparse24 import FORMAT
from msp_plugin.serving.kernels import Found
from msp_plugin.serving.vllm.linear import PackAtLoadMethod, PackedMethod
from msp_plugin.serving.vllm.report import Report

#: The name of the quantization method, also for ``vllm serve DIR --quantization sparse24``.
NAME = "sparse24"


class Sparse24Config(QuantizationConfig):
    """A checkpoint whose linears are 2:4, some or all of them.

    Args:
        targets: checkpoint names of the packed layers; None for a dense checkpoint, whose 2:4 layers are packed
            when they are loaded.
    """

    def __init__(self, targets: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.targets = None if targets is None else frozenset(targets)
        self.report = Report()
        self.algorithms: Found = {}

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # a device without 2:4 kernels is served dense

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Sparse24Config:
        """Return the config of a packed checkpoint.

        Raises:
            FormatError: the sparsity_config is in a form that is not read.
        """
        targets = packed_layers({"quantization_config": config}, "config.json")
        if not targets:
            raise FormatError("config.json names no packed layers", hint="export the model anew")
        return cls(targets)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim what vLLM itself refuses: unquantized ``sparse-24-bitmask`` checkpoints."""
        sparsity = hf_quant_cfg.get("sparsity_config")
        claimed = (
            hf_quant_cfg.get("quant_method") == "compressed-tensors"
            and isinstance(sparsity, Mapping)
            and sparsity.get("format") == FORMAT
            and not hf_quant_cfg.get("config_groups")
        )
        return NAME if claimed else None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Check a local checkpoint's headers before anything is loaded.

        vLLM itself does not miss tensors of a checkpoint with a quantization method.

        Raises:
            FormatError: config and tensors contradict each other, or a tensor of the export is missing.
        """
        path = Path(model_name)
        if self.targets is None or not (path / "config.json").is_file():
            return
        checkpoint = Checkpoint.open(path)
        manifest = checkpoint.manifest
        lost = [name for name in manifest.tensors if name not in checkpoint.tensors] if manifest else []
        if lost:
            raise FormatError(
                f"{path} lacks {len(lost)} tensors of its export, e.g. {lost[0]}",
                hint="copy the directory anew",
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        if self.targets is not None:
            self.targets = frozenset(hf_to_vllm_mapper.apply_list(sorted(self.targets)))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return a method for every linear, None for all else (embeddings, the output head, attention, experts).

        Raises:
            ServingError: the checkpoint holds experts packed.
        """
        if not isinstance(layer, LinearBase):
            self._check_experts(layer, prefix)
            return None
        shards = self._shards(prefix)
        self.report.expect(prefix)
        if self.targets is None:
            return PackAtLoadMethod(self.report, self.algorithms, prefix, shards)
        packed = tuple(name in self.targets for name in shards)
        return PackedMethod(self.report, self.algorithms, prefix, shards, packed)

    def _check_experts(self, layer: torch.nn.Module, prefix: str) -> None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        inside = [name for name in self.targets or () if name.startswith(f"{prefix}.")]
        if isinstance(layer, RoutedExperts) and inside:
            raise ServingError(
                f"{prefix}: the checkpoint holds {len(inside)} linears of its experts packed, e.g. {min(inside)}",
                hint="experts are served dense: export the model to dense",
            )

    def _shards(self, prefix: str) -> tuple[str, ...]:
        """Return the checkpoint's layers that vLLM loads into one linear."""
        parent, dot, leaf = prefix.rpartition(".")
        return tuple(parent + dot + part for part in self.packed_modules_mapping.get(leaf, [leaf]))


def register_config(name: str) -> None:
    """Register the config with vLLM unless it is."""
    if name not in QUANTIZATION_METHODS:
        register_quantization_config(name)(Sparse24Config)
