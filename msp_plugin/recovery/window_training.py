"""Train the surviving weights, norms and biases of one window of a model.

Shape legend: B samples, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from msp_plugin.models.layers import decoder_blocks
from msp_plugin.passes.gradients import unscaled
from msp_plugin.recovery.masks import Masks
from msp_plugin.recovery.windows import Window
from msp_plugin.runtime.ranks import ALONE, Ranks

#: Least size of a parameter, such as a bias of zeros, by which its steps are scaled (Adafactor's epsilon 2).
LEAST_SIZE = 1e-3
#: Returns the loss of a batch, by its number, as a node of the graph.
BatchLoss = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Trained:
    """A parameter that is trained in float32, whatever its own dtype.

    Args:
        name: its full name.
        kept: bool[out, in], False for weights that stay zero; None if all of its values are trained.
        master: its values, float32, of which the parameter holds the rounded ones.
    """

    name: str
    parameter: torch.nn.Parameter
    kept: torch.Tensor | None
    master: torch.Tensor

    def put(self) -> None:
        """Round the float32 values into the parameter."""
        self.parameter.data.copy_(self.master)

    def size(self) -> float:
        """Return the root mean square of the values that are not pruned, or LEAST_SIZE if that is more."""
        count = self.master.numel() if self.kept is None else int(self.kept.sum())
        return max(LEAST_SIZE, float(self.master.norm()) / math.sqrt(max(count, 1)))

    def take_gradient(self, scale: float) -> None:
        """Move the parameter's gradient, divided by ``scale``, to the float32 values, without those of pruned weights."""
        gradient = self.parameter.grad
        self.parameter.grad = self.master.grad = None
        if gradient is not None:
            gradient = unscaled(gradient, scale).float()
            self.master.grad = gradient if self.kept is None else gradient.mul_(self.kept)


def trained_parameters(model: torch.nn.Module, window: Window, masks: Masks) -> list[Trained]:
    """Return the parameters of a window that a recovery may change: masked layers' weights and biases, and norms.

    Left alone are all others, such as routers, convolutions and fused experts with their biases, and parameters that
    blocks share.
    """
    prefix, blocks = decoder_blocks(model)
    shared = Counter(p for block in blocks for p in dict.fromkeys(block.parameters()))
    trained = []
    for number in range(window.first, window.last + 1):
        for inside, parameter in blocks[number].named_parameters():
            name = f"{prefix}.{number}.{inside}"
            layer, _, leaf = name.rpartition(".")
            if shared[parameter] > 1 or not window.contains(number, inside):
                continue
            masked = layer in masks.shapes
            if leaf in ("weight", "bias") if masked else _holds_vectors(model.get_submodule(layer)):
                kept = masks.kept(layer, parameter.device) if masked and leaf == "weight" else None
                master = parameter.detach().float().clone()
                trained.append(Trained(name, parameter, kept, master))
    return trained


def _holds_vectors(module: torch.nn.Module) -> bool:
    """Return True if all own parameters of a module are vectors of real numbers, as those of a norm."""
    return all(p.dim() == 1 and p.is_floating_point() for p in module.parameters(recurse=False))


@dataclass(frozen=True)
class Schedule:
    """The steps of a training run.

    Args:
        steps: batches that are trained on.
        rate: the highest learning rate, as a share of each parameter's own size (Adafactor's relative step, arXiv
            1804.04235, section 8), so that one rate suits models and layers of all scales; it rises over the first share ``warm`` of the steps and falls to zero as a
            cosine.
        decay: AdamW's weight decay of matrices; norms and biases have none.
    """

    steps: int
    rate: float
    decay: float
    warm: float = 0.1

    def at(self, step: int) -> float:
        """Return the rate of a step."""
        rise = min(1.0, (step + 1) / (self.warm * self.steps))
        return self.rate * rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class Fit:
    """The outcome of a training run.

    Args:
        error: the least loss on the hold-out batches, which belongs to ``state``.
        state: float32 values of the parameters, in order.
        steps: steps that were run; 0 for the state before.
        finite: False if the loss became infinite or NaN and the run ended.
    """

    error: float
    state: list[torch.Tensor]
    steps: int = 0
    finite: bool = True


