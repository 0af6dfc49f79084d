"""The vLLM configs of packed checkpoints: which linears are packed, and which method serves each."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.packed_layers import packed_layers
from msp_plugin.errors import FormatError, ServingError
from msp_plugin.formats.base import PackedFormat
from msp_plugin.formats.bitmask import SparseBitmask
from msp_plugin.formats.bitmask_int8 import Int8Bitmask
from msp_plugin.formats.sparse24 import Sparse24Bitmask
from msp_plugin.runtime.digests import digest
from msp_plugin.serving.algorithms import FoundAlgorithms
from msp_plugin.serving.vllm.bitmask import BitmaskMethod
from msp_plugin.serving.vllm.bitmask_int8 import Int8BitmaskMethod
from msp_plugin.serving.vllm.linear import PackAtLoadMethod, PackedMethod, Sparse24LinearMethod
from msp_plugin.serving.vllm.report import Report

#: Environment variables: set by the user to leave out the checksums; set here for the processes that this one
#: starts.
_SKIP, _CHECKED = "MSP_SKIP_CHECKSUMS", "_MSP_CHECKED"
#: By model type, what the names of the layers have in them whose dense weights vLLM rearranges while it loads them.
_REARRANGED = {"bloom": "query_key_value", "falcon": "query_key_value", "gpt2": ""}
#: The name of the quantization method, also for ``vllm serve DIR --quantization sparse24``.
NAME = "sparse24"


def _has_one_group(hf_config: Any) -> bool:
    """Return True if a Falcon's queries share one key and value; then their rows are in vLLM's order already."""
    return bool(hf_config.multi_query) and not hf_config.new_decoder_architecture


def _state_of(path: Path) -> str:
    """Return what changes with a checkpoint's files: its directory, and size and time of each file."""
    files = sorted((file.name, file.stat()) for file in path.iterdir() if file.is_file())
    return digest([str(path.resolve()), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]])


class Sparse24Config(QuantizationConfig):
    """A checkpoint whose linears are 2:4, some or all of them.

    Attributes:
        name: of the quantization method.
        format: the one that it serves; plugins may add others, which only ``msp_plugin.load`` reads.
        method: serves the linears of a packed checkpoint.

    Args:
        targets: checkpoint names of the packed layers; None for a dense checkpoint, whose 2:4 layers are
            packed when they are loaded.
    """

    name: ClassVar[str] = NAME
    format: ClassVar[PackedFormat] = Sparse24Bitmask()
    method: ClassVar[type[Sparse24LinearMethod]] = PackedMethod

    def __init__(self, targets: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.targets = None if targets is None else frozenset(targets)
        self.report = Report(self.name)
        self.algorithms: FoundAlgorithms = {}

    @classmethod
    def get_name(cls) -> str:
        return cls.name

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
        packed = packed_layers({"quantization_config": config}, "config.json", (cls.format,))
        if packed is None:
            raise FormatError("config.json names no packed layers", hint="export the model anew")
        return cls(packed.layers)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Return our name for unquantized checkpoints in our format, None for all others."""
        claimed = (
            hf_quant_cfg.get("quant_method") == "compressed-tensors"
            and cls.format.recognises(hf_quant_cfg)
            and not hf_quant_cfg.get("config_groups")
        )
        return cls.name if claimed else None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Check a local checkpoint before anything is loaded: headers, and the checksums of its export.

        The checksums are looked at once, not again in the processes that this one starts;
        ``MSP_SKIP_CHECKSUMS=1`` leaves them out.

        Raises:
            FormatError: config and tensors contradict each other, or a file is not what was exported.
            ServingError: vLLM would rearrange packed tensors.
        """
        self._check_arrangement(hf_config)
        path = Path(model_name)
        if self.targets is None or not (path / "config.json").is_file():
            return
        checkpoint, done = Checkpoint.open(path, (self.format,)), _state_of(path)
        if os.environ.get(_SKIP, "") in ("", "0") and os.environ.get(_CHECKED) != done:
            checkpoint.check_files()
            os.environ[_CHECKED] = done

    def _check_arrangement(self, hf_config: Any) -> None:
        """Raise ServingError if vLLM's own code rearranges packed tensors as it loads them, as if they were dense."""
        family = getattr(hf_config, "model_type", None)
        leaf = _REARRANGED.get(str(family))
        if leaf is None or (family == "falcon" and (self.name == NAME or _has_one_group(hf_config))):
            return
        if layers := sorted(layer for layer in self.targets or () if leaf in layer):
            raise ServingError(
                f"vLLM rearranges the rows or columns of {layers[0]} while it loads a {family}, and it is packed",
                hint="serve the dense form: msp export DIR --to dense (2:4 layers: with --quantization sparse24)",
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        if self.targets is not None:
            self.targets = frozenset(hf_to_vllm_mapper.apply_list(sorted(self.targets)))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return a method for linears, None for all else (embeddings, the output head, attention, experts).

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
        return self.method(self.report, self.algorithms, prefix, shards, packed)

    def _check_experts(self, layer: torch.nn.Module, prefix: str) -> None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        inside = [name for name in self.targets or () if name.startswith(f"{prefix}.")]
        if isinstance(layer, RoutedExperts) and inside:
            raise ServingError(
                f"{prefix}: the checkpoint holds {len(inside)} linears of its experts packed, "
                f"e.g. {min(inside)}",
                hint="experts are served dense: export the model to dense",
            )

    def _shards(self, prefix: str) -> tuple[str, ...]:
        """Return the names of the checkpoint's layers that vLLM loads into one linear."""
        parent, dot, leaf = prefix.rpartition(".")
        return tuple(parent + dot + part for part in self.packed_modules_mapping.get(leaf, [leaf]))


class BitmaskConfig(Sparse24Config):
    """A checkpoint whose linears are packed at any level, some or all of them."""

    name = "bitmask"
    format = SparseBitmask()
    method = BitmaskMethod


class Int8BitmaskConfig(Sparse24Config):
    """A checkpoint whose linears are packed at any level with values in int8, some or all of them."""

    name = "bitmask_int8"
    format = Int8Bitmask()
    method = Int8BitmaskMethod


def register_configs() -> None:
    """Register the configs with vLLM, unless they are."""
    configs = {config.name: config for config in (Sparse24Config, BitmaskConfig, Int8BitmaskConfig)}
    new = [name for name in configs if name not in QUANTIZATION_METHODS]
    for name in new:
        register_quantization_config(name)(configs[name])
    if new:
        _track_weights(new)


def _track_weights(names: Sequence[str]) -> None:
    """Let vLLM report missing tensors of our models (norms, embeddings), as it does for unquantized ones.

    By default its loader tracks tensors only where no quantization method is set, and a method cannot change
    that. A setting of the user in ``--model-loader-extra-config`` wins.
    """
    load = DefaultModelLoader.load_weights

    @functools.wraps(load)
    def load_weights(self: DefaultModelLoader, model: torch.nn.Module, model_config: Any) -> None:
        if model_config.quantization in names and self.enable_weights_track is None:
            self.enable_weights_track = True
        load(self, model, model_config)

    DefaultModelLoader.load_weights = load_weights
