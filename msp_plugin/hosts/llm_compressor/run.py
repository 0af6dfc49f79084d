"""Run a recipe through llm-compressor's ``oneshot``, and clean up if it fails."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from msp_plugin.checkpoint.run_files import RUN_SCHEMA, RUN_VERSION, run_record
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import MSPError
from msp_plugin.hosts.llm_compressor.passes import shares_keys
from msp_plugin.hosts.llm_compressor.recipe import build_recipe
from msp_plugin.progress import StepProgress, no_progress
from msp_plugin.records.run import Outcome
from msp_plugin.runtime.digests import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def run_oneshot(
    model: PreTrainedModel,
    steps: dict[str, Any],
    *,
    data: CalibrationSet,
    batch: int,
    tokenizer: PreTrainedTokenizerBase,
    trust_remote_code: bool = False,
    progress: StepProgress = no_progress,
    announce: bool = True,
    fresh: bool = False,
) -> tuple[dict[str, Any], Outcome | None]:
    """Run a recipe on a loaded model and return its record, and the allocation of our line if there is one.

    ``fresh`` measures anew what the cache holds of this run.

    Raises:
        MSPError: ours, whatever the host wrapped it in. The model has no hooks left then.
    """
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    from msp_plugin.hosts.llm_compressor.modifier import MixedSparsityModifier

    recipe = build_recipe(copy.deepcopy(steps))
    ours = [m for m in recipe.modifiers if isinstance(m, MixedSparsityModifier)]
    one_pass = bool(ours) and shares_keys(model)
    if one_pass:
        log.warning(
            "%s is calibrated in one pass of the whole model, because its later blocks read keys and values of earlier "
            "ones: no block sees what pruning the blocks before it changes", type(model).__name__,
        )  # fmt: skip
    for modifier in ours:
        modifier.report_to(progress, announce=announce, fresh=fresh, one_pass=one_pass)
    loader = DataLoader([{"input_ids": sample} for sample in data.samples], batch_size=batch)
    with _traces_forgotten(), _cleaned_up(recipe.modifiers):
        oneshot(
            model=model, recipe=recipe, dataset=loader, processor=tokenizer,
            trust_remote_code_model=trust_remote_code, pipeline="basic" if one_pass else "independent",
        )  # fmt: skip
    if not ours:
        return {"schema": RUN_SCHEMA, "version": RUN_VERSION, "versions": versions()}, None
    return run_record(ours[0].outcome, ours[0].stats, ours[0].seed), ours[0].outcome


def forget() -> None:
    """Let the host's session go of the last model; its ``save_pretrained`` writes no recipe.yaml afterwards."""
    from llmcompressor.core import reset_session

    reset_session()


@contextmanager
def _traces_forgotten() -> Iterator[None]:
    """Let torch.fx go of what the host traces in the block.

    The host wraps functions in a namespace that holds the model, and torch keeps such namespaces for ever:
    every model that was ever pruned would stay in memory.
    """
    from torch.fx import _symbolic_trace

    held = getattr(_symbolic_trace, "_wrapped_fns_to_patch", {})
    before = set(held)
    try:
        yield
    finally:
        for key in set(held) - before:
            del held[key]


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
