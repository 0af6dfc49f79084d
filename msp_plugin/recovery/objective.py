"""The loss of training: KL divergence from the dense model's output, cross entropy, or both.

Shape legend: B samples, T tokens of one, N tokens of a batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from msp_plugin.errors import ModelError
from msp_plugin.models.offload import input_device
from msp_plugin.passes.head import plain_head

#: Logits of one piece of the loss, in numbers, which a processor's cache holds; but at least ROWS tokens, because each
#: piece reads the whole head.
LOGITS, ROWS = 2**19, 128
#: Memory for the dense model's outputs on batches that come again, those of the hold-out: hidden states, or logits of a
#: model whose head is not plain.
KNOWN_BYTES = 2**30


class ChunkedLoss(torch.autograd.Function):
    """w KL(dense || model) + (1 - w) cross entropy, means over tokens in nats, of outputs that a head turns into logits.

    Logits are made in pieces (see LOGITS), and the gradient of the outputs with them, so that neither logits nor
    their softmax are kept for the backward pass. With a temperature t both models' logits are divided by it, and the
    divergence is multiplied by t^2 (Hinton et al., arXiv 1503.02531, section 2.1). The head is not trained.
    """

    @staticmethod
    def forward(
        ctx: Any,
        outputs: torch.Tensor,
        head: torch.nn.Linear | None,
        dense: torch.Tensor | None,
        dense_head: torch.nn.Linear | None,
        targets: torch.Tensor,
        weight: float,
        temperature: float,
    ) -> torch.Tensor:
        """Return the loss, a float32 scalar.

        Args:
            outputs: [N, D] with a head, else logits [N, V].
            dense: the dense model's, likewise; None for cross entropy alone, whatever ``weight`` is.
            targets: int64[N], the next token of each, -100 where there is none.
        """
        weight = weight if dense is not None else 0.0
        size = head.out_features if head is not None else outputs.shape[-1]
        step = max(ROWS, LOGITS // size)
        known = max(1, int((targets != -100).sum()))
        total = torch.zeros((), dtype=torch.float64, device=outputs.device)
        gradients = []
        for at in range(0, len(outputs), step):
            piece = slice(at, at + step)
            logits = _logits(outputs[piece], head)
            parts = []
            if weight < 1:
                loss, part = _cross_entropy(logits, targets[piece], (1 - weight) / known)
                total += loss
                parts.append(part)
            if weight and dense is not None:
                wanted = _logits(dense[piece], dense_head)
                loss, part = _divergence(wanted, logits, temperature, weight / len(outputs))
                total += loss
                parts.append(part)
            gradient = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
            if ctx.needs_input_grad[0]:
                gradient = gradient.to(outputs.dtype)
                gradients.append(gradient if head is None else gradient @ head.weight)
        ctx.save_for_backward(torch.cat(gradients) if gradients else outputs.new_empty(0))
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None, None, None, None


def _logits(outputs: torch.Tensor, head: torch.nn.Linear | None) -> torch.Tensor:
    """Return float32 logits of outputs [n, D], which are the logits themselves without a head."""
    return (outputs if head is None else head(outputs)).float()


def _divergence(
    dense: torch.Tensor, logits: torch.Tensor, temperature: float, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (summed KL t^2 scale, float64 scalar; its gradient) of float32 logits [n, V]."""
    if temperature != 1:
        dense, logits = dense / temperature, logits / temperature
    p, q = dense.log_softmax(-1), logits.log_softmax(-1)
    shares = p.exp()
    total = p.sub_(q).mul_(shares).sum(-1).sum(dtype=torch.float64)
    return total * (scale * temperature**2), q.exp_().sub_(shares).mul_(scale * temperature)


