"""The output head of a model whose logits are the output of a linear layer and nothing more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def plain_head(model: torch.nn.Module, ids: torch.Tensor) -> torch.nn.Linear | None:
    """Return the output head if the logits of ids int64[T] are its output and nothing more; else None."""
    head = model.get_output_embeddings()  # type: ignore[operator]  # of transformers' models
    if not isinstance(head, torch.nn.Linear):
        return None
    with head_inputs(head) as inputs:
        logits = model(ids[None], use_cache=False).logits
    return head if inputs and torch.equal(head(inputs[0]), logits) else None


@contextmanager
def head_inputs(head: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yield a list that receives the input of the output head in each forward pass."""
    inputs: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()
