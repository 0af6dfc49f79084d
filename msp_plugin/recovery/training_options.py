"""The options of training on text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from msp_plugin.errors import RecipeError
from msp_plugin.models.offload import input_embeddings
from msp_plugin.recovery.base import Recovery

SCHEDULES = ("all", "ist")
RATES = ("cosine", "linear", "constant_with_warmup")


@dataclass(frozen=True)
class TrainingOptions(Recovery):
    """The options that all trained methods share.

    Args:
        tokens: of the text that is trained on, over and over if the data has fewer.
        step_tokens: tokens of one step of the optimizer.
        learning_rate: the highest one; None, if a method allows it, for 1 / hidden size of the model.
        rate: how the learning rate falls: ``cosine``, ``linear`` or ``constant_with_warmup``.
        warmup: share of the steps in which it rises from 0.
        weight_decay: AdamW's, of all but norms and biases.
        kl_weight: share of the KL divergence from the dense model in the loss, the rest is cross entropy; None takes 1
            where there is a dense model, else 0.
        temperature: of the KL divergence.
        layers: ``all`` trains the adapters of all blocks, ``ist`` those of few blocks at a time (see ist).
        ist_start: the importance that ``ist`` starts from: ``zero``, or ``sensitivity`` of the run's measurement.
        evaluations: how often the loss on the hold-out text is measured, and the state saved.
        evaluation_tokens: hold-out tokens of each: the fewest last samples with as many, or all; other hold-out samples
            are neither trained on nor judged.
        patience: evaluations without a better loss that end training; 0 never does.
        gradient_checkpointing: keep one activation for each block, and run each once more in the backward pass.
        adapter: a directory that gets the adapter before it is merged, as peft saves it; none if it is empty.
        report_to: ``none``, or an integration of transformers such as ``tensorboard``.
    """

    by_calibration = False

    tokens: int = 1_000_000
    step_tokens: int = 4096
    learning_rate: float | None = 5e-4
    rate: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    kl_weight: float | None = None
    temperature: float = 1.0
    layers: str = "all"
    ist_start: str = "zero"
    evaluations: int = 10
    evaluation_tokens: int = 16384
    patience: int = 0
    gradient_checkpointing: bool = False
    adapter: str = ""
    report_to: str = "none"

    def __post_init__(self) -> None:
        for option, least in (
            ("tokens", 1),
            ("step_tokens", 1),
            ("evaluations", 1),
            ("evaluation_tokens", 1),
            ("patience", 0),
        ):
            if getattr(self, option) < least:
                raise RecipeError(
                    f"{self.name}: {option} = {getattr(self, option)}", hint=f"give at least {least}"
                )
        for option in ("learning_rate", "temperature"):
            value = getattr(self, option)
            if value is not None and not 0 < value < math.inf:
                raise RecipeError(f"{self.name}: {option} = {value}", hint="give a number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise RecipeError(f"{self.name}: weight_decay = {self.weight_decay}", hint="give at least 0")
        for option in ("warmup", "kl_weight"):
            value = getattr(self, option)
            if value is not None and not 0 <= value <= 1:
                raise RecipeError(f"{self.name}: {option} = {value} is no share", hint="give 0 to 1")
        for option, known in (("rate", RATES), ("layers", SCHEDULES), ("ist_start", ("zero", "sensitivity"))):
            if getattr(self, option) not in known:
                raise RecipeError(
                    f"{self.name}: {option} {getattr(self, option)!r} is unknown",
                    hint=f"use {', '.join(known)}",
                )

    def rate_for(self, model: torch.nn.Module) -> float:
        """Return the highest learning rate: as it was asked for, or 1 / hidden size.

        The rule is ours. On models with hidden sizes of 128 and 256, masked LoRA with 25,000 tokens gains with every higher
        rate that was tried, up to 2 / hidden size; models of 7 B (hidden size 4096) are trained at 1e-4 to 5e-4 in the
        papers of LLM-Pruner, IST and PERP.
        """
        return self.learning_rate or 1 / input_embeddings(model).get_parameter("weight").shape[1]

    @property
    def needs_original(self) -> bool:  # type: ignore[override] # a class attribute that may be a property
        return bool(self.kl_weight)

    @property
    def needs_sensitivities(self) -> bool:  # type: ignore[override]
        return self.layers == "ist" and self.ist_start == "sensitivity"
