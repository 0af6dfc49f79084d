"""Blockwise recovery: train the surviving weights of one window at a time to the dense model's output.

Shape legend: B samples, T tokens, D hidden size.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from msp_plugin.errors import ModelError, NumericsError, OutputError, RecipeError
from msp_plugin.models.held import held, read_from
from msp_plugin.models.layers import decoder_blocks
from msp_plugin.models.offload import check_loadable, offload_cache
from msp_plugin.passes.gradients import BACKWARD, loss_scale
from msp_plugin.recovery.base import Recovery, RecoveryInputs, RecoveryResult, check_runs_by_block
from msp_plugin.recovery.masks import Masks
from msp_plugin.recovery.shared import mean_kl
from msp_plugin.recovery.window_training import (
    Fit,
    Schedule,
    Trained,
    fit,
    set_state,
    state_of,
    trained_parameters,
)
from msp_plugin.recovery.windows import Window, windows
from msp_plugin.runtime.disk import writing
from msp_plugin.runtime.files import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

#: Most steps of a short run that tries a learning rate.
_TRIAL_STEPS = 16
#: Least length of a dense hidden state that its token's error is divided by, as a share of the root mean square length.
_LEAST_LENGTH = 1e-3
#: Measurements of the hold-out loss during a recovery, besides the first.
_MEASUREMENTS = 4


@dataclass(frozen=True)
class Blockwise(Recovery):
    """Trains half a block at a time to the dense model's output (EBFT, arXiv 2402.12419): minutes, no labels.

    A window, by default the attention or the MLP half of a block with its norm, gets the hidden states of the model as
    recovered so far, and its surviving weights, norms and biases are trained with AdamW so that its output comes near
    to the dense model's hidden state at the same place, behind dense blocks. Only one window is trained at a time, so
    that memory holds its gradients and moments, and of all samples two hidden states. 2510.14444 finds halves as good
    as larger windows.

    Deviations from EBFT: halves instead of blocks; rate, batch and epochs of our own; a cosine; hold-out samples choose
    the rate and the epoch for each window, so that none gets worse on them.

    Args:
        blocks: whole blocks of a window; 0 for halves, where a block has them.
        epochs: passes over the samples for each window.
        rates: learning rates in sizes of each parameter (see Schedule), of which one is chosen for each window: the one
            whose first steps, up to 16, leave the least error on the hold-out samples.
        decay: AdamW's weight decay.
    """

    name = "blockwise"
    offloads = True
    same_depth = True
    by_block = True

    blocks: int = 0
    epochs: int = 4
    rates: tuple[float, ...] = (0.02, 0.06, 0.2)
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.blocks < 0 or self.epochs < 1:
            raise RecipeError("blockwise: blocks must be at least 0 and epochs at least 1")
        if not self.rates or not all(math.isfinite(rate) and rate > 0 for rate in self.rates):
            raise RecipeError("blockwise: rates must be positive numbers, at least one")
        if not 0 <= self.decay < math.inf:
            raise RecipeError("blockwise: decay must be at least 0")

    def check(self, model: PreTrainedModel, masks: Masks) -> None:
        check_loadable(model)
        cached = [name for name, module in model.named_modules() if offload_cache(module) is not None]
        if cached:
            raise ModelError(
                f"compressed-tensors offloads the weights of {cached[0] or 'the model'}, and blockwise cannot change them",
                hint="load the model into memory, or by accelerate with a device_map",
            )

    def recover(self, inputs: RecoveryInputs) -> RecoveryResult:
        """Change the surviving weights of the model in place (see Recovery.recover).

        Raises:
            ModelError: the model hands more than the hidden state from block to block.
            NumericsError: a hidden state of either model is not finite.
        """
        model, original = inputs.model, inputs.original
        assert original is not None, "the caller gives the original, because needs_original is True"
        check_runs_by_block(self, model, inputs.data.samples[0])
        with _frozen(model):
            return _Walk(self, inputs, original).run()


class _Walk:
    """One walk of a sparse and a dense model through all windows, side by side.

    Each rank has its samples of every batch; errors and gradients are summed over the ranks.

    Attributes:
        ids: this rank's part of the batches, int64[B, T], first those that are trained on.
        tokens: of each batch, over all ranks.
        batches: count of the batches that are trained on; the others judge.
        runs: (steps, rate) of each training run of a window; None for the best rate so far.
        steps: of a window, in all runs.
        dense, own: the hidden states [B, T, D] of both models at the present window, by batch; None before the first.
    """

    def __init__(self, method: Blockwise, inputs: RecoveryInputs, original: PreTrainedModel):
        self.method, self.inputs, self.original, self.model = method, inputs, original, inputs.model
        data = list(inputs.data.batches(inputs.batch_tokens))
        ids = data + list(inputs.holdout.batches(inputs.batch_tokens))
        self.ranks, self.batches = inputs.ranks, len(data)
        self.ids = [rows[self.ranks.rank :: self.ranks.size] for rows in ids]
        self.tokens = [rows.numel() for rows in ids]
        if self.ranks.rank == 0 and max(map(len, ids)) < self.ranks.size:
            log.warning(
                "a batch has no more than %d samples, and there are %d ranks: some do nothing; give shorter samples",
                max(map(len, ids)),
                self.ranks.size,
            )
        self.windows = windows(original, inputs.data.samples[0], method.blocks)
        trials = method.rates if len(method.rates) > 1 else ()
        self.runs = [
            *((min(_TRIAL_STEPS, self.batches), rate) for rate in trials),
            (method.epochs * self.batches, None),
        ]
        self.steps = sum(steps for steps, _ in self.runs)
        self.prefix, self.blocks = decoder_blocks(self.model)
        self.dense: list[torch.Tensor | None] = [None] * len(self.ids)
        self.own: list[torch.Tensor | None] = [None] * len(self.ids)

    def run(self) -> RecoveryResult:
        """Recover all windows in order; those that a stopped recovery has trained are read from its folder."""
        course = _Course()
        count = len(self.windows)
        for number, window in enumerate(self.windows):
            self._through(window, self.original, self.dense)
            with held(self.blocks[window.first : window.last + 1], writable=True):
                trained = trained_parameters(self.model, window, self.inputs.masks)
                restored = self._restored(number, trained)
                if restored is None:
                    if number == 0:
                        self._measure(course)
                    self._train(number, window, trained, course)
                    if (number + 1) * _MEASUREMENTS // count > number * _MEASUREMENTS // count:
                        self._measure(course)
                    self.ranks.on_rank_zero(partial(_save, self._file(number), trained, course))
                else:
                    course = restored
                self._through(window, self.model, self.own)
            read_from(self.model, self._file(number), [each.name for each in trained])
            self._report((number + 1) * self.steps, note=course.note)
        return RecoveryResult(course.tokens, tuple(course.curve), tuple(course.notes))

    def _report(self, *steps: int, note: str) -> None:
        """Report the sum of ``steps`` of those in all windows."""
        self.inputs.progress("recovery", sum(steps), len(self.windows) * self.steps, note)

    def _restored(self, number: int, trained: Sequence[Trained]) -> _Course | None:
        """Set a window's parameters from its file, and return the course then; None if rank 0 finds no whole file."""
        course = self.ranks.on_rank_zero(partial(_restore, self._file(number), trained))
        if course is None:
            return None
        first = self.ranks.rank == 0
        if not all(self.ranks.gather(lambda: first or _restore(self._file(number), trained) is not None)):
            raise OutputError(
                f"not all ranks can read {self._file(number)}",
                hint="give all of them one file system for the cache",
            )
        return course

    def _train(self, number: int, window: Window, trained: Sequence[Trained], course: _Course) -> None:
        """Train a window's parameters and leave them in the best state on the hold-out samples; report the steps."""
        name = window.name(self.prefix)
        judged = range(self.batches, len(self.ids))
        first = self._mean_error(window, range(self.batches))
        before = self._mean_error(window, judged)
        if not (math.isfinite(first) and math.isfinite(before)):
            raise NumericsError(f"the output of {name} is not finite", hint="try dtype float32 or bfloat16")
        if not trained or first == 0:
            course.note = f"{name}: nothing to train"
            return

        with self._fitting(window, trained, first) as fit_at:
            start = best = Fit(before, state_of(trained))
            rate, least, done, finite = self.method.rates[0], math.inf, 0, True
            for steps, each in self.runs:
                report = partial(self._report, number * self.steps + done, note=f"{name}: error {before:.3g}")
                result = fit_at(start, Schedule(steps, each or rate, self.method.decay), number, report)
                if each is not None and result.error < least:
                    rate, least = each, result.error
                best = min(best, result, key=lambda fit: fit.error)
                done, finite = done + result.steps, finite and result.finite
        set_state(trained, best.state)
        course.tokens += self._cost(window, done)
        if not finite:
            course.notes.append(f"{name}: a loss was not finite, the best state before it stays")
            log.warning(course.notes[-1])
        course.note = f"{name}: rate {rate:g}, error {before:.3g}, then {best.error:.3g}"

    @contextmanager
    def _fitting(
        self, window: Window, trained: Sequence[Trained], scale: float
    ) -> Iterator[Callable[[Fit, Schedule, int, Callable[[int], None]], Fit]]:
        """Yield a function that fits a window from a state by a schedule, with a seed; gradients are on in the block.

        The function's last argument is called before each step, with its number.

        Args:
            scale: the error before, by which the loss is divided.
        """

        def loss(batch: int) -> torch.Tensor:
            return self._error(window, batch) / scale

        def held_out() -> float:
            return self._mean_error(window, range(self.batches, len(self.ids)))

        factor = loss_scale((each.parameter for each in trained), max(self.tokens))

        def fit_at(start: Fit, schedule: Schedule, seed: int, report: Callable[[int], None]) -> Fit:
            seed += self.inputs.seed
            return fit(
                trained, loss, self.batches, held_out, start, schedule, seed, self.ranks, report, factor
            )

        try:
            for each in trained:
                each.parameter.requires_grad_(True)
            yield fit_at
        finally:
            for each in trained:
                each.parameter.requires_grad_(False)

    def _error(self, window: Window, batch: int) -> torch.Tensor:
        """Return the error of a window's output on a batch, as a node of the graph: this rank's part of it.

        It is the mean over tokens of the squared distance to the dense hidden state, in squared lengths of that state. A
        state may be zero, such as that of padding: lengths below _LEAST_LENGTH count as that.
        """
        if not len(self.ids[batch]):
            return torch.zeros(())
        output = window.run(self.model, self.ids[batch], self.own[batch]).float()
        target = self.dense[batch]
        assert target is not None
        target = target.to(output.device).float()
        squared = target.square().sum(-1)
        squared = torch.maximum(squared, squared.mean() * _LEAST_LENGTH**2)
        mean = ((output - target).square().sum(-1) / squared).mean()
        return mean * (self.ids[batch].numel() / self.tokens[batch])

    @torch.no_grad()
    def _mean_error(self, window: Window, batches: Sequence[int]) -> float:
        """Return the mean error over the tokens of some batches, on all ranks."""
        weights = [self.tokens[batch] for batch in batches]
        errors = self.ranks.gather(lambda: [float(self._error(window, batch)) for batch in batches])
        sums = [math.fsum(parts) for parts in zip(*errors, strict=True)]
        return sum(w * e for w, e in zip(weights, sums, strict=True)) / sum(weights)

    @torch.no_grad()
    def _through(self, window: Window, model: torch.nn.Module, hidden: list[torch.Tensor | None]) -> None:
        """Replace the hidden states before a window of a model by those behind it."""
        with held(decoder_blocks(model)[1][window.first : window.last + 1]):
            for batch, ids in enumerate(self.ids):
                if len(ids):
                    hidden[batch] = window.run(model, ids, hidden[batch])

    def _cost(self, window: Window, steps: int) -> int:
        """Return the tokens of some steps in a window, as tokens through all blocks; the hold-out is left out."""
        data = sum(self.tokens[: self.batches])
        share = (window.last + 1 - window.first) / len(self.blocks) / (2 if window.half else 1)
        return round(BACKWARD * data * steps / self.batches * share)

    def _measure(self, course: _Course) -> None:
        """Add to the curve the KL divergence from the dense model on the hold-out samples, if it is a number."""
        text = self.inputs.holdout
        with suppress(NumericsError):  # the window that makes it so is named later
            loss = mean_kl(self.original, self.model, text, self.ranks, batch_tokens=self.inputs.batch_tokens)
            course.curve.append((course.tokens, loss))

    def _file(self, number: int) -> Path:
        return self.inputs.folder / f"window-{number:04}.safetensors"


