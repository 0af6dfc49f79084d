"""Backward passes of models with offloaded weights: each block runs again, so that its graph need not be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from msp_plugin.models.layers import decoder_blocks
from msp_plugin.models.offload import offloaded_module
from msp_plugin.passes.patching import replace_forward


@contextmanager
def recomputed(model: torch.nn.Module) -> Iterator[bool]:
    """Let a backward pass run each decoder block again, if weights of the model are offloaded; yield True if they are.

    A graph of the whole model would hold every weight that its forward pass loaded. With this it holds the
    input of each block, and the weights and activations of the block that the backward pass is at. The
    gradients are the same, bit for bit, where the operations give the same result twice.
    """
    if offloaded_module(model) is None:
        yield False
        return
    with ExitStack() as undo:
        for block in decoder_blocks(model)[1]:
            undo.callback(_run_again(block))
        yield True


def _run_again(block: torch.nn.Module) -> Callable[[], None]:
    """Run a block under torch's checkpoint until the returned call."""
    run = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        # Stopping early would leave the block by an exception, before its hooks put the weights away again.
        with set_checkpoint_early_stop(False):
            return checkpoint(partial(run, **kwargs), *args, use_reentrant=False)

    return replace_forward(block, forward)
