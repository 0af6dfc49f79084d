"""The base class of recovery methods, which change surviving weights only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.progress import StepProgress, no_progress
from msp_plugin.recovery.masks import Masks
from msp_plugin.runtime.ranks import ALONE, Ranks

if TYPE_CHECKING:
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

    def check(self, model: PreTrainedModel, masks: Masks) -> None:  # noqa: B027 - optional to override
        """Raise, before any work, if an option does not fit the model."""

    @abstractmethod
    def recover(self, inputs: RecoveryInputs) -> RecoveryResult:
        """Change the surviving weights of the model in place.

        The caller compares the zeros afterwards and writes nothing if one was filled in.

        Raises:
            NumericsError: the loss is not finite.
        """
