"""Formats of packed weights: the class through which exports, checkpoints, checks and reports use them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from msp_plugin.errors import FormatError, shown

if TYPE_CHECKING:
    from msp_plugin.plan.levels import Level

#: The version of compressed-tensors whose ``sparsity_config`` is written.
CONFIG_VERSION = "0.13.0"
#: The suffix of the small tensor that holds a weight's shape. Byte counts of packed weights exclude it.
SHAPE = "shape"


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a file says about one tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PackedFormat(ABC):
    """A way to store pruned weights in fewer bytes; a plugin adds one with ``msp_register_formats``.

    A checkpoint uses one format. Its config names the packed layers one by one; instead of ``<layer>.weight``
    it holds the tensors ``<layer>.<suffix>`` for each suffix of the format. Reading must not depend on options of
    the format: checkpoints are read with ``cls()``.

    Attributes:
        name: ``format`` in the ``sparsity_config`` of a checkpoint's config.json.
        structure: ``sparsity_structure`` beside it, e.g. ``2:4`` or ``unstructured``.
        least_sparsity: ``global_sparsity`` beside it; every packed weight has at least this share of zeros.
        suffixes: of the tensors that stand for a weight, in the order in which they are stored.
        own_suffixes: the suffixes that no dense model uses. A tensor with one of them whose layer is not in the
            config shows that config and tensors are from different checkpoints.
        description: what is stored for a weight, in a few words.
        fused_together: True if layers that inference fuses must be packed either all or not at all.
        served: True if the vLLM plugin serves the format.
        lossy: True if ``unpack`` gives other weights than were packed. ``refuses_weight`` is then asked for every layer,
            and ``unpack`` gives weights in the dtype of the tensors with floating-point numbers.
    """

    name: ClassVar[str]
    structure: ClassVar[str]
    least_sparsity: ClassVar[float] = 0.0
    suffixes: ClassVar[tuple[str, ...]]
    own_suffixes: ClassVar[tuple[str, ...]] = ()
    description: ClassVar[str]
    fused_together: ClassVar[bool] = True
    served: ClassVar[bool] = False
    lossy: ClassVar[bool] = False

    @abstractmethod
    def refuses(
        self, layer: str, shape: tuple[int, ...], dtype: torch.dtype, level: Level | None
    ) -> str | None:
        """Return the reason why a layer cannot be packed, by its name, shape [out, in], dtype and level, or None.

        Args:
            level: None without an allocation; then ``refuses_weight`` is asked too.
        """

    @abstractmethod
    def refuses_weight(self, weight: torch.Tensor) -> str | None:
        """Return the reason why a weight [out, in] cannot be packed, by its zeros, or None."""

    @abstractmethod
    def sizes(self, shape: tuple[int, int], dtype: torch.dtype, kept: int) -> dict[str, int]:
        """Return by suffix the bytes of the tensor, for a weight of ``shape`` [out, in] with ``kept`` nonzeros."""

    @abstractmethod
    def pack(self, weight: torch.Tensor, layer: str) -> dict[str, torch.Tensor]:
        """Return the tensors by suffix; ``unpack`` gives the same bits back, unless the format is ``lossy``.

        Args:
            weight: [out, in], on any device.
            layer: its name, for errors.

        Raises:
            FormatError: the weight does not fit, or has a negative zero that cannot be stored. The caller then
                tries again with positive zeros.
        """

    @abstractmethod
    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor:
        """Return the weight [out, in] from its tensors by suffix.

        Raises:
            FormatError: the tensors contradict each other.
        """

    @abstractmethod
    def header(self, stored: Mapping[str, TensorInfo], layer: str) -> TensorInfo:
        """Return the header of the dense weight, from the headers of its tensors by suffix.

        Raises:
            FormatError: the headers do not fit a packed weight.
        """

    def config(self, packed: Sequence[str], dense: Sequence[str]) -> dict[str, Any]:
        """Return a checkpoint's ``quantization_config``, as compressed-tensors 0.13 and vLLM 0.18.1 read it.

        Layers are named one by one: with ``targets: ["Linear"]`` vLLM 0.18.1 treats dense layers as packed.
        Any further key beside ``sparsity_config`` makes compressed-tensors 0.13 demand ``config_groups``.

        Args:
            packed: the layers that are packed.
            dense: all other matrices.
        """
        return {
            "quant_method": "compressed-tensors",
            "version": CONFIG_VERSION,
            "sparsity_config": {
                "format": self.name,
                "sparsity_structure": self.structure,
                "global_sparsity": self.least_sparsity,
                "registry_requires_subclass": False,
                "targets": list(packed),
                "ignore": list(dense),
            },
        }

    def recognises(self, quantization: Mapping[str, Any]) -> bool:
        """Return True if a checkpoint's ``quantization_config`` says that its layers are in this format."""
        sparsity = quantization.get("sparsity_config")
        return isinstance(sparsity, Mapping) and sparsity.get("format") == self.name

    def layers(self, quantization: Mapping[str, Any], source: str) -> tuple[str, ...]:
        """Return the names of the packed layers in a ``quantization_config`` of this format, in its order.

        Raises:
            FormatError: it does not name them one by one.
        """
        targets = quantization["sparsity_config"].get("targets")
        named = isinstance(targets, list) and all(
            isinstance(t, str) and "." in t and ":" not in t for t in targets
        )
        if not targets or not named:
            raise FormatError(
                f"{source}: sparsity_config.targets does not name layers one by one: {shown(targets)}",
                hint="class names and patterns are not read: vLLM 0.18 destroyed dense layers with them",
            )
        if len(set(targets)) < len(targets):
            raise FormatError(f"{source}: sparsity_config.targets names a layer twice")
        return tuple(targets)


def without_shape(sizes: Mapping[str, int]) -> int:
    """Return the sum of a packed weight's bytes by suffix, without its ``shape`` tensor."""
    return sum(size for suffix, size in sizes.items() if suffix != SHAPE)


def unfit_headers(layer: str, stored: Mapping[str, TensorInfo], expected: str) -> FormatError:
    """Return the error that a layer's tensors, by suffix, have headers of no packed weight; ``expected`` of them."""
    headers = ", ".join(f"{suffix} {info.dtype} {list(info.shape)}" for suffix, info in stored.items())
    return FormatError(
        f"{layer} is not a packed weight: {headers}",
        hint=f"expected {expected}; the file is damaged, or quantized",
    )
