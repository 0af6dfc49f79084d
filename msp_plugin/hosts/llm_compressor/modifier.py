"""``MixedSparsityModifier``: search and prune mixed sparsity with one line of an llm-compressor recipe."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from llmcompressor.core import Event, State, active_session
from llmcompressor.core.events import EventType
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import ConfigDict, PrivateAttr, model_validator
from torch.utils.data import RandomSampler, SequentialSampler

from msp_plugin.checkpoint.recount import PruneStats, count_zeros, recount_model
from msp_plugin.checkpoint.run_files import attach_files, run_record
from msp_plugin.checkpoint.saved_names import saved_names
from msp_plugin.checkpoint.saving import check_savable
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import TextSplit, split_text
from msp_plugin.data.tokenize import from_dataloader
from msp_plugin.errors import HostError, ModelError, RecipeError, nearest
from msp_plugin.hosts.llm_compressor import HOST_KEYS
from msp_plugin.hosts.llm_compressor.engines import make_engine
from msp_plugin.hosts.llm_compressor.methods import check_method
from msp_plugin.hosts.llm_compressor.padding import Padding
from msp_plugin.hosts.llm_compressor.passes import check_by_block
from msp_plugin.hosts.llm_compressor.saving import name_experts
from msp_plugin.models.device import on_best_device
from msp_plugin.models.layers import decoder_blocks
from msp_plugin.passes.reach import check_called
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plugins.manager import Plugins
from msp_plugin.progress import ProgressLines, StepProgress
from msp_plugin.records.run import Outcome
from msp_plugin.recovery.record import Recovered, with_recovery
from msp_plugin.search.allocate import allocate, check_model, check_samples
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import ResolvedOptions, resolve

log = logging.getLogger(__name__)


class AfterPruning(Modifier):
    """A modifier that works on the pruned model."""

    def prepare(self, state: State, plan: ResolvedOptions | None = None) -> None:
        """Raise, before an allocation is searched, if it cannot work on the model once that is pruned.

        Args:
            plan: of our modifier; None if another one prunes.
        """


class MixedSparsityModifier(Options, Modifier):
    """Prune each layer to the level that a search has chosen for it.

    The search runs when the modifier is initialised, on the dense model and the calibration data of ``oneshot``. The
    pruning then runs in llm-compressor's pipeline, block by block. Afterwards the zeros are recounted, and the model's
    ``save_pretrained`` also writes allocation.json and run.json.

    Sample recipe::

        sparsity_stage:
          sparsity_modifiers:
            MixedSparsityModifier:
              sparsity: 0.75
              method: sparsegpt

    Args: see ``msp_plugin.search.options.Options``.
    """

    model_config = ConfigDict(extra="forbid")

    requires_calibration_data: bool = True

    _plan: ResolvedOptions = PrivateAttr()
    _plugins: Plugins = PrivateAttr()
    _outcome: Outcome | None = PrivateAttr(default=None)
    _stats: PruneStats | None = PrivateAttr(default=None)
    _engine: Any = PrivateAttr(default=None)
    _zeros_before: dict[str, int] = PrivateAttr(default_factory=dict)
    _announce: bool = PrivateAttr(default=True)
    _fresh: bool = PrivateAttr(default=False)
    _one_pass: bool = PrivateAttr(default=False)
    _alone: bool = PrivateAttr(default=True)
    _steps: int = PrivateAttr(default=0)
    _padding: Padding | None = PrivateAttr(default=None)
    _progress: StepProgress = PrivateAttr(default_factory=lambda: ProgressLines(logger.info))
    _recovered: list[Recovered] = PrivateAttr(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in Options.model_fields and key not in HOST_KEYS:
                    raise RecipeError(
                        f"MixedSparsityModifier has no key {key!r}", hint=nearest(key, Options.model_fields)
                    )
            ours = {key: value for key, value in data.items() if key in Options.model_fields}
            check: Any = Options._known_keys  # pydantic's type of a validator cannot be called
            data = {**data, **check(ours)}
        return data

    @model_validator(mode="after")
    def _resolve(self) -> MixedSparsityModifier:
        self._plugins = Plugins()
        self._plan = resolve(self, self._plugins)
        self.requires_calibration_data = self._plan.needs_data
        return self

    @classmethod
    def of(cls, options: ResolvedOptions, host_arguments: Mapping[str, Any]) -> MixedSparsityModifier:
        """Return a modifier for resolved options, which are not parsed again."""
        modifier = cls.model_construct(**options.spelled.model_dump(), **host_arguments)
        modifier._plugins, modifier._plan = Plugins(), options
        modifier.requires_calibration_data = options.needs_data
        return modifier

    @property
    def outcome(self) -> Outcome | None:
        """The allocation and the cost of the search; None until the modifier is initialised."""
        return self._outcome

    @property
    def stats(self) -> PruneStats | None:
        """The recounted zeros; None until the model is pruned."""
        return self._stats

    def was_recovered(self, recovered: Recovered) -> None:
        """Note a recovery of the pruned model, for its record."""
        self._recovered.append(recovered)

    def report_to(
        self, progress: StepProgress, *, announce: bool = True, fresh: bool = False, one_pass: bool = False
    ) -> None:
        """Set how this run reports and measures, for a caller that checks and saves the model itself.

        Args:
            progress: called with each step.
            announce: call the plugins' observers; False for a baseline.
            fresh: ignore the cached measurements and make them again.
            one_pass: the host calibrates in one pass of the whole model.
        """
        self._progress, self._announce, self._fresh, self._alone = progress, announce, fresh, False
        self._one_pass = one_pass

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        recipe = active_session().lifecycle.recipe
        if sum(isinstance(modifier, type(self)) for modifier in recipe.modifiers) > 1:
            raise RecipeError(
                "the recipe holds more than one MixedSparsityModifier",
                hint="one line covers all layers: give it several levels, or an allocation",
            )
        if (ranks := launched_ranks()) > 1:
            raise HostError(
                f"there are {ranks} ranks, and each would prune the whole model",
                hint="llm-compressor does not sum its statistics over ranks: start it in one process. To share the "
                "search, run `torchrun ... -m msp_plugin allocate` and give the recipe its allocation",
            )
        check_method(self._plan.pruner)
        model = state.model
        table = check_model(model, self._plan)
        if self._plan.needs_data and not self._one_pass:
            check_by_block(model)
        name_experts(model)
        stored = saved_names(model, (layer.name for layer in table.layers))
        if self._alone:
            try:
                check_savable(model)
            except ModelError as error:  # only a warning: the caller may not want to save the model
                log.warning("%s", error)
        data = self._calibration(state)
        if data is not None:
            check_samples(model, data)
        for modifier in recipe.modifiers:
            if isinstance(modifier, AfterPruning):
                modifier.prepare(state, self._plan)
        with on_best_device(model):
            if self._plan.pruner.needs_statistics:
                check_called(model, table, data)
            wanted = self._plan.search_text
            text = TextSplit() if data is None else split_text(data, wanted, warn=self._alone)
            searched = allocate(model, text, self._plan, fresh=self._fresh, progress=self._progress)
        self._outcome = replace(searched, allocation=replace(searched.allocation, stored=stored))
        allocation = self._outcome.allocation
        self._zeros_before = count_zeros(model, allocation)
        if self._announce:
            self._plugins.tell("msp_run_started", allocation=allocation)
        self._engine = make_engine(self._plan.pruner, allocation, self)
        self._guarded(self._engine.initialize, state, **kwargs)
        return True

    def _calibration(self, state: State) -> CalibrationSet | None:
        """Return the calibration samples of oneshot, without padding; None if no step needs them.

        Raises:
            RecipeError: there are none.
        """
        if not self._plan.needs_data:
            return None
        if state.data.calib is None:
            raise RecipeError(
                "MixedSparsityModifier needs calibration data", hint="pass dataset=... to oneshot"
            )
        sampler = getattr(state.data.calib, "sampler", None)
        if isinstance(sampler, RandomSampler):
            log.warning(
                "llm-compressor draws new random calibration samples for every pass, so search and pruning see "
                "different samples, and no two runs are equal. To avoid that, pass "
                "shuffle_calibration_samples=False to oneshot"
            )
        padding, loader = Padding(), state.data.calib
        data = from_dataloader(padding.noted(loader), keep_order=isinstance(sampler, SequentialSampler))
        self._padding = padding if padding.warn_unless_hidden(loader) else None
        return data

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        if event.type_ == EventType.CALIBRATION_START and self._padding is not None:
            self._padding.hide(state, self._allocation.by_layer, self)
        self._guarded(self._engine.event, state, event, **kwargs)
        if event.type_ == EventType.SEQUENTIAL_EPOCH_END:
            self._steps += 1
            total = len(decoder_blocks(state.model)[1]) + 1  # the head is the pipeline's last step
            self._progress("pruning", min(self._steps, total), total)
        if event.type_ == EventType.CALIBRATION_END:
            self.remove_hooks()
            self._stats = recount_model(state.model, self._allocation, before=self._zeros_before)
            for layer, level in self._allocation.by_layer.items() if self._announce else ():
                zeros, weights = self._stats.zeros[layer], self._stats.weights[layer]
                self._plugins.tell("msp_layer_pruned", layer=layer, level=level, zeros=zeros, weights=weights)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        self._guarded(self._engine.finalize, state)
        if self._stats is None:
            raise HostError(
                "the calibration ended before MixedSparsityModifier had pruned",
                hint="the pipeline sent no calibration_end event; use pipeline sequential or independent",
            )
        assert self._outcome is not None, "the modifier is initialised first"
        self._stats = recount_model(
            state.model, self._outcome.allocation, exact=False, after="a later modifier"
        )
        record = run_record(self._outcome, self._stats, self._plan.seed)
        for recovered in self._recovered:
            record = with_recovery(record, recovered)
        attach_files(state.model, self._outcome, record, keep=self._alone)
        log.info(
            "mixed sparsity: %d of %d weights are zero (%.4f %%)",
            self._stats.total_zeros,
            self._stats.total_weights,
            100 * self._stats.sparsity,
        )
        return True

    def abort(self) -> None:
        """Remove every hook and statistic of a run that failed."""
        if self._engine is not None:
            self._engine.abort()
        self.remove_hooks()

    @property
    def _allocation(self) -> Allocation:
        assert self._outcome is not None, "the modifier is initialised first"
        return self._outcome.allocation

    def _guarded(self, step: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Run a step of the engine; if it fails, remove all hooks."""
        try:
            step(*args, **kwargs)
        except BaseException:
            self.abort()
            raise


def launched_ranks() -> int:
    """Return the number of processes that torch.distributed has joined, or that torchrun has started."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    # Other launchers set WORLD_SIZE for independent jobs.
    return int(os.environ.get("WORLD_SIZE") or 1) if os.environ.get("TORCHELASTIC_RUN_ID") else 1
