"""A host runs a pruning method over a whole model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from msp_plugin.checkpoint.recount import PruneStats
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import TextSplit
from msp_plugin.records.run import Outcome
from msp_plugin.runtime.context import RunContext
from msp_plugin.search.resolve import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PruneInputs:
    """What a host reads beside the model.

    Args:
        text: split as the search asks.
        batch: samples of one forward pass.
        tokenizer: saved beside the model, and asked for by some hosts.
        trust_remote_code: the model runs code of its repository.
    """

    text: TextSplit
    batch: int
    tokenizer: PreTrainedTokenizerBase
    trust_remote_code: bool = False

    @property
    def data(self) -> CalibrationSet:
        """The samples that calibrate the final pruning."""
        return self.text.pruning


@dataclass(frozen=True)
class Pruned:
    """What a host made: the allocation that it pruned to, and the zeros counted afterwards.

    Both are None where the host ran a recipe without mixed sparsity.
    """

    outcome: Outcome | None = None
    stats: PruneStats | None = None


class Host(Protocol):
    """Runs a pruning method over a model.

    ``on_all_ranks`` is True if the pruning is shared among ranks; else they share the search alone.
    """

    name: str
    on_all_ranks: bool

    def check(self, model: PreTrainedModel, options: Plan | None, inputs: PruneInputs) -> None:
        """Raise what the model shows before any work: the host cannot run it, or the options do not fit it."""

    def prune(
        self,
        model: PreTrainedModel,
        options: Plan | None,
        inputs: PruneInputs,
        context: RunContext,
        *,
        announce: bool = True,
    ) -> Pruned:
        """Search, prune the model in place and recount its zeros.

        Args:
            announce: tell the plugins' observers; False for a baseline.
        """

    def save(self, model: PreTrainedModel, directory: Path) -> None:
        """Write the weights and config of a model that this host has pruned."""

    def forget(self) -> None:
        """Let go of the last model."""
