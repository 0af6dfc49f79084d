"""``RecoveryModifier``: change surviving weights after a pruning, by one line of llm-compressor's recipe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from compressed_tensors.offload.cache import DiskCache, OffloadCache
from llmcompressor.core import Event, State, active_session
from llmcompressor.core.events import EventType
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from llmcompressor.utils.helpers import DisableQuantization
from loguru import logger
from pydantic import ConfigDict, PrivateAttr, model_validator
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel

from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.data.samples import NO_TEXT
from msp_plugin.data.tokenize import from_dataloader
from msp_plugin.errors import HostError, ModelError, RecipeError, nearest
from msp_plugin.hosts.base import check_recovery
from msp_plugin.hosts.llm_compressor import HOST_KEYS
from msp_plugin.hosts.llm_compressor.modifier import AfterPruning, MixedSparsityModifier, launched_ranks
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.layers import prunable_layers
from msp_plugin.models.weights import Weights
from msp_plugin.plugins.manager import Plugins
from msp_plugin.progress import ProgressLines, StepProgress
from msp_plugin.records.run import PRUNE
from msp_plugin.recovery.base import Recovery
from msp_plugin.recovery.masks import Masks
from msp_plugin.recovery.record import Recovered
from msp_plugin.recovery.sources import check_denser, load_original
from msp_plugin.recovery.step import RecoveryStep, RecoveryText
from msp_plugin.runtime.context import RunContext
from msp_plugin.runtime.digests import digest
from msp_plugin.search.resolve import ResolvedOptions

#: Ends of the names of the parameters that compressed-tensors gives to a module that is to be quantized.
_OF_QUANTIZATION = ("_scale", "_zero_point", "_g_idx")


class RecoveryModifier(AfterPruning):
    """Bring a pruned model nearer to the dense one, with every zero kept, by a method that calibration samples suffice for.

    It stands behind the modifier that prunes, ours or another, and before those that quantize. The zeros of the model are
    the mask. The dense weights are read from the original's files, layer by layer, so that memory holds the dense model
    neither twice nor in a copy from before the pruning.

    Sample recipe::

        sparsity_stage:
          sparsity_modifiers:
            MixedSparsityModifier: {sparsity: 0.75}
            RecoveryModifier: {method: {name: blockwise, epochs: 4}}

    Args:
        method: name of a recovery, or a mapping with ``name`` and options.
        original: directory or hub id of the dense model; None is the one that the pruned model was loaded from.
        seed: of the method's random choices.
        cache: where the state of a stopped recovery lies; None is the default cache.
    """

    model_config = ConfigDict(extra="forbid")

    method: str | dict[str, Any] = "blockwise"
    original: str | None = None
    seed: int = 0
    cache: str | None = None
    #: It runs the model by itself, after the host's passes.
    requires_calibration_data: bool = False

    _recovery: Recovery = PrivateAttr()
    _original: PreTrainedModel | None = PrivateAttr(default=None)
    _samples: RecoveryText | None = PrivateAttr(default=None)
    _progress: StepProgress = PrivateAttr(default_factory=lambda: ProgressLines(logger.info))
    _fresh: bool = PrivateAttr(default=False)
    _active: bool = PrivateAttr(default=True)
    _trust_remote_code: bool = PrivateAttr(default=False)
    _pruning: MixedSparsityModifier | None = PrivateAttr(default=None)
    _recovered: Recovered | None = PrivateAttr(default=None)
    _prepared: bool = PrivateAttr(default=False)
    _began: bool = PrivateAttr(default=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        known = [name for name in cls.model_fields if name not in HOST_KEYS]
        for key in data if isinstance(data, dict) else ():
            if key not in known and key not in HOST_KEYS:
                raise RecipeError(f"RecoveryModifier has no key {key!r}", hint=nearest(key, known))
        return data

    @model_validator(mode="after")
    def _build(self) -> RecoveryModifier:
        self._recovery = Plugins().build("recoveries", self.method)
        if not self._recovery.by_calibration:
            raise RecipeError(
                f"recovery {self._recovery.name!r} trains on more text than a recipe's calibration",
                hint="run it on the pruned model by `msp recover`, or use blockwise or weight_update here",
            )
        return self

    @property
    def recovered(self) -> Recovered | None:
        """The work and the measurements; None until the model is recovered."""
        return self._recovered

    @property
    def failed(self) -> bool:
        """True if the recovery began, and did not end."""
        return self._began and self._recovered is None

    def report_to(
        self,
        progress: StepProgress,
        samples: RecoveryText,
        *,
        active: bool = True,
        fresh: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        """Set how this run reports and measures.

        Args:
            samples: in place of oneshot's.
            active: False to change nothing, for a baseline.
            fresh: do not go on with a recovery that was stopped.
            trust_remote_code: run the code of the original's repository.
        """
        self._progress, self._samples, self._active, self._fresh = progress, samples, active, fresh
        self._trust_remote_code = trust_remote_code

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self.prepare(state)
        return True

    def prepare(self, state: State, plan: ResolvedOptions | None = None) -> None:
        """Check whatever does not depend on the zeros, and open the dense model; once, before any work.

        A recovery of a baseline is checked as well: the baseline is pruned first.

        Raises:
            MSPError: the line stands in a wrong place, there are several ranks or no samples, the method cannot work on
                the model, or see _dense.
        """
        if self._prepared:
            return
        self._prepared = True
        modifiers = active_session().lifecycle.recipe.modifiers
        place = [modifier is self for modifier in modifiers].index(True)
        for modifier in modifiers[place + 1 :]:
            if isinstance(modifier, MixedSparsityModifier | SparsityModifierBase):
                raise RecipeError(
                    f"RecoveryModifier stands before {type(modifier).__name__}",
                    hint="put its line after that one",
                )
        for modifier in modifiers[:place]:
            if isinstance(modifier, QuantizationMixin):
                raise RecipeError(
                    f"RecoveryModifier stands behind {type(modifier).__name__}",
                    hint="put its line between the pruning and the quantization",
                )
        self._pruning = next((m for m in modifiers if isinstance(m, MixedSparsityModifier)), None)
        if (ranks := launched_ranks()) > 1:
            raise HostError(
                f"there are {ranks} ranks, and each would recover the whole model",
                hint="start it in one process, or use `torchrun ... -m msp_plugin recover` afterwards",
            )
        if self._samples is None:
            if state.data.calib is None:
                raise RecipeError(
                    "RecoveryModifier needs calibration data", hint="pass dataset=... to oneshot"
                )
            keep_order = isinstance(getattr(state.data.calib, "sampler", None), SequentialSampler)
            data = from_dataloader(state.data.calib, keep_order=keep_order)
            self._samples = RecoveryText.of(data, NO_TEXT)
        with as_pruned(state.model):
            check_recovery(self._recovery, state.model, plan, self._samples.data.samples[0])
        original = self._dense(state.model)
        self._original = original if self._active else None

    def _dense(self, model: PreTrainedModel) -> PreTrainedModel | None:
        """Return the dense model with its weights on disk; None if the method needs none and ``original`` is not given.

        Raises:
            RecipeError: nobody says where it is.
            ModelError: it is another model, or ``model`` is not the one that is there.
        """
        source = self.original or getattr(model.config, "_name_or_path", "")
        if not source or (self.original is None and not self._recovery.needs_original):
            if not self._recovery.needs_original:
                return None
            raise RecipeError(
                "this model was not loaded from files, and the recovery reads the dense weights there",
                hint="save it before oneshot, and give RecoveryModifier its directory as original",
            )
        dtype = str(model.dtype).removeprefix("torch.")
        # Code that oneshot was allowed to run for this model may run for its files.
        trusted = self._trust_remote_code or type(model).__module__.startswith("transformers_modules")
        files = ModelSource(source, dtype, trusted, offload=True, cache=self.cache)
        files.check()
        original = load_original(files, model)
        if self.original is None:
            own, stored = Weights(model), Weights(original)
            for layer in prunable_layers(model).layers:
                if not torch.equal(own[layer.name].cpu(), stored[layer.name].cpu()):
                    raise ModelError(
                        f"{layer.name} is not as in {source}, so that the dense weights are not there",
                        hint="save the model before oneshot, and give RecoveryModifier its directory as original",
                    )
        return original

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self._active:
            return
        shared = active_session().lifecycle.recipe.modifiers
        if event.type_ == EventType.CALIBRATION_START and len(shared) > 1:
            raise RecipeError(
                "RecoveryModifier runs after the pruning, and here all modifiers share one calibration",
                hint='pass pipeline="independent", the default, to oneshot',
            )
        if event.type_ == EventType.CALIBRATION_END:
            self._began = True
            with DisableQuantization(state.model), as_pruned(state.model):
                self._recovered = self._recover(state.model)
            self._original = self._samples = None
            if self._pruning is not None:
                self._pruning.was_recovered(self._recovered)

    def _recover(self, model: PreTrainedModel) -> Recovered:
        """Recover the model in place, and return the work with the measurements before and after."""
        start = time.monotonic()
        allocation = (
            None
            if self._pruning is None or self._pruning.outcome is None
            else self._pruning.outcome.allocation
        )
        layers = (
            [layer.name for layer in prunable_layers(model).layers]
            if allocation is None
            else allocation.by_layer
        )
        masks = Masks.of(model, list(layers))
        if self._original is not None:
            name = self.original or str(getattr(model.config, "_name_or_path", "the model"))
            check_denser(name, self._original, masks, "give RecoveryModifier the dense model as original")
        self._recovery.check(model, masks)
        context = RunContext(progress=self._progress, fresh=self._fresh)
        assert self._samples is not None, "the modifier is initialised first"
        step = RecoveryStep(self._recovery, self._samples, self.seed, self.cache, context)
        before = {PRUNE: step.measure("mixed", model, self._original)}
        key = digest(step.identity(model, None if self._original is None else fingerprint(self._original)))
        with ExitStack() as until:
            stage = step.run(model, self._original, masks, allocation, key, until)
        return Recovered(stage, before, time.monotonic() - start)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        if self._active and self._recovered is None:
            raise HostError(
                "the calibration ended before RecoveryModifier had run",
                hint='the pipeline sent no calibration_end event; use pipeline="independent"',
            )
        return True


@contextmanager
def as_pruned(model: torch.nn.Module) -> Iterator[None]:
    """Give modules their own parameters in the block, in place of the host's caches around parameters in memory.

    Those of a quantization that a later modifier has prepared are away: they hold no values yet.
    """
    caches: dict[torch.nn.Module, tuple[Any, Any]] = {
        module: (module._parameters, module._buffers)
        for module in model.modules()
        if isinstance(module._parameters, OffloadCache) and not isinstance(module._parameters, DiskCache)
    }
    prepared: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for module, (parameters, buffers) in caches.items():
            module._parameters = parameters.offloaded_values
            module._buffers = buffers.offloaded_values
        for module in model.modules():
            if hasattr(module, "quantization_scheme") and not isinstance(module._parameters, DiskCache):
                names = [name for name in module._parameters if name.endswith(_OF_QUANTIZATION)]
                prepared.append((module._parameters, {name: module._parameters.pop(name) for name in names}))
        yield
    finally:
        for own, away in prepared:
            own.update(away)
        for module, (parameters, buffers) in caches.items():
            module._parameters, module._buffers = parameters, buffers