@dataclass
class _Course:
    """The course of a recovery so far.

    Attributes:
        tokens: see RecoveryResult, as are ``curve`` and ``notes``.
        note: on the last window.
    """

    tokens: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    note: str = ""


def _save(file: Path, trained: Sequence[Trained], course: _Course) -> None:
    """Write a window's parameters with the course of the recovery, so that a stopped one can go on."""
    tensors = {each.name: each.parameter.detach().cpu().contiguous() for each in trained}
    with writing(file), replacing(file) as temporary:
        save_file(tensors, temporary, {"course": json.dumps(asdict(course))})


def _restore(file: Path, trained: Sequence[Trained]) -> _Course | None:
    """Set a window's parameters from a file and return the course of the recovery then; None if there is no whole file."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as saved:
            course = _Course(**json.loads(saved.metadata()["course"]))
            values = [saved.get_tensor(each.name) for each in trained]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        log.warning("%s is damaged (%s): its window is trained anew", file, error)
        return None
    for each, value in zip(trained, values, strict=True):
        each.parameter.data.copy_(value)
    course.curve = [(tokens, loss) for tokens, loss in course.curve]
    return course


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Let no parameter of a model require gradients in the block, but those that the block names."""
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield
    finally:
        for name, flag in required.items():  # holding an offloaded parameter makes a new one
            model.get_parameter(name).requires_grad_(flag)
