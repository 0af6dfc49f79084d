"""A linear that holds its weight packed, in the place of ``torch.nn.Linear``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Self

import torch
from torch import nn

from msp_plugin.errors import ServingError
from msp_plugin.formats.base import PackedFormat
from msp_plugin.serving.cpu.build import load_operator
from msp_plugin.serving.cpu.kernel import DTYPES, PackedWeight, check_structure, checked_choice, equal_rows
from msp_plugin.serving.cpu.memory import in_huge_pages
from msp_plugin.serving.kernels import Choice

log = logging.getLogger(__name__)


class PackedLinear(nn.Module):
    """A linear whose state is what the checkpoint stores for it: the format's tensors, and the bias.

    It has no gradients. ``weight`` unpacks it for whoever asks.

    Args:
        format: of the packed weight.
        name: the layer's name, for errors.
        stored: the tensors by suffix, on any device; those of a meta model are filled by its loader.
        shape: (out_features, in_features).
        bias: [out_features], or None.
    """

    bias: nn.Parameter | None
    bitmask: torch.Tensor
    like: torch.Tensor

    def __init__(
        self,
        format: PackedFormat,
        name: str,
        stored: Mapping[str, torch.Tensor],
        shape: tuple[int, int],
        bias: nn.Parameter | None,
    ):
        super().__init__()
        self.format, self.name, self.kernel = format, name, "dense"
        self.out_features, self.in_features = shape
        for suffix, tensor in stored.items():
            # Loading casts parameters to the dtype that was asked for, and leaves buffers as they are stored. Values in
            # int8 do not tell that dtype: ``like`` does.
            if tensor.is_floating_point() and suffix != "scale":
                self.register_parameter(suffix, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(suffix, tensor)
        self.register_buffer("like", torch.empty(0), persistent=False)
        self.register_parameter("bias", bias)
        self.training = False

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight [out_features, in_features], unpacked anew each time."""
        stored = {suffix: self._stored(suffix) for suffix in self.format.suffixes}
        if "scale" not in stored:
            return self.format.unpack(stored, self.name)
        return self.format.unpack({**stored, "scale": stored["scale"].float()}, self.name).to(self.like.dtype)

    @property
    def packed(self) -> PackedWeight:
        """The weight as the kernels read it, from the tensors as they are now."""
        values, bitmask = self._stored("compressed"), self._stored("bitmask")
        if "row_offsets" in self.format.suffixes:
            offsets = self._stored("row_offsets").reshape(-1)
            scale = self._stored("scale") if "scale" in self.format.suffixes else None
            return PackedWeight(values, bitmask, offsets, self.in_features, scale)
        return equal_rows(values, bitmask, self.in_features)

    def _stored(self, suffix: str) -> torch.Tensor:
        tensor: torch.Tensor = getattr(self, suffix)
        return tensor.detach()

    def prepare(self) -> Choice:
        """Check the tensors, choose the kernel, hold it against the dense product; return the choice.

        Raises:
            FormatError: the tensors contradict each other.
        """
        dense, packed = self.weight, self.packed
        check_structure(packed, self.name)
        choice = checked_choice(dense, packed)
        self.kernel = choice.kernel
        if choice.kernel != "dense":
            packed = in_huge_pages(packed)
            # New tensors: the old ones may be views, which keep what they were cut from.
            values = packed.values.view(self._stored("compressed").shape)
            if values.is_floating_point():
                self.register_parameter("compressed", nn.Parameter(values, requires_grad=False))
            else:
                self.register_buffer("compressed", values)
            self.register_buffer("bitmask", packed.bitmask)
        self.register_buffer("starts", packed.row_offsets, persistent=False)
        return choice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., in_features] times the transposed weight plus bias.

        Under autocast the product is computed in the weight's dtype, and returned in autocast's like a linear's.

        Raises:
            ServingError: a gradient is asked for, or the model was cast to another dtype.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise no_training(self.name)
        if self.like.dtype not in DTYPES:
            raise ServingError(
                f"{self.name} is packed, and is multiplied in bfloat16, float16 or float32, not {self.like.dtype}",
                hint="load the model without packed=True",
            )
        if self.kernel == "dense":
            return nn.functional.linear(x, self.weight, self.bias)
        auto = torch.is_autocast_enabled("cpu")
        out: torch.Tensor = torch.ops.msp_plugin.bitmask_linear(
            x.to(self.like.dtype) if auto else x,
            self.compressed,
            self.bitmask,
            self.starts,
            getattr(self, "scale", None),
            self.bias,
            self.in_features,
            self.kernel,
        )
        return out.to(torch.get_autocast_dtype("cpu")) if auto else out

    def train(self, mode: bool = True) -> Self:
        """Return itself in eval mode.

        Raises:
            ServingError: training is asked for.
        """
        if mode:
            raise no_training(self.name)
        return super().train(mode)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state from another process, whose kernel this one may lack: then the product is dense."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.kernel != "dense" and (
            load_operator() is not None or not torch.ops.msp_plugin.cpu_supports(self.kernel)
        ):
            _warn_of(self.kernel)
            self.kernel = "dense"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Cast and move all tensors but the scales, which another dtype may be too narrow for: those are only moved."""
        scale = self._buffers.get("scale")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scale is not None:
            self.scale = scale.to(self.bitmask.device)
        return self

    def extra_repr(self) -> str:
        """Return what a model's printed form says of the linear."""
        return f"{self.in_features}, {self.out_features}, format={self.format.name}, kernel={self.kernel}"


@cache
def _warn_of(kernel: str) -> None:
    """Log, once for all layers, that a kernel is not here."""
    log.warning(
        "this process has no kernel %s: packed layers that come from another are multiplied dense", kernel
    )


def no_training(name: str) -> ServingError:
    """Return the error of whoever asks for gradients of packed weights."""
    return ServingError(
        f"{name} holds weights packed, and packed weights are not trained",
        hint="load the model without packed=True to train it; run this one under torch.no_grad()",
    )
