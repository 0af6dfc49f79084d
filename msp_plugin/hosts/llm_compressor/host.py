"""llm-compressor as a host: run a recipe through ``oneshot``, and clean up if it fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from msp_plugin.checkpoint.run_files import run_record, write_files
from msp_plugin.checkpoint.saving import SHARD_BYTES, kept_if_it_fails
from msp_plugin.errors import ModelError, MSPError
from msp_plugin.hosts.base import MAYBE_CHANGED, Pruned, PruneInputs, check_layers
from msp_plugin.hosts.llm_compressor.passes import shares_keys
from msp_plugin.hosts.llm_compressor.recipe import Recipe
from msp_plugin.models.layers import fused_experts
from msp_plugin.recovery.step import RecoveryText
from msp_plugin.runtime.context import RunContext
from msp_plugin.search.resolve import ResolvedOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from msp_plugin.hosts.llm_compressor.modifier import MixedSparsityModifier
    from msp_plugin.hosts.llm_compressor.recovery import RecoveryModifier

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LLMCompressor:
    """Runs a recipe of llm-compressor; its MixedSparsityModifier, if it has one, takes the resolved options."""

    recipe: Recipe

    name: ClassVar[str] = "llmcompressor"
    on_all_ranks: ClassVar[bool] = False

    @property
    def steps(self) -> Mapping[str, Any]:
        """The recipe's stages."""
        return self.recipe.steps

    @property
    def prunes_only(self) -> bool:
        """True if the recipe has a MixedSparsityModifier and otherwise only RecoveryModifiers."""
        return self.recipe.mixes

    def check(self, model: PreTrainedModel, options: ResolvedOptions | None, inputs: PruneInputs) -> None:
        """Raise, before any work, if the host cannot run the model or the options do not fit it.

        Raises:
            MSPError: see check_layers; or the model is calibrated in one pass, and the recipe has a RecoveryModifier.
        """
        one_pass = options is not None and shares_keys(model)
        if one_pass and _recoveries(self.recipe.build(options)[0].modifiers):
            raise ModelError(
                f"{type(model).__name__} is calibrated in one pass for all modifiers, and RecoveryModifier runs after the "
                "pruning",
                hint="leave its line out, and run `msp recover` with another method on the pruned model",
            )
        if options is None or fused_experts(model):  # oneshot splits experts before the modifier sees them
            return
        check_layers(model, options, inputs)

    def prune(
        self,
        model: PreTrainedModel,
        options: ResolvedOptions | None,
        inputs: PruneInputs,
        context: RunContext,
        *,
        announce: bool = True,
    ) -> Pruned:
        """Run the recipe on a loaded model (see Host).

        Raises:
            MSPError: one of our errors, even if the host has wrapped it. No hook is left in the model.
        """
        from llmcompressor.entrypoints.oneshot import oneshot
        from torch.utils.data import DataLoader

        recipe, ours = self.recipe.build(options)
        one_pass = ours is not None and shares_keys(model)
        if one_pass:
            log.warning(
                "%s is calibrated in one pass of the whole model, because its later blocks read keys and values of "
                "earlier ones; so the inputs of every block come from dense blocks",
                type(model).__name__,
            )
        if ours is not None:
            ours.report_to(context.progress, announce=announce, fresh=context.fresh, one_pass=one_pass)
        recoveries = _recoveries(recipe.modifiers)
        for recovery in recoveries:  # not of a baseline, with which the model before the recovery is compared
            text = RecoveryText.of(inputs.text.pruning, inputs.text.test)
            recovery.report_to(
                context.progress, text, active=announce, fresh=context.fresh,
                trust_remote_code=inputs.trust_remote_code,
            )  # fmt: skip
        # Any, because DataLoader also takes lists and oneshot any tokenizer, which their types do not say.
        samples: Any = [{"input_ids": sample} for sample in inputs.data.samples]
        processor: Any = inputs.tokenizer
        with (
            _kept_if_not_recovered(model, ours, recoveries, options, inputs.out),
            _traces_forgotten(),
            _cleaned_up(recipe.modifiers),
        ):
            oneshot(
                model=model,
                recipe=recipe,
                dataset=DataLoader(samples, batch_size=inputs.batch),
                processor=processor,
                trust_remote_code_model=inputs.trust_remote_code,
                pipeline="basic" if one_pass else "independent",
            )
        recovered = tuple(each.recovered for each in recoveries if each.recovered is not None)
        if recovered and recipe.modifiers[-1] is not recoveries[-1]:
            recovered = (*recovered[:-1], replace(recovered[-1], changed=True))
        return Pruned(None, None, recovered) if ours is None else Pruned(ours.outcome, ours.stats, recovered)

    def save(self, model: PreTrainedModel, directory: Path) -> None:
        """Write the weights, config and recipe.yaml as llm-compressor does."""
        model.save_pretrained(directory, save_compressed=True, max_shard_size=SHARD_BYTES)

    def forget(self) -> None:
        """Release the host's session and last model; that model's ``save_pretrained`` then writes no recipe.yaml."""
        from llmcompressor.core import reset_session

        reset_session()


def _recoveries(modifiers: list[Any]) -> list[RecoveryModifier]:
    """Return the recoveries among the modifiers of a recipe."""
    from msp_plugin.hosts.llm_compressor.recovery import RecoveryModifier

    return [modifier for modifier in modifiers if isinstance(modifier, RecoveryModifier)]


@contextmanager
def _kept_if_not_recovered(
    model: PreTrainedModel,
    ours: MixedSparsityModifier | None,
    recoveries: list[RecoveryModifier],
    options: ResolvedOptions | None,
    out: Path | None,
) -> Iterator[None]:
    """If a recovery fails in the block, keep the pruned model beside ``out``, if that is given.

    Raises:
        OutputError: see kept_if_it_fails.
    """
    try:
        yield
    except Exception:  # a bug in a recovery as well, as in kept_if_it_fails
        if out is None or not any(recovery.failed for recovery in recoveries):
            raise
        from msp_plugin.hosts.llm_compressor.recovery import as_pruned

        outcome, stats = (None, None) if ours is None else (ours.outcome, ours.stats)
        record = run_record(outcome, stats, None if options is None else options.seed)
        records = partial(write_files, outcome=outcome, record=record)
        cache = None if options is None else options.cache
        with as_pruned(model), kept_if_it_fails(model, out, records, cache, MAYBE_CHANGED):
            raise


@contextmanager
def _traces_forgotten() -> Iterator[None]:
    """Make torch.fx release the namespaces that the host traces in the block.

    The host wraps functions in a namespace that refers to the model, and torch keeps such namespaces for ever, so
    every pruned model would stay in memory.
    """
    from torch.fx import _symbolic_trace

    wrapped = getattr(_symbolic_trace, "_wrapped_fns_to_patch", {})
    before = set(wrapped)
    try:
        yield
    finally:
        for key in set(wrapped) - before:
            del wrapped[key]


@contextmanager
def _cleaned_up(modifiers: list[Any]) -> Iterator[None]:
    """Leave no hook in the model and no half-run session behind if the block fails."""
    try:
        yield
    except BaseException as error:
        for modifier in modifiers:
            if hasattr(modifier, "abort"):
                modifier.abort()
            modifier.remove_hooks()
            modifier.finalized_ = True  # the session's reset would otherwise finalize it again
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, MSPError):
            cause = cause.__cause__
        if cause is not None and cause is not error:
            raise cause from error
        raise
