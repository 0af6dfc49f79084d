"""The size of a model once the heads, channels and halves that an allocation takes are left out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.errors import ModelError
from msp_plugin.models.layers import decoder_blocks
from msp_plugin.plan.allocation import Allocation
from msp_plugin.structure.halves import Half, find_halves, is_mixed
from msp_plugin.structure.slices import Slices
from msp_plugin.structure.small_model import empty_model


@dataclass(frozen=True)
class Size:
    """The figures of one form of a model.

    Args:
        parameters: all of them, norms, biases and embeddings included; tied ones count once.
        bytes: of the parameters.
        macs: products that a token takes part in with the weights of the blocks and of the output head; those of
            attention with the tokens before it depend on the context, and are left out.
    """

    name: str
    parameters: int
    bytes: int
    macs: int


def sizes(allocation: Allocation, checkpoint: Checkpoint | None) -> list[Size]:
    """Return the figures at full size and as ``msp export --to small`` writes the model.

    Empty where no level takes heads, channels or halves, where there is no checkpoint, or where it is smaller already, and
    where that export would refuse it.
    """
    narrow = any(level.narrows for level in allocation.levels)
    if not narrow or checkpoint is None or checkpoint.quantization is not None:
        return []
    model = empty_model(checkpoint.path)
    try:
        halves = find_halves(model)
    except ModelError:  # dropped halves of a model whose structure is not known stay in it, as zeros
        return []
    prefix, blocks = decoder_blocks(model)
    kept = {half.name: tuple(range(_kept(half, allocation, checkpoint))) for half in halves}
    slices = Slices(halves, kept, len(blocks))
    if slices.unfit_for_small(is_mixed(model)) is not None:
        return []
    rows = ([0, 0, 0], [0, 0, 0])
    for name in checkpoint.dense_names:
        info = checkpoint.dense_info(name)
        gone = slices.name(name) is None
        shapes = (tuple(info.shape), None if gone else slices.shape(name, info.shape))
        for row, shape in zip(rows, shapes, strict=True):
            if shape is not None:
                count = math.prod(shape)
                row[0] += count
                row[1] += count * info.dtype.itemsize
                row[2] += count if len(shape) == 2 and name.startswith(f"{prefix}.") else 0
    embeddings: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head = int(embeddings.weight.numel())
    return [
        Size(name, parameters, size, macs + head)
        for name, (parameters, size, macs) in zip(("full size", "as --to small"), rows, strict=True)
    ]


def _kept(half: Half, allocation: Allocation, checkpoint: Checkpoint) -> int:
    """Return how many groups of a half stay; one, where it is dropped and adds a bias."""
    level = allocation.by_layer.get(half.output)
    if level is None:
        return half.groups
    if level.is_dropped:
        bias = f"{half.output}.bias"
        return int(bias in checkpoint.dense_names and bool((checkpoint.dense(bias) != 0).any()))
    width = level.width(next(layer for layer in allocation.table.layers if layer.name == half.output))
    return width[0] if width else half.groups
