"""The places of the zeros of a sparse model, which recovery must keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from msp_plugin.errors import ModelError, VerificationError
from msp_plugin.models.weights import Weights


@dataclass(frozen=True)
class Masks:
    """The places of the zeros of each layer, a bit for each weight, on the CPU.

    Args:
        shapes: (out, in) of each layer.
        bits: of each layer uint8[ceil(out * in / 8)], a one for each weight that is not zero, by rows.
    """

    shapes: Mapping[str, tuple[int, int]]
    bits: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, model: torch.nn.Module, layers: Sequence[str], *, smaller: bool = False) -> Masks:
        """Return the masks of a model's layers.

        Args:
            smaller: the model lost heads, channels, halves or blocks, so that it may have no zeros to keep.

        Raises:
            ModelError: no weight of them is zero, and it is not ``smaller``.
        """
        shapes, bits, zeros = {}, {}, 0
        weights = Weights(model)
        for name in layers:
            kept = (weights[name] != 0).cpu()
            zeros += kept.numel() - int(kept.sum())
            shapes[name] = (kept.shape[0], kept.shape[1])
            bits[name] = np.packbits(kept.numpy())
        if not zeros and not smaller:
            raise ModelError(
                f"none of the {len(shapes)} layers has a zero: the model is dense, there is nothing to keep",
                hint="recover a model that was pruned",
            )
        return cls(shapes, bits)

    @classmethod
    def planned(cls, shapes: Mapping[str, tuple[int, int]], sparsity: Fraction) -> Masks:
        """Return masks as a pruning to a sparsity may make them, with zeros spread over each layer; for checks only."""
        bits = {}
        for name, (out_features, in_features) in shapes.items():
            places = np.arange(in_features) + np.arange(out_features)[:, None]  # no column is empty
            before, after = ((places + n) * sparsity.numerator // sparsity.denominator for n in (0, 1))
            bits[name] = np.packbits(before == after)
        return cls(shapes, bits)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def kept(self, layer: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return bool[out, in], True for the weights that are not zero."""
        out_features, in_features = self.shapes[layer]
        kept = np.unpackbits(self.bits[layer], count=out_features * in_features).view(np.bool_)
        return torch.from_numpy(kept).view(out_features, in_features).to(device)

    def zeros(self, layer: str) -> int:
        """Return the count of zeros of a layer."""
        out_features, in_features = self.shapes[layer]
        return out_features * in_features - int(np.bitwise_count(self.bits[layer]).sum())

    def unstructured(self, layer: str) -> int:
        """Return the count of zeros of a layer within the rows and the columns that are not all zero."""
        kept = self.kept(layer)
        return int((kept.any(1)[:, None] & kept.any(0) & ~kept).sum())

    def check(self, model: torch.nn.Module, after: str) -> dict[str, int]:
        """Return by layer the weights that have become zero; layers without one are left out.

        Args:
            after: the step that ran last, for the error.

        Raises:
            VerificationError: a zero was filled in, or a weight is not finite.
        """
        new = {}
        weights = Weights(model)
        for name in self:
            weight = weights[name]
            kept = self.kept(name, weight.device)
            filled = int(torch.count_nonzero(weight.masked_fill(kept, 0)))
            if filled:
                raise VerificationError(
                    f"after {after}, {filled:,} pruned weights of {name} are not zero",
                    hint="the method does not keep the zeros; nothing was written",
                )
            if not bool(torch.isfinite(weight).all()):
                raise VerificationError(f"after {after}, {name} holds weights that are not finite")
            if count := weight.numel() - int(torch.count_nonzero(weight)) - self.zeros(name):
                new[name] = count
        return new
