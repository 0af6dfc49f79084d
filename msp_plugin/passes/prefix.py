"""Keep the activations of a model's first blocks, so that a model with the same first blocks can skip them.

Shape legend: B samples, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from msp_plugin.models.layers import decoder_blocks, text_config
from msp_plugin.models.offload import input_device, input_embeddings, is_offloaded
from msp_plugin.passes.patching import replace_forward
from msp_plugin.runtime.memory import is_out_of_memory


class Prefix:
    """The inputs [B, T, D] of some blocks for batches of samples, by the samples' numbers.

    They serve only the same batch again, because the rounding of a matrix product may depend on its number of rows.
    Every sample is kept once, in the last batch that had it.

    Args:
        bytes_per_token: memory per token. If it is too little for every block, the inputs of every second, third, ...
            block are kept, and a pass starts at the last kept one at or before the first block that differs.
    """

    def __init__(self, model: torch.nn.Module, bytes_per_token: int):
        self.model = model
        self.blocks = decoder_blocks(model)[1]
        embeddings = input_embeddings(model).weight
        assert isinstance(embeddings, torch.Tensor), "embeddings have a weight"
        # The config first, because OPT's embeddings may be narrower.
        width = getattr(text_config(model), "hidden_size", embeddings.shape[1])
        fit = bytes_per_token // (width * embeddings.element_size())
        stride = -(-len(self.blocks) // (fit + 1)) if fit else len(self.blocks)
        self._starts = tuple(range(stride, len(self.blocks), stride))
        self._inputs: dict[int, dict[tuple[int, ...], torch.Tensor]] = {start: {} for start in self._starts}
        self._skipped = 0

    @property
    def saved_tokens(self) -> int:
        """Tokens times the share of blocks that they skipped, summed so far."""
        return self._skipped // len(self.blocks)

    @property
    def bytes_held(self) -> int:
        """Bytes of the activations in memory."""
        storages = (x.untyped_storage() for batches in self._inputs.values() for x in batches.values())
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def release(self) -> bool:
        """Drop all activations and keep none from now on; if there are none, change nothing and return False."""
        if not any(self._inputs.values()):
            return False
        self._starts, self._inputs = (), {}
        return True

    def forget(self, first: int) -> None:
        """Drop the inputs of the blocks after block ``first``, which are out of date."""
        for start, batches in self._inputs.items():
            if start > first:
                batches.clear()

    @contextmanager
    def use(self, samples: Sequence[int], first: int, *, record: bool) -> Iterator[None]:
        """Let one forward pass of the samples in the block skip first blocks whose outputs are kept.

        Args:
            samples: numbers of the rows of the batch, in its order.
            first: the first block whose weights differ from those of the kept activations.
            record: keep the inputs of the blocks that run.
        """
        batch = tuple(samples)
        ready = [s for s in self._starts if s <= first and batch in self._inputs[s]]
        start = max(ready, default=0)
        undo = []
        try:
            if start:
                hidden = self._inputs[start][batch]
                undo.append(replace_input(self.blocks[start], hidden))
                undo += [skip(block) for block in self.blocks[:start]]
                undo.append(without_embeddings(self.model, hidden))
            if record:
                undo += [self._record(block, batch) for block in self._starts if block > start]
            yield
            if start:
                self._skipped += hidden.shape[0] * hidden.shape[1] * start
        finally:
            for call in reversed(undo):
                call()

    def _record(self, block: int, batch: tuple[int, ...]) -> Callable[[], None]:
        """Keep the input of a block for a batch, dropping batches that share samples, until the returned call."""

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            batches = self._inputs[block]
            if batch not in batches:
                for other in [other for other in batches if not set(batch).isdisjoint(other)]:
                    del batches[other]
                batches[batch] = _hidden(args, kwargs).detach()

        return self.blocks[block].register_forward_pre_hook(hook, with_kwargs=True).remove

    def is_exact(self, ids: torch.Tensor) -> bool:
        """Return True if skipping blocks gives the same logits, bit for bit, for ids int64[1, T].

        False for models that hand more than the hidden state from block to block, as an argument or in an attribute.
        Drops the activations kept before.
        """
        self.forget(-1)
        if not self._starts:
            return False
        try:
            with self.use([0], 0, record=True):
                whole = self.model(ids, use_cache=False).logits
            if any(x.dim() != 3 for batches in self._inputs.values() for x in batches.values()):
                raise ValueError("the blocks hand on more than one stream of hidden states")
            self.model(ids.flip(-1), use_cache=False)  # overwrites what blocks keep in attributes
            saved = self._skipped
            same = True
            for start in {self._starts[0], self._starts[-1]}:
                with self.use([0], start, record=False):
                    same &= torch.equal(whole, self.model(ids, use_cache=False).logits)
            self._skipped = saved
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            same = False  # another calling convention
        self.forget(-1)
        return same


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the hidden state [B, T, D] among the arguments of a decoder block."""
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def replace_input(block: torch.nn.Module, hidden: torch.Tensor) -> Callable[[], None]:
    """Give a block the hidden state [B, T, D] instead of its caller's, until the returned call."""

    def hook(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    return block.register_forward_pre_hook(hook, with_kwargs=True).remove


def skip(module: torch.nn.Module, output: torch.Tensor | None = None) -> Callable[[], None]:
    """Make a module return ``output``, or its input if ``output`` is None, until the returned call."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _hidden(args, kwargs) if output is None else output

    return replace_forward(module, forward)


@contextmanager
def last_outputs(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yield a list that receives the last block's output [B, T, D] of each forward pass."""
    outputs: list[torch.Tensor] = []

    def take(module: torch.nn.Module, args: object, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_blocks(model)[1][-1].register_forward_hook(take)
    try:
        yield outputs
    finally:
        handle.remove()


def run_tail(model: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Return a model's logits [B, T, V] for an output [B, T, D] of its last block; no block runs."""
    blocks = decoder_blocks(model)[1]
    undo = [skip(block, hidden) for block in blocks]
    undo.append(without_embeddings(model, hidden))
    try:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=input_device(model))
        logits: torch.Tensor = model(ids, use_cache=False).logits
        return logits
    finally:
        for call in reversed(undo):
            call()


@torch.no_grad()
def tail_is_exact(model: torch.nn.Module, ids: torch.Tensor) -> bool:
    """Return True if run_tail gives a model's own logits, bit for bit, for ids int64[1, T]."""
    with last_outputs(model) as outputs:
        logits = model(ids, use_cache=False).logits
    if outputs[0].dim() != 3:
        return False  # several streams of hidden states, such as Gemma 3n's [streams, B, T, D]
    try:
        return torch.equal(run_tail(model, outputs[0]), logits)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return False  # another calling convention


def without_embeddings(model: torch.nn.Module, hidden: torch.Tensor) -> Callable[[], None]:
    """Spare a pass with a replaced block input from reading offloaded embeddings, until the returned call.

    Args:
        hidden: the replaced input [B, T, D]; the model expects this shape of its embeddings.
    """
    module = input_embeddings(model)
    return skip(module, hidden) if is_offloaded(module) else lambda: None
