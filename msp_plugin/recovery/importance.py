"""Importance-aware training of adapters (see ist) as a callback of transformers' Trainer.

It needs peft and accelerate, so that this file is imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from msp_plugin.passes.observe import by_block
from msp_plugin.recovery.base import RecoveryInputs
from msp_plugin.recovery.ist import EVERY, LEFT, SETS, ImportanceSchedule, starting_scores
from msp_plugin.recovery.sharding import is_sharded
from msp_plugin.recovery.training_options import TrainingOptions
from msp_plugin.recovery.training_text import Batch, Steps, collate, shuffled


class Importance(TrainerCallback, ExportableState):  # type: ignore[misc,unused-ignore]
    """Trains the adapters of the blocks that ImportanceSchedule draws, and measures its losses.

    Args:
        loss: returns the loss of a model on a batch, without gradients.
    """

    def __init__(
        self,
        adapted: PeftModel,
        loss: Callable[[Any, Batch], float],
        steps: Steps,
        inputs: RecoveryInputs,
        method: TrainingOptions,
    ):
        self.blocks = by_block(inputs.model, tuple(inputs.masks))
        layers = self._layers_by_block(adapted)
        self.numbers = sorted(number for number in self.blocks if layers[number])
        scores = dict.fromkeys(self.numbers, 0.0)
        if method.ist_start == "sensitivity":
            scores = starting_scores(self.blocks, inputs.sensitivities)
        self.schedule = ImportanceSchedule([scores[number] for number in self.numbers], inputs.seed)
        self.loss, self.steps, self.inputs = loss, steps, inputs
        self.layers = [layers[number] for number in self.numbers]
        #: Samples of a measurement, whatever the number of ranks.
        self.samples = max(1, min(inputs.batch_tokens, method.step_tokens) // steps.length)
        self.measured = 0

    def _layers_by_block(self, adapted: PeftModel) -> dict[int, list[BaseTunerLayer]]:
        """Return the adapter's layers of each pruned block; others, such as the last norm, are always trained."""
        number, layers = next(iter(self.blocks.items()))
        prefix = layers[0].split(f".{number}.")[0]
        found: dict[int, list[BaseTunerLayer]] = {number: [] for number in self.blocks}
        for name, module in adapted.get_base_model().named_modules():
            if isinstance(module, BaseTunerLayer) and name.startswith(prefix + "."):
                number = int(name[len(prefix) + 1 :].partition(".")[0])
                if number in found:
                    found[number].append(module)
        return found

    def state(self) -> dict[str, Any]:
        """Return the scores, as transformers' checkpoints hold them."""
        scores = self.schedule.scores.tolist()
        return {"args": {}, "attributes": {"scores": scores, "measured": self.measured}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__) or {}
        if "scores" in saved.get("attributes", {}) and state.global_step:
            self.schedule.scores = torch.tensor(saved["attributes"]["scores"], dtype=torch.float64)
            self.measured = saved["attributes"]["measured"]

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step = state.global_step
        if step and step % EVERY == 0:
            self.schedule.update(step, lambda blocks: self._damped_loss(model, step, blocks))
            self.measured += SETS * self.samples * self.steps.length
        drawn = set(self.schedule.drawn(step))
        if self.steps.ranks == 1:
            for i, layers in enumerate(self.layers):
                _require_grad(layers, i in drawn)

    def drop_gradients(self, step: int) -> None:
        """Drop the gradients of the blocks that were not drawn: several ranks compute them for all blocks."""
        drawn = set(self.schedule.drawn(step))
        for i, layers in enumerate(self.layers):
            if i not in drawn:
                for parameter in _trained(layers):
                    parameter.grad = None

    def _damped_loss(self, model: Any, step: int, blocks: list[int]) -> float:
        """Return the loss of one batch of the training text while the adapters of some blocks are damped."""
        data = self.inputs.data.samples
        order = shuffled(len(data), self.samples, self.inputs.seed + step)
        batch = collate([data[i] for i in order])

        def measure() -> float:
            with damped([layer for i in blocks for layer in self.layers[i]]):
                return self.loss(model, batch)

        if is_sharded():  # the model runs on all ranks together; they draw by the same number
            return self.inputs.ranks.gather(measure)[0]
        return self.inputs.ranks.on_rank_zero(measure)


def _trained(layers: Sequence[BaseTunerLayer]) -> Iterator[torch.nn.Parameter]:
    """Yield the parameters of adapters."""
    for layer in layers:
        for name in layer.adapter_layer_names:
            yield from getattr(layer, name).parameters()


def _require_grad(layers: Sequence[BaseTunerLayer], flag: bool) -> None:
    for parameter in _trained(layers):
        parameter.requires_grad_(flag)


@contextmanager
def damped(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """Apply a quarter of the change of some layers meanwhile."""
    scalings: list[Any] = [layer.scaling for layer in layers]
    before = [dict(scaling) for scaling in scalings]
    for scaling in scalings:
        for adapter in scaling:
            scaling[adapter] *= LEFT
    try:
        yield
    finally:
        for scaling, own in zip(scalings, before, strict=True):
            scaling.update(own)
