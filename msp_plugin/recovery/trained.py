"""Recovery by training on text: checks and order of work, which all trained methods share."""

from __future__ import annotations

import importlib.util
import math
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from msp_plugin.errors import DataError, HostError, ModelError, NumericsError, RecipeError
from msp_plugin.models.offload import offloaded_module
from msp_plugin.recovery.base import RecoveryInputs, RecoveryResult, check_sensitivities
from msp_plugin.recovery.masks import Masks
from msp_plugin.recovery.objective import Objective, objective
from msp_plugin.recovery.training_options import TrainingOptions
from msp_plugin.recovery.weight_change import WeightChange
from msp_plugin.runtime.files import check_output, expanded

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

#: File in the state of a recovery with the path of the directory into which it has written its adapter.
WRITTEN = "adapter_written"


@dataclass(frozen=True)
class TrainedRecovery(TrainingOptions):
    """Training of an adapter through transformers' Trainer and accelerate, which is merged at the end.

    Adapters are trained in float32 with AdamW, whatever the model's dtype. The state with the lowest hold-out loss is
    merged, none if that is the state before training. Where the loss stops being finite, training ends with the best
    state before that. A stopped training continues from its last evaluation.
    """

    def check(self, model: PreTrainedModel, masks: Masks) -> None:
        """Raise, before any work, if an option does not fit the model.

        Raises:
            HostError: peft or accelerate is missing, or accelerate is configured for DeepSpeed or an old FSDP.
            ModelError: weights are offloaded, or in a dtype that is not trained.
            RecipeError: an option does not fit its layers.
        """
        require_training()
        self._check_written()
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
            raise HostError(
                f"accelerate is configured for DeepSpeed, with which {self.name} does not train",
                hint="configure FSDP, or start it with torchrun: then each process holds the model",
            )
        from msp_plugin.recovery.sharding import check_sharding

        check_sharding(gradient_checkpointing=self.gradient_checkpointing)
        if (name := offloaded_module(model)) is not None:
            raise ModelError(
                f"the weights of {name} are offloaded, and {self.name} trains models in memory",
                hint="use blockwise, or do not offload",
            )
        if model.dtype not in (torch.float32, torch.bfloat16):
            raise ModelError(
                f"the model is in {str(model.dtype).removeprefix('torch.')}, {self.name} trains float32 and bfloat16",
                hint="load it with dtype bfloat16 or float32",
            )
        self.check_layers(masks)

    def check_layers(self, masks: Masks) -> None:
        """Raise RecipeError if an option does not fit the layers."""

    def _check_written(self) -> None:
        """Raise if what is to be written beside the result cannot be.

        Raises:
            OutputError: the adapter's directory cannot be written, or holds something else.
            RecipeError: report_to names nothing that is installed.
        """
        for adapter in self.writes:
            left = (adapter / "adapter_config.json").is_file()  # by this recovery, perhaps (see recover)
            if not left:
                check_output(adapter)
        if self.report_to != "none":
            from transformers.integrations import integration_utils

            known = integration_utils.get_available_reporting_integrations()  # type: ignore[no-untyped-call]
            if self.report_to not in known:
                raise RecipeError(
                    f"{self.name}: report_to {self.report_to!r} is not installed, or transformers does not know it",
                    hint=f"use none{''.join(f', {name}' for name in sorted(known))}",
                )

    @abstractmethod
    def config(self, inputs: RecoveryInputs) -> PeftConfig:
        """Return peft's configuration of the adapter that is trained."""

    def tokens_before(self, inputs: RecoveryInputs) -> int:
        """Return the cost of ``config`` in tokens through blocks (see RecoveryResult)."""
        return 0

    @abstractmethod
    def merge(self, adapted: PeftModel) -> None:
        """Merge the adapter into the weights: in float32, rounded once, with every zero kept."""

    def share_of_kl(self, inputs: RecoveryInputs) -> float:
        """Return ``kl_weight``, or its default."""
        if self.kl_weight is None:
            return 0.0 if inputs.original is None else 1.0
        return self.kl_weight

    def objective(self, inputs: RecoveryInputs) -> AbstractContextManager[Objective]:
        """Return the context of the loss (see objective.objective)."""
        weight = self.share_of_kl(inputs)
        if weight and inputs.original is None:
            raise RecipeError(
                f"{self.name}: kl_weight = {weight}, but there is no dense model to compare with",
                hint="give the original, or kl_weight 0 for the cross entropy alone",
            )
        dense = inputs.original if weight else None
        ids = inputs.data.samples[0]
        return objective(inputs.model, dense, ids, weight=weight, temperature=self.temperature)

    @property
    def writes(self) -> tuple[Path, ...]:
        return (expanded(self.adapter),) if self.adapter else ()

    def recover(self, inputs: RecoveryInputs) -> RecoveryResult:
        self.check(inputs.model, inputs.masks)
        for adapter in self.writes:
            check_adapter(adapter, [inputs.folder])
        check_sensitivities(self, any(inputs.sensitivities.values()))
        for use, data in (("to train on", inputs.data), ("that is held out", inputs.holdout)):
            if not data.tokens:
                raise DataError(f"{self.name} has no text {use}", hint="give more text, or shorter samples")
        from msp_plugin.recovery.trainer import train

        config = self.config(inputs)
        with adapted(inputs.model, config, inputs.seed) as model, self.objective(inputs) as loss:
            course = train(self, model, loss, inputs)
            if course.improved:
                if self.adapter and inputs.ranks.rank == 0:
                    (inputs.folder / WRITTEN).write_text(str(expanded(self.adapter).resolve()))
                    save_adapter(model, inputs.model, expanded(self.adapter))
                self.merge(model)
            elif course.stopped:
                raise NumericsError(
                    f"{self.name}: the loss or its gradient is not finite {course.stopped}, and no state before "
                    "that is better than the pruned model",
                    hint=f"give a smaller learning_rate than {self.rate_for(inputs.model):g}, or dtype float32",
                )
        notes = course.notes(self)
        if self.learning_rate is None:
            notes += (f"the learning rate was {self.rate_for(inputs.model):.2g}, 1 / hidden size",)
        if self.adapter and not course.improved:
            notes += (f"no adapter was written to {self.adapter}",)
        before = self.tokens_before(inputs)
        curve = tuple((before + tokens, loss) for tokens, loss in course.curve)
        return RecoveryResult(before + course.cost, curve, notes)


