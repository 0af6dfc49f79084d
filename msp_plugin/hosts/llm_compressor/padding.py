"""Keep the padding in the batches of a user's DataLoader out of the host's statistics.

Shape legend: B samples of a batch, T tokens with padding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from msp_plugin.data.tokenize import padding_mask
from msp_plugin.models.layers import decoder_blocks

if TYPE_CHECKING:
    from llmcompressor.core import State
    from llmcompressor.modifiers import Modifier

log = logging.getLogger(__name__)


class Padding:
    """The padded positions of each batch.

    The host's hooks see every position of a batch; the search sees samples without padding. ``hide`` sets the layers'
    inputs at padded positions to zero, which adds nothing to a Hessian or a norm; no other position attends to them.
    """

    def __init__(self) -> None:
        self._masks: list[torch.Tensor | None] = []

    def noted(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches, and remember the padded positions of each."""
        self._masks = []
        for batch in batches:
            yield batch
            self._masks.append(padding_mask(batch))

    @property
    def share(self) -> float:
        """The share of padded positions in the batches that have a mask."""
        masks = [mask for mask in self._masks if mask is not None]
        return sum(int((~m).sum()) for m in masks) / max(1, sum(m.numel() for m in masks))

    def warn_unless_hidden(self, loader: DataLoader[Any]) -> bool:
        """Return True if there is padding and ``hide`` can hide it; log its share."""
        if not self.share:
            return False
        sampler, batches = loader.sampler, loader.batch_sampler
        repeats = isinstance(sampler, SequentialSampler) or type(sampler).__name__ == "LengthAwareSampler"
        if repeats and (batches is None or type(batches) is BatchSampler):
            log.info(
                "%.1f %% of the calibration batches is padding; no statistic counts it", 100 * self.share
            )
            return True
        log.warning(
            "%.1f %% of the calibration batches is padding. The search leaves it out, but llm-compressor's statistics "
            "count it, because the order of the batches changes. Pass batch_size=1, samples of one length, or a "
            "DataLoader that does not shuffle",
            100 * self.share,
        )
        return False

    def hide(self, state: State, layers: Iterable[str], owner: Modifier) -> None:
        """Set the inputs of the layers, and of each decoder block's children, to zero at padded positions.

        The children matter for experts, which get single tokens without their positions. The owner's ``remove_hooks``
        undoes it.
        """

        def zero(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            number = state.current_batch_idx
            mask = self._masks[number] if 0 <= number < len(self._masks) else None
            x = args[0] if args else None
            if mask is None or not isinstance(x, torch.Tensor) or x.dim() != 3 or x.shape[:2] != mask.shape:
                return None
            return (x.masked_fill(~mask.to(x.device)[..., None], 0), *args[1:])

        modules = [state.model.get_submodule(name) for name in layers]
        modules += [part for block in decoder_blocks(state.model)[1] for part in block.children()]
        hook: Any = zero  # llm-compressor types every hook as a function of one argument
        for module in dict.fromkeys(modules):
            owner.register_hook(module, hook, "forward_pre")
