"""One training by transformers' Trainer: its arguments, its callbacks, and its course.

It needs accelerate, so that this file is imported inside functions only.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState

from msp_plugin.errors import HostError
from msp_plugin.passes.gradients import BACKWARD
from msp_plugin.recovery.base import RecoveryInputs
from msp_plugin.recovery.importance import Importance
from msp_plugin.recovery.objective import Objective
from msp_plugin.recovery.record import LOG
from msp_plugin.recovery.sharding import fetch, give, is_sharded, part, shared_out
from msp_plugin.recovery.training_options import TrainingOptions
from msp_plugin.recovery.training_text import Batch, Samples, Steps, collate, shuffled
from msp_plugin.recovery.tuner import ChangedVectors
from msp_plugin.runtime.disk import cannot_write, is_full

log = logging.getLogger(__name__)

#: In the message of torch.save where it cannot write, which has no number of an error.
_TORCH_WRITES = "PytorchStreamWriter"


@dataclass(frozen=True)
class Course:
    """The course of one training.

    Args:
        curve: (cost in tokens, loss on the hold-out text), the first before training.
        best: step of the state that is in the model now; 0 for the state before training.
        cost: tokens through blocks of either model, a backward pass counts as two forward passes, and the dense model's
            pass over the hold-out, whose outputs are kept, once.
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