def check_adapter(adapter: Path, states: Iterable[Path]) -> None:
    """Raise unless a directory can get an adapter.

    Args:
        states: of recoveries that may have written an adapter there before they were stopped.

    Raises:
        OutputError: it cannot be written, or holds something that none of them has written.
    """
    records = (state / WRITTEN for state in states)
    if not any(file.is_file() and file.read_text() == str(adapter.resolve()) for file in records):
        check_output(adapter)


@dataclass(frozen=True)
class AdapterRecovery(TrainedRecovery):
    """Training of a weight change that keeps zeros by construction.

    Args:
        norms: also train the norms and the biases of the layers.
    """

    norms: bool = False

    @abstractmethod
    def change(self, inputs: RecoveryInputs) -> WeightChange:
        """Return the change of a layer's weight."""

    def config(self, inputs: RecoveryInputs) -> PeftConfig:
        from msp_plugin.recovery.tuner import SparseAdapterConfig

        change = self.change(inputs)
        layers = [name for name in inputs.masks if change.changes(name)]
        return SparseAdapterConfig.of(
            change,
            layers,
            vectors=vector_modules(inputs.model) if self.norms else [],
            biases=self.norms,
            seed=inputs.seed,
        )

    def merge(self, adapted: PeftModel) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in adapted.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()


@contextmanager
def adapted(model: PreTrainedModel, config: PeftConfig, seed: int = 0) -> Iterator[PeftModel]:
    """Yield peft's model around a model, which afterwards has its own layers, flags and mode again.

    Args:
        seed: of what an adapter's start draws from torch's generators, which are left as they were.
    """
    from msp_plugin.recovery.tuner import add_adapter

    flags = [(p, p.requires_grad) for p in model.parameters()]
    training, cache = model.training, model.config.use_cache if hasattr(model.config, "use_cache") else None
    dropout = _own_dropout(model)
    with torch.random.fork_rng({p.device for p in model.parameters() if p.is_cuda}):
        torch.manual_seed(seed)
        wrapped = add_adapter(model, config)
    try:
        for holder, name, _ in dropout:
            setattr(holder, name, 0.0)
        yield wrapped
    finally:
        for holder, name, value in dropout:
            setattr(holder, name, value)
        model.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]
        wrapped.unload()
        vars(model).pop("peft_config", None)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.train(training)
        if cache is not None:
            model.config.use_cache = cache


def _own_dropout(model: torch.nn.Module) -> list[tuple[object, str, float]]:
    """Return (object, attribute, value) of the dropout that modules apply by numbers of their own or of their config.

    Modules with gradient checkpointing are trained in training mode (see RecoveryTrainer), which applies it.
    """
    holders = [h for m in model.modules() for h in (m, getattr(m, "config", None)) if hasattr(h, "__dict__")]
    return [
        (holder, name, value)
        for holder in {id(holder): holder for holder in holders}.values()
        for name, value in vars(holder).items()
        if "drop" in name and isinstance(value, float)
    ]


def save_adapter(adapted: PeftModel, model: PreTrainedModel, directory: Path) -> None:
    """Write an adapter as peft does, with the name of the model that it is for."""
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = model.name_or_path
    try:
        adapted.save_pretrained(str(directory), save_embedding_layers=False)
    finally:
        config.base_model_name_or_path = ""


def vector_modules(model: torch.nn.Module) -> list[str]:
    """Return the names of the modules without parts of their own whose parameters are all vectors, such as norms."""
    found = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if name and own and all(p.dim() == 1 for p in own) and not any(module.children()):
            found.append(name)
    return found


def check_positive(method: str, **options: float) -> None:
    """Raise RecipeError unless ranks, counts and factors are finite numbers above 0."""
    for option, value in options.items():
        if not 0 < value < math.inf:
            raise RecipeError(f"{method}: {option} = {value}", hint="give a number above 0")


def check_rank(method: str, option: str, rank: int, masks: Masks) -> None:
    """Raise if a rank is larger than a side of a layer.

    Raises:
        RecipeError: the message names the smallest such layer.
    """
    side, name = min((min(shape), name) for name, shape in masks.shapes.items())
    if rank > side:
        out, width = masks.shapes[name]
        raise RecipeError(
            f"{method}: {option} = {rank}, but {name} has {out} x {width} weights",
            hint=f"give at most {side}",
        )


def require_training() -> None:
    """Raise unless peft and accelerate are installed.

    Raises:
        HostError: one is missing; the hint names the extra that installs them.
    """
    for package in ("peft", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise HostError(f"{package} is not installed", hint="pip install 'msp_plugin[recovery]'")
