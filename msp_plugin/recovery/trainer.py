"""One training by transformers' Trainer: its arguments, its callbacks, and its course.

It needs accelerate, so that this file is imported inside functions only.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.passes.gradients import BACKWARD
from msp_plugin.passes.observe import by_block
from msp_plugin.recovery.base import RecoveryInputs
from msp_plugin.recovery.ist import EVERY, LEFT, SETS, ImportanceSchedule, starting_scores
from msp_plugin.recovery.objective import Objective
from msp_plugin.recovery.training_options import TrainingOptions

log = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Steps:
    """How text is shared out to steps, ranks and forward passes.

    Args:
        count: steps of the optimizer.
        batch: samples of one forward pass on one rank.
        accumulated: forward passes of one step on one rank.
        ranks: processes that share each step.
        length: tokens of the longest sample.
    """

    count: int
    batch: int
    accumulated: int
    ranks: int
    length: int

    @classmethod
    def plan(cls, method: TrainingOptions, data: CalibrationSet, batch_tokens: int, ranks: int) -> Steps:
        """Return the steps whose tokens are at least those that are asked for."""
        length = max(map(len, data.samples))
        share = -(-max(1, method.step_tokens // length) // ranks)
        most = max(1, batch_tokens // length)
        batch = max(size for size in range(1, min(most, share) + 1) if share % size == 0)
        count = max(1, math.ceil(method.tokens / (share * ranks * length)))
        return cls(count, batch, share // batch, ranks, length)

    @property
    def samples(self) -> int:
        """Samples of a step."""
        return self.batch * self.accumulated * self.ranks

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.samples * self.length


@dataclass(frozen=True)
class Course:
    """The course of one training.

    Args:
        curve: (cost in tokens, loss on the hold-out text), the first before training.
        best: step of the state that is in the model now; 0 for the state before training.
        cost: tokens through blocks of either model, a backward pass counts as two forward passes.
        steps, planned: that were trained and that should have been.
        stopped: where the loss stopped being finite, e.g. "in step 12 of 244"; empty where it did not.
    """

    curve: tuple[tuple[int, float], ...]
    best: int
    cost: int
    steps: int
    planned: int
    stopped: str = ""

    @property
    def improved(self) -> bool:
        """True if the state in the model is better than the one before training."""
        return self.best > 0

    def notes(self, method: TrainingOptions) -> tuple[str, ...]:
        """Return remarks for a reader of the result."""
        notes = []
        if self.stopped:
            notes.append(f"the loss or its gradient was not finite {self.stopped}: training ended there")
        elif self.steps < self.planned:
            notes.append(
                f"training ended after {self.steps} of {self.planned} steps: {method.patience} evaluations were no better"
            )
        if not self.improved:
            notes.append("no state was better than the pruned model, which is left as it was")
        elif self.best < self.steps:
            notes.append(f"the state after step {self.best} of {self.steps} was the best and was kept")
        return tuple(notes)


class Samples(torch.utils.data.Dataset[torch.Tensor]):
    """Samples in the order in which they are trained on."""

    def __init__(self, samples: Sequence[torch.Tensor], order: Sequence[int]):
        self.samples, self.order = samples, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> torch.Tensor:
        return self.samples[self.order[position]]


def shuffled(count: int, wanted: int, seed: int) -> list[int]:
    """Return ``wanted`` of ``count`` positions: all of them in random order, then all again in another one."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < wanted:
        order += torch.randperm(count, generator=generator).tolist()
    return order[:wanted]


def collate(samples: Sequence[torch.Tensor]) -> Batch:
    """Return a batch of samples int64[T]; shorter ones are padded on the right, and an attention mask says so."""
    lengths = [len(sample) for sample in samples]
    if len(set(lengths)) == 1:
        return {"input_ids": torch.stack(list(samples))}
    ids = torch.nn.utils.rnn.pad_sequence(list(samples), batch_first=True)
    seen = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": seen}