def _cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (summed cross entropy times scale, float64 scalar; its gradient) of float32 logits [n, V]."""
    q = logits.log_softmax(-1)
    known = (targets != -100).nonzero()[:, 0]
    chosen = targets[known]
    total = -scale * q[known, chosen].sum(dtype=torch.float64)
    gradient = q.exp_()
    gradient[targets == -100] = 0
    gradient[known, chosen] -= 1
    return total, gradient.mul_(scale)


@dataclass(frozen=True)
class Objective:
    """The loss of a model on a batch, while the heads of both models are apart (see ``objective``).

    Args:
        head, dense_head: the heads; None for a model whose logits are more than a linear head's output.
        dense: the dense model; None for cross entropy alone.
    """

    head: torch.nn.Linear | None
    dense: torch.nn.Module | None
    dense_head: torch.nn.Linear | None
    weight: float
    temperature: float
    device: torch.device
    #: The dense model's outputs on batches that come again, by their token ids and masks.
    known: dict[bytes, torch.Tensor] = field(default_factory=dict)

    def loss(
        self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], *, again: bool = False
    ) -> torch.Tensor:
        """Return the mean loss of a batch in nats per token, as a node of the graph.

        Args:
            batch: ``input_ids`` int64[B, T]; if samples are padded on the right, ``attention_mask`` [B, T] too.
            again: the batch comes again, so that the dense model's output is kept, up to KNOWN_BYTES of all.
        """
        ids, seen = batch["input_ids"], batch.get("attention_mask")
        targets = ids.roll(-1, 1)
        targets[:, -1] = -100
        if seen is not None:
            targets = targets.masked_fill(seen.roll(-1, 1) == 0, -100)
        outputs, own = _outputs(model, batch, seen), targets.flatten()
        if seen is not None:
            own = own[seen.flatten() != 0]
        dense = None
        if self.dense is not None:
            dense = self._dense_outputs(self.dense, batch, seen, again)
        apply: Any = ChunkedLoss.apply  # not every torch has types for it
        loss: torch.Tensor = apply(
            outputs, self.head, dense, self.dense_head, own, self.weight, self.temperature
        )
        return loss

    @torch.no_grad()
    def _dense_outputs(
        self,
        dense: torch.nn.Module,
        batch: Mapping[str, torch.Tensor],
        seen: torch.Tensor | None,
        again: bool,
    ) -> torch.Tensor:
        if not again:
            return _outputs(dense, batch, seen)
        key = b"".join(tensor.cpu().numpy().tobytes() for tensor in batch.values())
        if (found := self.known.get(key)) is None:
            found = _outputs(dense, batch, seen)
            if sum(each.nbytes for each in self.known.values()) + found.nbytes <= KNOWN_BYTES:
                self.known[key] = found
        return found


def _outputs(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], seen: torch.Tensor | None
) -> torch.Tensor:
    """Return the output of a model for the tokens that are not padding, [N, D] or [N, V]."""
    outputs: torch.Tensor = model(**batch, use_cache=False).logits.flatten(0, 1)
    return outputs if seen is None else outputs[seen.flatten() != 0]


@contextmanager
def objective(
    model: torch.nn.Module,
    dense: torch.nn.Module | None,
    ids: torch.Tensor,
    *,
    weight: float,
    temperature: float,
) -> Iterator[Objective]:
    """Yield the loss of training; meanwhile a plain output head of either model is replaced by the identity.

    So the models' logits are the inputs of their heads, which the loss turns into logits piece by piece; and a wrapper
    around the model, such as DistributedDataParallel, still runs it by its own forward.

    Args:
        ids: int64[T], some text for which the heads are tried.

    Raises:
        ModelError: the two models have different vocabularies.
    """
    device = input_device(model)
    with ExitStack() as undo:
        head = undo.enter_context(_head_apart(model, ids))
        dense_head = undo.enter_context(_head_apart(dense, ids)) if dense is not None else None
        if head is not None and dense_head is not None and head.out_features != dense_head.out_features:
            raise ModelError(
                f"the model has {head.out_features:,} tokens, the dense one {dense_head.out_features:,}",
                hint="give the model that was pruned as the original",
            )
        yield Objective(head, dense, dense_head, weight, temperature, device)


@contextmanager
def _head_apart(model: torch.nn.Module, ids: torch.Tensor) -> Iterator[torch.nn.Linear | None]:
    """Yield a model's output head, replaced by the identity meanwhile; None if its logits are more than that."""
    with torch.no_grad():
        head = plain_head(model, ids.to(input_device(model)))
    if head is None:
        yield None
        return
    place, _, name = next(n for n, module in model.named_modules() if module is head).rpartition(".")
    parent = model.get_submodule(place)
    setattr(parent, name, torch.nn.Identity())
    try:
        yield head
    finally:
        setattr(parent, name, head)
