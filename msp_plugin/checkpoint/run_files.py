"""The files beside a checkpoint: allocation.json and run.json.

They are not part of config.json, because llm-compressor restores the source's config.json when it saves.
"""

from __future__ import annotations

import logging
import platform
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msp_plugin.checkpoint.recount import PruneStats
from msp_plugin.checkpoint.saving import generation_config_kept, kept_if_it_fails
from msp_plugin.models.layers import text_config
from msp_plugin.plan.allocation import ALLOCATION_FILE
from msp_plugin.records.run import PRUNE, RUN_FILE, Outcome, RunRecord, SparsityRecord, StageRecord
from msp_plugin.runtime.digests import versions
from msp_plugin.runtime.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

#: Files of transformers' processors beside those of the tokenizer.
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def run_record(outcome: Outcome | None, stats: PruneStats | None, seed: int | None) -> RunRecord:
    """Return the record of a run after pruning, still without perplexities and texts.

    Args:
        outcome, stats: None where another modifier than ours pruned, or before its zeros are counted.
    """
    if outcome is None or stats is None:
        stage = StageRecord(name=PRUNE)
        return RunRecord(stages=(stage,), versions=versions(), python=platform.python_version())
    budget = outcome.allocation.budget
    return RunRecord(
        stages=(StageRecord(name=PRUNE, sparsity=stats.sparsity),),
        sparsity=SparsityRecord(
            target=float(budget.target),
            planned=float(budget.sparsity),
            achieved=stats.sparsity,
            exact=budget.exact,
            weights=stats.total_weights,
            zeros=stats.total_zeros,
            planned_zeros=budget.zeros,
            extra_zeros=stats.total_zeros - budget.zeros,
        ),
        perplexity=dict.fromkeys(("dense", "uniform", "mixed")),
        search=outcome.search,
        seed=seed,
        versions=versions(),
        python=platform.python_version(),
    )


def write_files(directory: Path, outcome: Outcome | None, record: RunRecord) -> None:
    """Write allocation.json, where there is an allocation, and run.json into a checkpoint's directory."""
    if outcome is not None:
        write_text(directory / ALLOCATION_FILE, outcome.allocation.to_json())
    record.write(directory / RUN_FILE)


def attach_files(model: PreTrainedModel, outcome: Outcome, record: RunRecord, *, keep: bool = True) -> None:
    """Make ``model.save_pretrained`` also write both files and those of an image processor.

    Args:
        keep: if saving fails, keep the model elsewhere (see kept_if_it_fails).
    """
    save = model.save_pretrained

    def save_with_files(save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        path = Path(save_directory).absolute()
        records = partial(write_files, outcome=outcome, record=record)
        with kept_if_it_fails(model, path, records) if keep else nullcontext():
            with generation_config_kept(model, path):
                save(save_directory, *args, **kwargs)
            copy_processor(model, path)
            records(path)

    vars(save_with_files)["_overridden"] = True  # llm-compressor's mark for "already wrapped"
    vars(model)["save_pretrained"] = save_with_files


def copy_processor(model: PreTrainedModel, directory: Path) -> None:
    """Copy the processor's files beside a model that reads more than text and needs them.

    Existing files stay. A warning names a file that cannot be fetched from the hub.
    """
    source = getattr(model.config, "_name_or_path", "")
    if text_config(model) is model.config or not source:
        return
    for name in PROCESSOR_FILES:
        if not (directory / name).exists():
            file = _file_of(source, name, getattr(model.config, "_commit_hash", None))
            if file is not None:
                shutil.copyfile(file, directory / name)


def _file_of(source: str, name: str, revision: str | None) -> Path | None:
    """Return a file of a model's directory or hub id; None if it does not exist or cannot be fetched."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if Path(source).is_dir():
        return Path(source) / name if (Path(source) / name).is_file() else None
    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):  # no network; the file may exist
            log.warning("cannot fetch %s of %s: copy it beside the checkpoint", name, source)
    except (OSError, ValueError) as error:  # what the hub's client raises, HTTP errors included
        log.warning("cannot fetch %s of %s: %s", name, source, error)
    return None
