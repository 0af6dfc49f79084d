"""The base class of recovery methods, which change surviving weights only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import ModelError, RecipeError
from msp_plugin.models.device import on_best_device
from msp_plugin.models.offload import offloaded_module
from msp_plugin.passes.by_block import runs_by_block
from msp_plugin.progress import StepProgress, no_progress
from msp_plugin.recovery.masks import Masks
from msp_plugin.runtime.ranks import ALONE, Ranks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RecoveryInputs:
    """The inputs of a recovery.

    Args:
        model: the sparse model, on the device to work on; it is changed in place.
        masks: its zeros.
        data: samples to recover on.
        holdout: samples that judge the result, none of them in ``data``.
        original: the dense model, on the same device; None where there is none.
        folder: a directory for the state of a stopped recovery, which the same call continues.
        sensitivities: by layer, the sensitivity that the run measured; empty where it measured none.
        seed: of every random choice.
        batch_tokens: tokens of one forward pass.
    """

    model: PreTrainedModel
    masks: Masks
    data: CalibrationSet
    holdout: CalibrationSet
    original: PreTrainedModel | None
    folder: Path
    sensitivities: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    batch_tokens: int = 2048
    progress: StepProgress = no_progress
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class RecoveryResult:
    """The cost and the course of a recovery.

    Args:
        tokens: tokens through the model's blocks; a backward pass counts as two forward passes.
        curve: (tokens, loss on the hold-out text in nats per token), in order; empty where none was measured.
        notes: remarks for a reader of the result.
    """

    tokens: int
    curve: tuple[tuple[int, float], ...] = ()
    notes: tuple[str, ...] = ()


class Recovery(ABC):
    """A recovery method. Subclasses are frozen dataclasses whose fields are recipe options."""

    name: ClassVar[str]
    #: True if the method reads the dense model.
    needs_original: ClassVar[bool] = True
    #: True if calibration samples are enough, so that the method may stand in a recipe of llm-compressor.
    by_calibration: ClassVar[bool] = True
    #: True if the weights of the sparse model may stay on disk.
    offloads: ClassVar[bool] = False
    #: True if both models must have as many blocks, because the method holds them side by side.
    same_depth: ClassVar[bool] = False
    #: True if the layers that are left must be as large as the original's.
    same_shapes: ClassVar[bool] = False
    #: True if the method runs the blocks of the models one at a time.
    by_block: ClassVar[bool] = False
    #: True if the method starts from the sensitivities that the run measured.
    needs_sensitivities: ClassVar[bool] = False

    @property
    def writes(self) -> tuple[Path, ...]:
        """The directories that the method writes beside the result."""
        return ()

    def check(self, model: PreTrainedModel, masks: Masks) -> None:  # noqa: B027 - optional to override
        """Raise, before any work, if an option does not fit the model."""

    @abstractmethod
    def recover(self, inputs: RecoveryInputs) -> RecoveryResult:
        """Change the surviving weights of the model in place.

        The caller compares the zeros afterwards and writes nothing if one was filled in.

        Raises:
            NumericsError: the loss is not finite.
        """


def check_sensitivities(recovery: Recovery, measured: bool) -> None:
    """Raise RecipeError if a recovery starts from sensitivities and the run has none."""
    if recovery.needs_sensitivities and not measured:
        raise RecipeError(
            f"{recovery.name} starts from the run's sensitivities, and the run has measured none",
            hint="use ist_start: zero, or a run of an allocator that reads sensitivities, such as search",
        )


def check_in_memory(method: str, model: PreTrainedModel) -> None:
    """Raise ModelError if weights of a model that a method changes in memory are offloaded."""
    if (name := offloaded_module(model)) is not None:
        raise ModelError(
            f"{method} changes weights in memory, and those of {name} are offloaded",
            hint="leave only the original's weights on disk",
        )


def check_runs_by_block(recovery: Recovery, model: PreTrainedModel, sample: torch.Tensor) -> None:
    """Raise ModelError if a recovery runs blocks one at a time and the model's cannot be; ``sample`` is int64[T]."""
    if not recovery.by_block:
        return
    with on_best_device(model):
        runs = runs_by_block(model, sample)
    if not runs:
        raise ModelError(
            f"{type(model).__name__} hands more than the hidden state from block to block, so {recovery.name} cannot run it",
            hint="use another recovery method (see `msp plugins`)",
        )
