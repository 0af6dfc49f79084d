"""Read the records for a report: run.json with allocation.json, or compare.json."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import SOURCE_ALLOCATION_FILE
from msp_plugin.errors import ModelError, RecipeError, shown
from msp_plugin.plan.allocation import ALLOCATION_FILE, Allocation
from msp_plugin.plan.allocation import SCHEMA as ALLOCATION_SCHEMA
from msp_plugin.records.base import read_object
from msp_plugin.records.comparison import COMPARE_FILE, CompareRecord
from msp_plugin.records.run import RUN_FILE, RunRecord


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        directory: the directory of the records.
        record: run.json; for an allocation alone, the facts on its search in allocation.json.
        allocation: allocation.json.
        pruned: False for an allocation alone.
        checkpoint: the model beside the records; None if there is none, or one that was cut from the run's.
        recipe: the text of its recipe.yaml, empty if there is none.
    """

    directory: Path
    record: RunRecord
    allocation: Allocation
    pruned: bool = True
    checkpoint: Checkpoint | None = None
    recipe: str = ""


@dataclass(frozen=True)
class Compared:
    """A comparison."""

    directory: Path
    record: CompareRecord = field(repr=False)


def read_source(path: Path) -> Run | Compared:
    """Return the run or the comparison at a path.

    Raises:
        RecipeError: a record is missing, not JSON, of another schema, newer, or damaged.
        FormatError: the checkpoint beside a run's records is damaged.
    """
    if path.is_dir():
        if (path / COMPARE_FILE).is_file():
            return _read_file(path / COMPARE_FILE)
        if (path / RUN_FILE).is_file():
            return _read_run(path, RunRecord.read(path / RUN_FILE))
        lone = (path / ALLOCATION_FILE).is_file()
        raise RecipeError(
            f"{path} holds neither {RUN_FILE} nor {COMPARE_FILE}",
            hint=f"for the allocation alone give {path / ALLOCATION_FILE}"
            if lone
            else "give the directory that `msp prune`, `msp run` or `msp compare` wrote",
        )
    return _read_file(path)


def _read_file(path: Path) -> Run | Compared:
    data = read_object(path)
    schema = data.get("schema")
    if schema == CompareRecord.SCHEMA:
        return Compared(path.parent, CompareRecord.from_dict(data, str(path)))
    if schema == RunRecord.SCHEMA:
        return _read_run(path.parent, RunRecord.from_dict(data, str(path)))
    if schema == ALLOCATION_SCHEMA:
        allocation = Allocation.from_dict(data, str(path))
        return Run(path.parent, _record_of(allocation, str(path)), allocation, pruned=False)
    raise RecipeError(
        f"{path} is not the record of a run or a comparison: its schema is {shown(schema)}",
        hint=f'expected "{RunRecord.SCHEMA}", "{CompareRecord.SCHEMA}" or "{ALLOCATION_SCHEMA}"',
    )


def _record_of(allocation: Allocation, name: str) -> RunRecord:
    """Return the facts on its search in an allocation, as the record of a run."""
    given = allocation.provenance
    by = given.get("allocator")
    search = {key: given[key] for key in ("loss", "uniform_loss") if key in given}
    search["allocator"] = by.get("name") if isinstance(by, dict) else None
    data = {"schema": RunRecord.SCHEMA, "version": RunRecord.VERSION, "search": search}
    return RunRecord.from_dict(data, name)


def _read_run(directory: Path, record: RunRecord) -> Run:
    # that of a smaller model is of the larger one that it was cut from
    names = (ALLOCATION_FILE, SOURCE_ALLOCATION_FILE)
    found = next((directory / name for name in names if (directory / name).is_file()), None)
    if found is None:
        raise RecipeError(
            f"{directory} has no {ALLOCATION_FILE}",
            hint="a report needs the level of each unit, which only runs with MixedSparsityModifier or `msp prune` have",
        )
    checkpoint = None
    if found.name == ALLOCATION_FILE:
        with suppress(ModelError):  # records without a model, or a model in another format
            checkpoint = Checkpoint.open(directory)
    allocation = Allocation.read(found)
    file = directory / "recipe.yaml"
    recipe = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return Run(directory, record, allocation, checkpoint=checkpoint, recipe=recipe)
