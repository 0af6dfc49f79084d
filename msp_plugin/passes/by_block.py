"""Pass samples through a model block by block: each decoder block runs once over all of them.

Shape legend: B samples, T tokens, D hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import NumericsError
from msp_plugin.models.layers import decoder_blocks
from msp_plugin.models.offload import input_device
from msp_plugin.passes.observe import EnoughError, all_finite, check_reached, observed
from msp_plugin.passes.prefix import replace_input, skip, without_embeddings
from msp_plugin.plan.units import Unit
from msp_plugin.runtime.memory import is_out_of_memory

log = logging.getLogger(__name__)


class BlockPass:
    """The hidden states of all samples, moved on from block to block.

    The model's own forward runs every block, with the blocks before it skipped and its input replaced, so that the
    block gets the masks and position embeddings that the model gives to it. The embeddings and whatever else stands
    before the blocks run once per block.

    Memory: tokens * D * bytes of a number. Weights that accelerate offloads are read again for every batch.

    Args:
        batch_tokens: most tokens of one forward pass.
        report: called after each of them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data: CalibrationSet,
        batch_tokens: int,
        report: Callable[[], None] = lambda: None,
    ):
        self.model, self._report = model, report
        self.prefix, self.blocks = decoder_blocks(model)
        self.block = 0
        self._batches = tuple(data.batches(batch_tokens))
        #: The inputs of the block by batch, all of them parts of one tensor; None at the first block.
        self._inputs: list[torch.Tensor | None] = [None] * len(self._batches)
        self._all: torch.Tensor | None = None

    @property
    def hidden(self) -> list[torch.Tensor | None]:
        """The inputs [B, T, D] of the next block by batch; None before the first block."""
        return list(self._inputs)

    @torch.no_grad()
    def run(
        self,
        units: Sequence[Unit] = (),
        add: Callable[[str, torch.Tensor], None] = lambda unit, inputs: None,
        *,
        advance: bool = True,
    ) -> None:
        """Run the block over all samples; the next call runs the next block, or this one again without ``advance``.

        Args:
            units: units of this block whose inputs are observed.
            add: see observe_inputs.

        Raises:
            NumericsError: an input of a unit, or with ``advance`` an output of the block, is not finite; or a
                unit saw no token at all.
        """
        block, outputs = self.blocks[self.block], []

        def take(module: torch.nn.Module, args: object, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)
            raise EnoughError

        with ExitStack() as undo:
            for earlier in self.blocks[: self.block]:
                undo.callback(skip(earlier))
            reached = undo.enter_context(observed(self.model, units, add))
            undo.callback(block.register_forward_hook(take).remove)
            for number in range(len(self._batches)):
                self._forward(block, number)
                output = outputs.pop()
                if advance and not all_finite(output):
                    raise NumericsError(
                        f"the output of {self.prefix}.{self.block} is not finite",
                        hint="the activations overflow: try dtype float32 or bfloat16",
                    )
                if advance:
                    self._place(number, output).copy_(output)
                self._report()
        check_reached(units, reached)
        self.block += advance

    def _place(self, number: int, like: torch.Tensor) -> torch.Tensor:
        """Return the tensor [B, T, D] for a batch's hidden state, a part of one tensor for all batches.

        With one tensor, the freed activations of the passes do not fragment the memory.
        """
        place = self._inputs[number]
        if place is None:
            counts = [ids.numel() for ids in self._batches]
            if self._all is None:
                self._all = like.new_empty(sum(counts), like.shape[-1])
            place = self._all.split(counts)[number].view(*self._batches[number].shape, -1)
            self._inputs[number] = place
        return place

    def _forward(self, block: torch.nn.Module, number: int) -> None:
        """Run the model over a batch up to the block, whose input is the hidden state from the block before it."""
        ids, hidden = self._batches[number], self._inputs[number] if self.block else None
        with ExitStack() as undo, suppress(EnoughError):
            if hidden is not None:
                undo.callback(replace_input(block, hidden))
                undo.callback(without_embeddings(self.model, hidden))
            self.model(ids.to(input_device(self.model)), use_cache=False)


@torch.no_grad()
def runs_by_block(model: torch.nn.Module, ids: torch.Tensor) -> bool:
    """Return True if a BlockPass gives the same output of the last block as the model's own forward, bit for bit.

    False for models that hand more than the hidden state from block to block, as an argument or in an attribute. To
    detect attributes, a second sample runs between the blocks of the first and overwrites them.

    Args:
        ids: int64[T], one sample.
    """
    whole: list[Any] = []
    handle = decoder_blocks(model)[1][-1].register_forward_hook(lambda module, args, out: whole.append(out))
    try:
        model(ids[None].to(input_device(model)), use_cache=False)
        handle.remove()
        walk = BlockPass(model, CalibrationSet((ids, ids.flip(0)), ""), 1)
        for _ in walk.blocks:
            walk.run()
        expected = whole[0][0] if isinstance(whole[0], tuple) else whole[0]
        hidden = walk.hidden[0]
        equal = hidden is not None and torch.equal(hidden, expected)
        if not equal:
            log.info("%s block by block has another output than whole", type(model).__name__)
        return equal
    except NumericsError:
        return True  # the run over the samples will raise it again, with the layer's name
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        log.info("%s cannot be run block by block: %r", type(model).__name__, error)
        return False  # another calling convention
    finally:
        handle.remove()
