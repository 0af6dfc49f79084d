"""A host runs a pruning method over a whole model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from msp_plugin.checkpoint.recount import PruneStats
from msp_plugin.checkpoint.saved_names import saved_names
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import TextSplit
from msp_plugin.errors import RecipeError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.passes.reach import check_called
from msp_plugin.plan.units import UnitTable
from msp_plugin.records.run import Outcome
from msp_plugin.recovery.base import Recovery, check_runs_by_block
from msp_plugin.recovery.masks import Masks
from msp_plugin.recovery.record import Recovered
from msp_plugin.runtime.context import RunContext
from msp_plugin.search.allocate import check_model
from msp_plugin.search.resolve import ResolvedOptions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

#: Names the model that is kept where a recovery fails.
MAYBE_CHANGED = "the pruned model, which the recovery may have begun to change,"


@dataclass(frozen=True)
class PruneInputs:
    """The inputs of a host beside the model.

    Args:
        text: the samples, split as the search asks.
        batch: samples per forward pass.
        tokenizer: saved beside the model; some hosts also read it.
        trust_remote_code: run the model repository's code.
        out: the directory of the result; a host keeps the pruned model beside it where a recovery of its recipe fails.
    """

    text: TextSplit
    batch: int
    tokenizer: PreTrainedTokenizerBase
    trust_remote_code: bool = False
    out: Path | None = None

    @property
    def data(self) -> CalibrationSet:
        """The samples that calibrate the final pruning."""
        return self.text.pruning


@dataclass(frozen=True)
class Pruned:
    """The result of a host.

    Args:
        outcome, stats: the allocation that it pruned to, and the zeros counted afterwards; None for a recipe without
            mixed sparsity.
        recovered: the recoveries that its recipe held, in order. The last one has no measurements where other
            modifiers have changed the model since.
    """

    outcome: Outcome | None = None
    stats: PruneStats | None = None
    recovered: tuple[Recovered, ...] = ()


def check_layers(model: PreTrainedModel, options: ResolvedOptions, inputs: PruneInputs) -> UnitTable:
    """Return the units to prune.

    Raise, before any work, if the options do not fit the model, or layers cannot be saved or get no input.

    Raises:
        MSPError: see check_model, saved_names and check_called.
    """
    table = check_model(model, options)
    saved_names(model, (layer.name for layer in table.layers))
    if options.pruner.needs_statistics:
        check_called(model, table, inputs.data)
    return table


def check_recovery(
    recovery: Recovery, model: PreTrainedModel, plan: ResolvedOptions | None, sample: torch.Tensor
) -> None:
    """Check a recovery on the dense model, so that whatever it cannot do with the pruned one is known before the work.

    Its masks are as sparse as the plan asks for, and have zeros within rows if all of the plan's levels make such, or
    one of a finished allocation. If only some levels do, what a search may choose is not known: a warning says what
    would be refused then.

    Args:
        plan: None for a pruning that is not ours; then the masks have no zeros.
        sample: int64[T], which the model is run on, if the recovery asks something of its blocks.

    Raises:
        MSPError: see Recovery.check and check_runs_by_block.
    """
    shapes = {layer.name: (layer.out_features, layer.in_features) for layer in prunable_layers(model).layers}
    sparse = [] if plan is None else [level for level in plan.menu if not level.is_dense]
    masking = [level for level in sparse if level.masks]
    given = plan is not None and plan.given is not None
    certain = bool(masking) and (given or len(masking) == len(sparse))
    planned = Masks.planned(shapes, Fraction(0) if plan is None else plan.sparsity)
    recovery.check(model, planned if certain else Masks.planned(shapes, Fraction(0)))
    check_runs_by_block(recovery, model, sample)
    if masking and not certain:
        try:
            recovery.check(model, planned)
        except RecipeError as error:
            log.warning(
                "the recovery will be refused after the pruning if the search chooses %s: %s (%s)",
                " or ".join(level.name for level in masking),
                error.message,
                error.hint,
            )


class Host(Protocol):
    """Runs a pruning method over a model.

    ``on_all_ranks`` is True if ranks share the pruning; otherwise they share only the search.
    """

    name: ClassVar[str]
    on_all_ranks: ClassVar[bool]

    @property
    def steps(self) -> Mapping[str, Any]:
        """The stages of the recipe that the host runs; empty for a host without recipes."""

    @property
    def prunes_only(self) -> bool:
        """True if the host prunes to the options and does nothing else, such as quantizing."""

    def check(self, model: PreTrainedModel, options: ResolvedOptions | None, inputs: PruneInputs) -> None:
        """Raise, before any work, if the host cannot run the model or the options do not fit it."""

    def prune(
        self,
        model: PreTrainedModel,
        options: ResolvedOptions | None,
        inputs: PruneInputs,
        context: RunContext,
        *,
        announce: bool = True,
    ) -> Pruned:
        """Search an allocation, prune the model to it in place, and recount its zeros.

        Args:
            options: None only for a recipe without mixed sparsity.
            announce: call the plugins' observers; False for a baseline.
        """

    def save(self, model: PreTrainedModel, directory: Path) -> None:
        """Write the weights and config of a model that this host has pruned."""

    def forget(self) -> None:
        """Release the last model, so that its memory can be freed."""
