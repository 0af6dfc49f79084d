"""Read what a report is drawn from: run.json with allocation.json, or compare.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.run_files import RUN_FILE, RUN_SCHEMA, RUN_VERSION
from msp_plugin.errors import ModelError, RecipeError, shown
from msp_plugin.plan.allocation import ALLOCATION_FILE, Allocation
from msp_plugin.plan.allocation import SCHEMA as ALLOCATION_SCHEMA
from msp_plugin.report.records import COMPARE_SCHEMA, COMPARE_VERSION, Comparison, RunRecord
from msp_plugin.runtime.documents import parse_json

COMPARE_FILE = "compare.json"

Model = TypeVar("Model", RunRecord, Comparison)


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        directory: where the records lie.
        data: run.json as it is, empty if there is none.
        record: the same, checked.
        allocation: allocation.json.
        checkpoint: the model beside them, None if there is none.
        recipe: True if its recipe.yaml is there.
    """

    directory: Path
    data: dict[str, Any]
    record: RunRecord
    allocation: Allocation
    checkpoint: Checkpoint | None = None
    recipe: bool = False


@dataclass(frozen=True)
class Compared:
    """A comparison: compare.json as it is, and checked."""

    directory: Path
    data: dict[str, Any] = field(repr=False)
    comparison: Comparison = field(repr=False)


def read_source(path: Path) -> Run | Compared:
    """Return what a path holds: a run or a comparison.

    Raises:
        RecipeError: it is missing, not JSON, of another schema, newer, or damaged.
        FormatError: the checkpoint beside a run's records is damaged.
    """
    if path.is_dir():
        if (path / COMPARE_FILE).is_file():
            return _read_file(path / COMPARE_FILE)
        if (path / RUN_FILE).is_file():
            return _read_run(path)
        lone = (path / ALLOCATION_FILE).is_file()
        raise RecipeError(
            f"{path} holds neither {RUN_FILE} nor {COMPARE_FILE}",
            hint=f"for the allocation alone give {path / ALLOCATION_FILE}"
            if lone
            else "give the directory that `msp prune`, `msp run` or `msp compare` wrote",
        )
    return _read_file(path)


def _read_file(path: Path) -> Run | Compared:
    data = _read_json(path)
    schema = data.get("schema")
    if schema == COMPARE_SCHEMA:
        _check_version(path, data, COMPARE_VERSION)
        return Compared(path.parent, data, _validated(Comparison, data, path))
    if schema == RUN_SCHEMA:
        return _read_run(path.parent, path)
    if schema == ALLOCATION_SCHEMA:
        allocation = Allocation.from_dict(data, str(path))
        return Run(path.parent, {}, _validated(RunRecord, _search_of(allocation), path), allocation)
    raise RecipeError(
        f"{path} is no record of a run or of a comparison: its schema is {shown(schema)}",
        hint=f'expected "{RUN_SCHEMA}", "{COMPARE_SCHEMA}" or "{ALLOCATION_SCHEMA}"',
    )


def _search_of(allocation: Allocation) -> dict[str, Any]:
    """Return what an allocation says itself about its search, as run.json would."""
    given = allocation.provenance
    by = given.get("allocator")
    search = {key: given[key] for key in ("loss", "uniform_loss") if key in given}
    return {"search": {"allocator": by.get("name") if isinstance(by, dict) else None, **search}}


def _read_run(directory: Path, file: Path | None = None) -> Run:
    file = file or directory / RUN_FILE
    data = _read_json(file)
    if data.get("schema") != RUN_SCHEMA:
        raise RecipeError(f"{file} is no record of a run", hint=f'expected schema "{RUN_SCHEMA}"')
    _check_version(file, data, RUN_VERSION)
    if not (directory / ALLOCATION_FILE).is_file():
        raise RecipeError(
            f"{directory} has no {ALLOCATION_FILE}",
            hint="a report shows the level of each unit; only runs of a recipe with our line have them",
        )
    try:
        checkpoint = Checkpoint.open(directory)
    except ModelError:  # no model there: records alone, or another format
        checkpoint = None
    allocation = Allocation.read(directory / ALLOCATION_FILE)
    recipe = (directory / "recipe.yaml").is_file()
    return Run(directory, data, _validated(RunRecord, data, file), allocation, checkpoint, recipe)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"there is no {path}", hint="give a run's directory, a comparison's directory, or compare.json"
        ) from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read {path} as JSON: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path} is no JSON object", hint="give run.json or compare.json")
    return data


def _check_version(path: Path, data: dict[str, Any], known: int) -> None:
    if data.get("version") != known:
        raise RecipeError(
            f"{path} has version {shown(data.get('version'))}, this package reads {known}",
            hint="update msp_plugin",
        )


def _validated(kind: type[Model], data: dict[str, Any], path: Path) -> Model:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "its contents"
        raise RecipeError(f"{path} is damaged: {where}: {first['msg']}") from None