def fit(
    trained: Sequence[Trained],
    loss: BatchLoss,
    batches: int,
    held_out: Callable[[], float],
    start: Fit,
    schedule: Schedule,
    seed: int,
    ranks: Ranks = ALONE,
    report: Callable[[int], None] = lambda step: None,
    scale: float = 1.0,
) -> Fit:
    """Return the best state of a training run of a window; the parameters are left in another one.

    After each pass over the batches, and at the end, the hold-out decides. AdamW (arXiv 1711.05101) works on float32
    values. The zeros have no gradient, so that its moments of them stay zero, and decay multiplies them by zero.

    Args:
        loss: of a batch; its scale should be about one. With several ranks the losses of all of them add up to it.
        batches: count of the batches, which are drawn without repetition.
        held_out: returns the loss on the hold-out.
        start: the state to begin with.
        ranks: sum their gradients, and have the same values afterwards.
        report: called with the number of each step before it.
        scale: multiplies the loss in backward passes (see loss_scale); it falls, to 1 at least, where a gradient overflows.
    """
    set_state(trained, start.state)
    groups = [
        {"params": [t.master], "size": t.size(), "weight_decay": schedule.decay * (t.master.dim() > 1)}
        for t in trained
    ]
    # (0.9, 0.95): the mean of squares forgets within tens of steps, as many as a window has.
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    best, order = start, list[int]()
    generator = torch.Generator().manual_seed(seed)
    for step in range(schedule.steps):
        report(step)
        order = order or torch.randperm(batches, generator=generator).tolist()
        value, scale = _take_gradients(trained, partial(loss, order.pop()), ranks, scale)
        if not torch.isfinite(value):
            return Fit(best.error, best.state, step, finite=False)
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step) * group["size"]
        optimizer.step()
        for each in trained:
            each.put()
        if not order or step + 1 == schedule.steps:
            error = held_out()
            if error < best.error:  # False for NaN
                best = Fit(error, state_of(trained))
    return Fit(best.error, best.state, schedule.steps)


def _take_gradients(
    trained: Sequence[Trained], loss: Callable[[], torch.Tensor], ranks: Ranks, scale: float
) -> tuple[torch.Tensor, float]:
    """Give the float32 values the gradients of a loss; return (the loss, the scale at which no gradient overflowed)."""
    while True:
        value = loss()
        if value.requires_grad:  # a rank may have no sample of this batch
            (value * scale).backward()
        for each in trained:
            each.take_gradient(scale)
        total = summed(value, trained, ranks)
        gradients = [each.master.grad for each in trained if each.master.grad is not None]
        if scale == 1 or not torch.isfinite(total) or all(bool(g.isfinite().all()) for g in gradients):
            return total, scale
        scale = max(1.0, scale / 16)


def summed(value: torch.Tensor, trained: Sequence[Trained], ranks: Ranks) -> torch.Tensor:
    """Return the sum of a scalar over the ranks, and let all of them have the sum of their gradients."""
    if ranks.size == 1:
        return value
    gradients = [torch.zeros_like(t.master) if t.master.grad is None else t.master.grad for t in trained]
    device = gradients[0].device  # a rank without samples has its zero on the CPU
    parts = [value.detach().to(device, torch.float32).reshape(1), *(g.reshape(-1) for g in gradients)]
    sizes = [part.numel() for part in parts]
    total, *sums = torch.split(ranks.all_reduce_sum(torch.cat(parts)), sizes)
    for each, gradient in zip(trained, sums, strict=True):
        each.master.grad = gradient.view_as(each.master)
    return total.to(value.device)


def state_of(trained: Sequence[Trained]) -> list[torch.Tensor]:
    """Return copies of the float32 values."""
    return [t.master.clone() for t in trained]


def set_state(trained: Sequence[Trained], state: Sequence[torch.Tensor]) -> None:
    """Set the float32 values, and round them into the parameters."""
    for each, values in zip(trained, state, strict=True):
        each.master.copy_(values)
        each.put()