class RecoveryTrainer(Trainer):
    """The Trainer, with the loss of recovery, and without dropout and other noise."""

    objective: Objective
    importance: Importance | None = None
    #: The whole model, where FSDP has the one that is trained: checkpoints are written from it and read into it.
    whole: PeftModel | None = None

    def __init__(self, objective: Objective, **arguments: Any):
        super().__init__(**arguments)
        self.objective = objective
        self.model_accepts_loss_kwargs = False  # the loss is a mean: accumulated passes are averaged
        self.remove_callback(PrinterCallback)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        model.eval()
        if self.args.gradient_checkpointing:  # which modules in eval mode do not do
            for module in model.modules():
                module.training = bool(getattr(module, "gradient_checkpointing", False))
        return self.objective.loss(model, inputs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.whole is None:
            super().save_model(output_dir, _internal_call)
            return
        fetch(self.whole, self.model)
        if self.args.should_save:
            self.whole.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.whole is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self.whole.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
        give(self.whole, self.model)

    def _load_best_model(self) -> None:
        if self.whole is None:
            super()._load_best_model()
        else:
            self.whole.load_adapter(self.state.best_model_checkpoint, "default")

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self.importance is not None:  # before gradients are clipped, by the norm of all
            self.importance.drop_gradients(self.state.global_step)
        return loss

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Return the parameters that decay: none of norms, some of which the Trainer does not know by their names."""
        norms = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, ChangedVectors))
        return [name for name in super().get_decay_parameter_names(model) if not name.startswith(norms)]

    @torch.no_grad()
    def batch_loss(self, model: Any, batch: Batch) -> float:
        """Return the loss of a model on a batch of this rank alone; the model is in eval mode afterwards."""
        model.eval()
        return float(self.objective.loss(self.accelerator.unwrap_model(model), self._prepare_inputs(batch)))

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.objective.loss(model, self._prepare_inputs(inputs), again=True), None, None


class Watch(TrainerCallback):
    """Reports progress, writes the log, and ends training that gets no better or is not finite."""

    def __init__(self, method: TrainingOptions, steps: Steps, inputs: RecoveryInputs):
        self.method, self.steps, self.inputs = method, steps, inputs
        self.stopped = ""
        self.file = inputs.folder / LOG
        self.note = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:  # lines after the checkpoint that training continues from go
            self.file.write_text("".join(_line(entry) for entry in state.log_history), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.note = f"loss {logs['loss']:.4f}"
        # Transformers' summary at the end has a mean loss that is wrong where a stopped training went on.
        if state.is_world_process_zero and "train_runtime" not in logs:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tokens = self.steps.tokens
        done = state.global_step * tokens
        self.inputs.progress(self.method.name, done, self.steps.count * tokens, self.note)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not math.isfinite(evaluations(state.log_history)[-1][1]):
            self._stop(state.global_step, control)
        elif out_of_patience(state.log_history, self.method.patience):
            control.should_training_stop = True

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        gradients = [part(p.grad) for p in model.parameters() if p.grad is not None]
        bad = (~torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all()).int()
        if is_sharded():  # else gradients are the same on all ranks, so that all of them stop
            bad = self.inputs.ranks.all_reduce_sum(bad)
        if bad:
            for parameter in model.parameters():
                parameter.grad = None  # so that the optimizer leaves every parameter
            self._stop(state.global_step + 1, control)

    def _stop(self, step: int, control: Any) -> None:
        self.stopped = f"in step {step} of {self.steps.count}"
        control.should_training_stop = True
        control.should_evaluate = control.should_save = False


def train(
    method: TrainingOptions, adapted: PeftModel, objective: Objective, inputs: RecoveryInputs
) -> Course:
    """Train an adapter, or continue a training that was stopped; the model ends with the best state.

    ``inputs.folder`` gets the Trainer's checkpoints and log.jsonl.

    Raises:
        OutputError: the folder takes no more data.
    """
    with shared_out(adapted, objective.head) if is_sharded() else nullcontext(adapted) as model:
        return _train(method, model, adapted, objective, inputs)


def _train(
    method: TrainingOptions, model: PeftModel, whole: PeftModel, objective: Objective, inputs: RecoveryInputs
) -> Course:
    """Train ``model``, which is ``whole`` or its copy for FSDP; ``whole`` ends with the best state."""
    steps = Steps.plan(method, inputs.data, inputs.batch_tokens, inputs.ranks.size)
    inputs = replace(inputs, holdout=inputs.holdout.cut(method.evaluation_tokens)[1])
    # Optimizer states of one process and of FSDP are different files: neither goes on from the other's.
    folder = inputs.folder / "trainer" / (steps.name if model is whole else f"{steps.name}-fsdp")
    checkpoint = inputs.ranks.on_rank_zero(lambda: last_checkpoint(folder))
    order = shuffled(len(inputs.data), steps.count * steps.samples, inputs.seed)
    trainer = RecoveryTrainer(
        objective,
        model=model,
        args=arguments(method, steps, inputs, folder, objective.device, fresh=checkpoint is None),
        data_collator=collate,
        train_dataset=Samples(inputs.data.samples, order),
        eval_dataset=Samples(inputs.holdout.samples, range(len(inputs.holdout))),
    )
    if model is not whole:
        trainer.whole = whole
        fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        if not all(inputs.ranks.gather(lambda: fsdp is not None)):
            raise HostError(
                "FSDP shares out among GPUs, and the models stay on the CPU of some rank",
                hint="it needs GPUs that hold both models before training: use larger ones, or train on the CPU without FSDP",
            )
        assert fsdp is not None, "all ranks have one"
        fsdp.mixed_precision_policy = None  # models are trained in their own dtype
        fsdp.state_dict_config = fsdp.optim_state_dict_config = None
        fsdp.set_state_dict_type("SHARDED_STATE_DICT")  # of the optimizer
    watch = Watch(method, steps, inputs)
    callbacks: list[TrainerCallback] = [watch]
    if method.layers == "ist":
        trainer.importance = Importance(model, trainer.batch_loss, steps, inputs, method)
        callbacks.append(trainer.importance)
    for callback in callbacks:
        trainer.add_callback(callback)
    try:
        if checkpoint is not None and _has_ended(trainer, checkpoint, method.patience):
            if trainer.state.best_model_checkpoint is not None:
                whole.load_adapter(trainer.state.best_model_checkpoint, "default")
            for callback in callbacks:  # they read the state
                callback.on_train_begin(trainer.args, trainer.state, trainer.control)
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
    except Exception as error:
        if is_full(error) or _TORCH_WRITES in str(error):
            raise cannot_write(inputs.folder, error) from error
        raise
    return course_of(trainer, watch, steps, inputs)


def _has_ended(trainer: Trainer, checkpoint: str, patience: int) -> bool:
    """Return True if training ended early at a checkpoint, whose state the trainer then has.

    Without that, a Trainer would go on until it evaluates again.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if not out_of_patience(state.log_history, patience):
        return False
    state.is_local_process_zero = trainer.is_local_process_zero()
    state.is_world_process_zero = trainer.is_world_process_zero()
    trainer.state = state
    return True


def course_of(trainer: RecoveryTrainer, watch: Watch, steps: Steps, inputs: RecoveryInputs) -> Course:
    """Return the course of a training that has ended."""
    state = trainer.state
    measured = trainer.importance.measured if trainer.importance is not None else 0
    passes = 1 if trainer.objective.dense is None else 2  # forward passes of a token without a backward pass
    held = evaluations(state.log_history)
    step_cost = steps.tokens * (BACKWARD + passes - 1)
    curve = tuple(
        (step * step_cost + (i + passes) * inputs.holdout.tokens, loss) for i, (step, loss) in enumerate(held)
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
    method: TrainingOptions,
    steps: Steps,
    inputs: RecoveryInputs,
    folder: Path,
    device: torch.device,
    *,
    fresh: bool,
) -> TrainingArguments:
    """Return the Trainer's arguments; it writes its checkpoints into ``folder``."""
    every = max(1, math.ceil(steps.count / method.evaluations))
    made = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps.count,
        per_device_train_batch_size=steps.batch,
        per_device_eval_batch_size=_evaluated_together(inputs),
        gradient_accumulation_steps=steps.accumulated,
        learning_rate=method.rate_for(inputs.model),
        lr_scheduler_type=method.rate,
        warmup_steps=min(math.ceil(method.warmup * steps.count), steps.count - 1),  # the first one has rate 0
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
    # Whatever accelerate's launcher asks for: models are trained in their own dtype.
    made.mixed_precision = "no"
    return made


def _evaluated_together(inputs: RecoveryInputs) -> int:
    """Return the samples of a batch of the hold-out.

    Several ranks fill their last batches up with samples that come again, which must not count: batches of one or full ones.
    """
    count, ranks = len(inputs.holdout), inputs.ranks.size
    most = max(1, inputs.batch_tokens // max(map(len, inputs.holdout.samples)))
    if ranks == 1:
        return most
    return max(size for size in range(1, most + 1) if size == 1 or count % (size * ranks) == 0)


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, loss on the hold-out text) of a Trainer's log."""
    return [(int(entry["step"]), float(entry["eval_loss"])) for entry in history if "eval_loss" in entry]


def out_of_patience(history: Sequence[Mapping[str, Any]], patience: int) -> bool:
    """Return True if as many evaluations as ``patience`` were no better than one before them; never if it is 0."""
    losses = [loss for _, loss in evaluations(history)]
    return bool(patience and losses) and len(losses) - 1 - losses.index(min(losses)) >= patience


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
    return json.dumps(entry, sort_keys=True) + "\n"  # as in the checkpoints of a stopped training