class RecoveryTrainer(Trainer):
    """The Trainer, with the loss of recovery."""

    objective: Objective

    def __init__(self, objective: Objective, **arguments: Any):
        super().__init__(**arguments)
        self.objective = objective
        self.model_accepts_loss_kwargs = False  # the loss is a mean: accumulated passes are averaged
        self.remove_callback(PrinterCallback)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return self.objective.loss(model, inputs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.objective.loss(model, self._prepare_inputs(inputs)), None, None


class Watch(TrainerCallback):
    """Reports progress, writes the log, and ends training that gets no better or is not finite."""

    def __init__(self, method: TrainingOptions, steps: Steps, inputs: RecoveryInputs):
        self.method, self.steps, self.inputs = method, steps, inputs
        self.stopped = ""
        self.file = inputs.folder / "log.jsonl"
        self.note = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:  # lines after the checkpoint that training continues from go
            self.file.write_text("".join(_line(entry) for entry in state.log_history), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.note = f"loss {logs['loss']:.4f}"
        if state.is_world_process_zero:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tokens = self.steps.tokens
        done = state.global_step * tokens
        self.inputs.progress(self.method.name, done, self.steps.count * tokens, self.note)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        losses = [loss for _, loss in evaluations(state.log_history)]
        patience = self.method.patience
        if not math.isfinite(losses[-1]):
            self._stop(state.global_step, control)
        elif patience and len(losses) - 1 - losses.index(min(losses)) >= patience:
            control.should_training_stop = True

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        # Gradients are the same on all ranks here, so that all of them stop.
        if not torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all():
            for parameter in model.parameters():
                parameter.grad = None  # so that the optimizer leaves every parameter
            self._stop(state.global_step + 1, control)

    def _stop(self, step: int, control: Any) -> None:
        self.stopped = f"in step {step} of {self.steps.count}"
        control.should_training_stop = True
        control.should_evaluate = control.should_save = False


class Importance(TrainerCallback, ExportableState):  # type: ignore[misc,unused-ignore]
    """Trains the adapters of the blocks that ImportanceSchedule draws, and measures its losses."""

    def __init__(
        self, adapted: PeftModel, trainer: RecoveryTrainer, steps: Steps, inputs: RecoveryInputs, start: str
    ):
        self.blocks = by_block(inputs.model, tuple(inputs.masks))
        self.numbers = sorted(self.blocks)
        scores = dict.fromkeys(self.numbers, 0.0)
        if start == "sensitivity":
            scores = starting_scores(self.blocks, inputs.sensitivities)
        self.schedule = ImportanceSchedule([scores[number] for number in self.numbers], inputs.seed)
        self.trainer, self.steps, self.inputs = trainer, steps, inputs
        self.layers = self._layers_by_block(adapted)
        self.measured = 0

    def _layers_by_block(self, adapted: PeftModel) -> list[list[BaseTunerLayer]]:
        """Return the adapter's layers of each block; others, such as the last norm, are always trained."""
        first = self.blocks[self.numbers[0]][0]
        prefix = first.split(f".{self.numbers[0]}.")[0]
        found: dict[int, list[BaseTunerLayer]] = {number: [] for number in self.numbers}
        for name, module in adapted.get_base_model().named_modules():
            if isinstance(module, BaseTunerLayer) and name.startswith(prefix + "."):
                found[int(name[len(prefix) + 1 :].partition(".")[0])].append(module)
        return [found[number] for number in self.numbers]

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
            self.measured += SETS * self.steps.batch * self.steps.length
        drawn = set(self.schedule.drawn(step))
        if self.steps.ranks == 1:
            for i, layers in enumerate(self.layers):
                _require_grad(layers, i in drawn)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the gradients of the blocks that were not drawn: several ranks compute them for all blocks."""
        drawn = set(self.schedule.drawn(state.global_step))
        for i, layers in enumerate(self.layers):
            if i not in drawn:
                for parameter in _trained(layers):
                    parameter.grad = None

    def _damped_loss(self, model: Any, step: int, blocks: list[int]) -> float:
        """Return the loss of one batch of the training text while the adapters of some blocks are damped."""
        data = self.inputs.data.samples
        order = shuffled(len(data), self.steps.batch, self.inputs.seed + step)
        batch = collate([data[i] for i in order])

        def measure() -> float:
            with torch.no_grad(), damped([layer for i in blocks for layer in self.layers[i]]):
                model.eval()
                unwrapped = self.trainer.accelerator.unwrap_model(model)
                loss = self.trainer.objective.loss(unwrapped, self.trainer._prepare_inputs(batch))
            return float(loss)

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


def train(
    method: TrainingOptions, adapted: PeftModel, objective: Objective, inputs: RecoveryInputs
) -> Course:
    """Train an adapter, or continue a training that was stopped; the model ends with the best state.

    ``inputs.folder`` gets the Trainer's checkpoints and log.jsonl.
    """
    steps = Steps.plan(method, inputs.data, inputs.batch_tokens, inputs.ranks.size)
    inputs = replace(inputs, holdout=inputs.holdout.cut(method.evaluation_tokens)[1])
    checkpoint = inputs.ranks.on_rank_zero(lambda: last_checkpoint(inputs.folder / "trainer"))
    order = shuffled(len(inputs.data), steps.count * steps.samples, inputs.seed)
    trainer = RecoveryTrainer(
        objective,
        model=adapted,
        args=arguments(method, steps, inputs, objective.device, fresh=checkpoint is None),
        data_collator=collate,
        train_dataset=Samples(inputs.data.samples, order),
        eval_dataset=Samples(inputs.holdout.samples, range(len(inputs.holdout))),
    )
    watch = Watch(method, steps, inputs)
    trainer.add_callback(watch)
    importance = None
    if method.layers == "ist":
        importance = Importance(adapted, trainer, steps, inputs, method.ist_start)
        trainer.add_callback(importance)
    trainer.train(resume_from_checkpoint=checkpoint)
    return course_of(trainer, watch, steps, inputs, importance.measured if importance else 0)


def course_of(
    trainer: RecoveryTrainer, watch: Watch, steps: Steps, inputs: RecoveryInputs, measured: int
) -> Course:
    """Return the course of a training that has ended."""
    state = trainer.state
    passes = 1 if trainer.objective.dense is None else 2  # forward passes of a token without a backward pass
    held = evaluations(state.log_history)
    step_cost = steps.tokens * (BACKWARD + passes - 1)
    curve = tuple(
        (step * step_cost + (i + 1) * passes * inputs.holdout.tokens, loss)
        for i, (step, loss) in enumerate(held)
    )
    finite = [(loss, step) for step, loss in held if math.isfinite(loss)]
    best = min(finite)[1] if finite else 0
    cost = (curve[-1][0] if curve else 0) + (state.global_step - held[-1][0]) * step_cost
    return Course(
        curve=curve,
        best=best,
        cost=cost + measured * passes,
        steps=state.global_step,
        planned=steps.count,
        stopped=watch.stopped,
    )


def arguments(
    method: TrainingOptions, steps: Steps, inputs: RecoveryInputs, device: torch.device, *, fresh: bool
) -> TrainingArguments:
    """Return the Trainer's arguments."""
    every = max(1, math.ceil(steps.count / method.evaluations))
    made = TrainingArguments(
        output_dir=str(inputs.folder / "trainer"),
        max_steps=steps.count,
        per_device_train_batch_size=steps.batch,
        per_device_eval_batch_size=max(1, inputs.batch_tokens // max(map(len, inputs.holdout.samples))),
        gradient_accumulation_steps=steps.accumulated,
        learning_rate=method.learning_rate,
        lr_scheduler_type=method.rate,
        warmup_steps=math.ceil(method.warmup * steps.count),
        weight_decay=method.weight_decay,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=fresh,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=max(1, min(every, steps.count // 50)),
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        label_names=[],
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=device.type != "cpu",
        gradient_checkpointing=method.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if method.gradient_checkpointing else None,
        ddp_find_unused_parameters=False,
        use_cpu=device.type == "cpu",
        seed=inputs.seed,
        report_to=method.report_to,
        disable_tqdm=True,
    )
    made._n_gpu = min(made.n_gpu, 1)  # one process drives one device: torchrun starts more
    return made


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, loss on the hold-out text) of a Trainer's log."""
    return [(int(entry["step"]), float(entry["eval_loss"])) for entry in history if "eval_loss" in entry]


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint of a Trainer; newer ones, which a kill left unfinished, are removed.

    The Trainer writes trainer_state.json last.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            log.warning("%s is not complete: training continues from the checkpoint before it", path)
            shutil.rmtree(path, ignore_errors=True)
        else:
            return str(path)
    return None


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"
