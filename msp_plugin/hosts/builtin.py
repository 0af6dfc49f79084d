"""The built-in host: prunes a model block by block with our own pass; it needs no other framework."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from msp_plugin.checkpoint.recount import count_zeros, recount_model
from msp_plugin.checkpoint.saved_names import saved_names
from msp_plugin.checkpoint.saving import SHARD_BYTES
from msp_plugin.database.build import build_database
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import HostError
from msp_plugin.hosts.base import Pruned, PruneInputs, check_layers
from msp_plugin.models.device import on_best_device
from msp_plugin.models.offload import linear, offloaded_module
from msp_plugin.models.weights import weight_place
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plugins.manager import Plugins
from msp_plugin.progress import NotedProgress, silent
from msp_plugin.pruning.base import Pruner
from msp_plugin.runtime.context import RunContext
from msp_plugin.runtime.disk import check_free
from msp_plugin.runtime.files import cache_directory
from msp_plugin.runtime.locks import scratch_directory
from msp_plugin.runtime.memory import freed_memory_kept
from msp_plugin.runtime.ranks import ALONE, Ranks
from msp_plugin.search.allocate import allocate
from msp_plugin.search.resolve import ResolvedOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltIn:
    """Prunes block by block; a block's inputs come from the pruned blocks before it.

    At levels that llm-compressor can make, the weights equal those of its sequential pipeline, bit for bit.
    """

    plugins: Plugins

    name: ClassVar[str] = "msp_plugin"
    on_all_ranks: ClassVar[bool] = True
    steps: ClassVar[Mapping[str, Any]] = {}
    prunes_only: ClassVar[bool] = True

    def check(self, model: PreTrainedModel, options: ResolvedOptions | None, inputs: PruneInputs) -> None:
        """Raise, before any work, if this host cannot run the model or the options do not fit it.

        Raises:
            HostError: the method is a modifier of another host.
            OutputError: the disk of the cache has no room for the pruned weights.
            MSPError: see check_layers.
        """
        options = _given(options)
        if options.pruner.host != self.name:
            raise HostError(
                f"method {options.pruner.name!r} runs only in {options.pruner.host}",
                hint="use it in a recipe: msp run",
            )
        table = check_layers(model, options, inputs)
        need = sum(linear(model, layer.name).weight.element_size() * layer.weights for layer in table.layers)
        what = "until the run ends, the pruned weights need"
        check_free(cache_directory(options.cache), need, what, "set cache (or MSP_CACHE) to a larger disk")

    def prune(
        self,
        model: PreTrainedModel,
        options: ResolvedOptions | None,
        inputs: PruneInputs,
        context: RunContext,
        *,
        announce: bool = True,
    ) -> Pruned:
        """Search an allocation, prune the model to it in place, and recount its zeros (see Host).

        Raises:
            MSPError: see allocate, build_database and recount_model.
        """
        options = _given(options)
        with on_best_device(model):
            searched = allocate(
                model,
                inputs.text,
                options,
                fresh=context.fresh,
                progress=context.progress,
                ranks=context.ranks,
            )
            names = saved_names(model, searched.allocation.by_layer)
            outcome = replace(searched, allocation=replace(searched.allocation, stored=names))
            before = count_zeros(model, outcome.allocation)
            if announce:
                self.plugins.tell("msp_run_started", allocation=outcome.allocation)
            prune_to(model, outcome.allocation, options.pruner, inputs, options.cache, context)
        stats = recount_model(model, outcome.allocation, before=before)
        for layer, level in outcome.allocation.by_layer.items() if announce else ():
            zeros, weights = stats.zeros[layer], stats.weights[layer]
            self.plugins.tell("msp_layer_pruned", layer=layer, level=level, zeros=zeros, weights=weights)
        return Pruned(outcome, stats)

    def save(self, model: PreTrainedModel, directory: Path) -> None:
        """Write the weights and config as transformers does; an offloaded model gives the same files as one in memory."""
        from transformers.core_model_loading import dot_natural_key

        state = None
        if offloaded_module(model) is not None:
            model.tie_weights()  # after a pass, a tied weight has two placeholders and would be written twice
            state = dict(sorted(model.state_dict().items(), key=lambda item: dot_natural_key(item[0])))
        model.save_pretrained(directory, state_dict=state, max_shard_size=SHARD_BYTES)

    def forget(self) -> None:
        """Do nothing: this host holds no model."""


def _given(options: ResolvedOptions | None) -> ResolvedOptions:
    """Return the options, which only a recipe of another host may lack."""
    assert options is not None, "the built-in host runs options, not recipes"
    return options


def prune_to(
    model: torch.nn.Module,
    allocation: Allocation,
    pruner: Pruner,
    inputs: PruneInputs,
    cache: str | None,
    context: RunContext,
) -> None:
    """Prune each layer of a model, in place, to its level of an allocation, block by block.

    The pruned weights go to the cache, where all ranks read them. The weights of an offloaded model stay in the cache
    as long as the model exists.

    Raises:
        MSPError: see pruned_weights.
        OutputError: the cache cannot be written.
    """
    ranks = context.ranks
    with ExitStack() as stack:
        folder = ranks.on_rank_zero(lambda: stack.enter_context(scratch_directory("pruned", cache)))
        progress = partial(context.progress, "pruning")
        database = pruned_weights(model, allocation, pruner, inputs, folder, progress, ranks)
        for layer, level in allocation.by_layer.items():
            if not level.is_dense:
                place = weight_place(linear(model, layer))
                place.enter()
                place.put(partial(database.weight_for, place, layer, level.name))
        ranks.gather(lambda: None)  # wait until all ranks have read their weights
        if offloaded_module(model) is not None:
            weakref.finalize(model, stack.pop_all().close)


@contextmanager
def _eager_attention(model: torch.nn.Module) -> Iterator[None]:
    """Let a model compute attention with plain matrix products in the block, as llm-compressor's calibration does.

    Fused attention rounds differently, and SparseGPT's weights would differ from llm-compressor's in the last bit.
    """
    own = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if own in (None, "eager"):
        yield
        return
    set_attention: Any = model.set_attn_implementation  # a method of transformers' models
    set_attention("eager")
    try:
        yield
    finally:
        set_attention(own)


def pruned_weights(
    model: torch.nn.Module,
    allocation: Allocation,
    pruner: Pruner,
    inputs: PruneInputs,
    folder: Path,
    progress: NotedProgress = silent,
    ranks: Ranks = ALONE,
) -> LevelDatabase:
    """Return the weights of a model pruned to an allocation, written to ``folder``; the model is left as it was.

    A block's inputs come from the pruned blocks before it. A forward pass has as many samples as llm-compressor's, so
    that the statistics are summed in the same order.

    Raises:
        NumericsError: see build_database.
    """
    levels = {layer: level.name for layer, level in allocation.by_layer.items()}
    database = LevelDatabase(folder, {"levels": levels}, tuple(dict.fromkeys(allocation.levels)))
    with freed_memory_kept(), _eager_attention(model):
        build_database(
            database,
            model,
            allocation.table,
            pruner,
            inputs.data,
            prefix=levels,
            only_prefix=True,
            batch_tokens=inputs.batch * max((len(sample) for sample in inputs.data.samples), default=1),
            progress=progress,
            ranks=ranks,
        )
    return database
