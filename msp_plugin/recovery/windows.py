"""Windows: runs of decoder blocks, or the attention or MLP half of one, that a recovery trains at a time.

A window is run by the model's own forward, with the blocks before it skipped and its input replaced, as in a
BlockPass, so that it gets the masks and position embeddings that the model gives to it.

Shape legend: B samples, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch

from msp_plugin.models.layers import decoder_blocks
from msp_plugin.models.offload import input_device
from msp_plugin.passes.observe import EnoughError
from msp_plugin.passes.patching import replace_forward
from msp_plugin.passes.prefix import replace_input, skip, without_embeddings
from msp_plugin.runtime.memory import is_out_of_memory


@dataclass(frozen=True)
class Middle:
    """The point of a block between its halves, where only the residual stream passes.

    Args:
        mixer: the module of the first half that mixes tokens, such as the attention, by its name in the block.
        after: the first module of the second half, whose input is the stream.
        first_half: names of the block's modules that run before that point.
        outputs: count of the values that the mixer returns in a tuple; 0 if it returns a tensor.
    """

    mixer: str
    after: str
    first_half: frozenset[str]
    outputs: int


@dataclass(frozen=True)
class Window:
    """The part of a model from one point of its residual stream to a later one.

    Args:
        first, last: numbers of its first and last decoder block.
        half: 1 or 2, the half of one block; 0 for whole blocks.
        middle: of the block, for a half.
    """

    first: int
    last: int
    half: int = 0
    middle: Middle | None = None

    def name(self, prefix: str) -> str:
        """Return its name for people, e.g. ``model.layers.3 (second half)``."""
        span = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        return f"{prefix}.{span}" + ("", " (first half)", " (second half)")[self.half]

    def contains(self, block: int, inside: str) -> bool:
        """Return True if a parameter belongs to the window.

        Args:
            inside: its name in the block. A parameter of the block itself is in no half.
        """
        if not self.first <= block <= self.last:
            return False
        if self.middle is None:
            return True
        child, dot, _ = inside.partition(".")
        return bool(dot) and (child in self.middle.first_half) == (self.half == 1)

    def run(self, model: torch.nn.Module, ids: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        """Return the stream [B, T, D] at the window's end; the graph is built if gradients are enabled.

        Args:
            ids: int64[B, T], of the samples.
            hidden: the stream [B, T, D] at its beginning; None for the model's embeddings, in the first window.
        """
        blocks = decoder_blocks(model)[1]
        if self.middle is not None and self.half == 1:
            after = blocks[self.first].get_submodule(self.middle.after)
            output = self._until(model, ids, hidden, on_input=after)
        else:
            output = self._until(model, ids, hidden, on_output=blocks[self.last])
        return output.view(*ids.shape, -1)  # some models flatten the stream between their halves

    def input_of(
        self, layer: str, model: torch.nn.Module, ids: torch.Tensor, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the input of one of the window's layers; see ``run``."""
        return self._until(model, ids, hidden, on_input=model.get_submodule(layer))

    def _until(
        self,
        model: torch.nn.Module,
        ids: torch.Tensor,
        hidden: torch.Tensor | None,
        *,
        on_input: torch.nn.Module | None = None,
        on_output: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        """Run the model from the window's beginning to a module's input or output, and return that."""
        blocks = decoder_blocks(model)[1]
        outputs: list[torch.Tensor] = []

        def take(output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)
            raise EnoughError

        with ExitStack() as undo:
            for earlier in blocks[: self.first]:
                undo.callback(skip(earlier))
            if hidden is not None:
                undo.callback(replace_input(blocks[self.first], hidden))
                undo.callback(without_embeddings(model, hidden))
            if self.middle is not None and self.half == 2:
                mixer = blocks[self.first].get_submodule(self.middle.mixer)
                undo.callback(_silence(mixer, self.middle.outputs))
            if on_input is not None:
                undo.callback(_on_input(on_input, take))
            if on_output is not None:
                handle = on_output.register_forward_hook(lambda module, args, output: take(output))
                undo.callback(handle.remove)
            with suppress(EnoughError):
                model(ids.to(input_device(model)), use_cache=False)
        if not outputs:
            raise LookupError("the pass did not reach the module")
        return outputs[0]


def windows(model: torch.nn.Module, ids: torch.Tensor, blocks: int) -> list[Window]:
    """Return the windows of a model, in order; together they are all of its blocks.

    Args:
        ids: int64[T], a sample, on which the halves of each block are found.
        blocks: whole blocks of a window; 0 for halves, where a block has them.
    """
    count = len(decoder_blocks(model)[1])
    if blocks:
        return [Window(first, min(first + blocks, count) - 1) for first in range(0, count, blocks)]
    halves: list[Window] = []
    for number, middle in enumerate(_middles(model, ids[None])):
        if middle is None:
            halves.append(Window(number, number))
        else:
            halves += [Window(number, number, half, middle) for half in (1, 2)]
    return halves


@torch.no_grad()
def _middles(model: torch.nn.Module, ids: torch.Tensor) -> Iterator[Middle | None]:
    """Yield the middle of each block, None where it has none, e.g. because its halves are parallel."""
    hidden: torch.Tensor | None = None
    for number in range(len(decoder_blocks(model)[1])):
        whole = Window(number, number)
        output = whole.run(model, ids, hidden)
        yield _middle(model, number, ids, hidden, output)
        hidden = output


def _middle(
    model: torch.nn.Module, number: int, ids: torch.Tensor, hidden: torch.Tensor | None, output: torch.Tensor
) -> Middle | None:
    """Return the middle of a block, None if it has none.

    A candidate is the input of each module that runs after the first one with linears, the mixer. It is the middle
    if the block makes its own output of it when the mixer gives zeros: so the stream alone passes there.

    Args:
        hidden, output: input and output [B, T, D] of the block for ids [B, T].
    """
    block = decoder_blocks(model)[1][number]
    order = _calls(model, block, number, ids, hidden)
    names = list(order)
    mixer = next((name for name in names if _has_linears(block.get_submodule(name))), None)
    if mixer is None:
        return None
    for place in range(names.index(mixer) + 1, len(names)):
        middle = Middle(mixer, names[place], frozenset(names[:place]), order[mixer])
        try:
            stream = Window(number, number, 1, middle).run(model, ids, hidden)
            if stream.numel() != output.numel():
                continue
            again = Window(number, number, 2, middle).run(model, ids, stream.view(output.shape))
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            continue  # another calling convention
        if torch.equal(again, output) and not torch.equal(stream.view(output.shape), output):
            return middle
    return None


def _calls(
    model: torch.nn.Module,
    block: torch.nn.Module,
    number: int,
    ids: torch.Tensor,
    hidden: torch.Tensor | None,
) -> dict[str, int]:
    """Return the block's own modules by name, in the order in which their calls end, with Middle's ``outputs`` of each."""
    order: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: object, output: Any) -> None:
            order.setdefault(name, len(output) if isinstance(output, tuple) else 0)

        return hook

    with ExitStack() as undo:
        for name, child in block.named_children():
            undo.callback(child.register_forward_hook(note(name)).remove)
        Window(number, number).run(model, ids, hidden)
    return order


def _has_linears(module: torch.nn.Module) -> bool:
    return any(isinstance(part, torch.nn.Linear) for part in module.modules())


def _on_input(module: torch.nn.Module, take: Callable[[Any], None]) -> Callable[[], None]:
    """Call ``take`` with the first argument of a module whenever it is called, until the returned call."""

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(args[0] if args else kwargs["hidden_states"])

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def _silence(module: torch.nn.Module, outputs: int) -> Callable[[], None]:
    """Make a module return zeros in the place of its hidden state, until the returned call.

    Args:
        outputs: see Middle. Its other values, such as attention weights, become None: no pass without a cache reads
            them.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return (zeros, *[None] * (outputs - 1)) if outputs else zeros

    return replace_forward(module, forward)
