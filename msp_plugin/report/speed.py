"""The measured speed of a run, in the rows of its report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from msp_plugin.errors import RecipeError
from msp_plugin.records.base import read_object
from msp_plugin.records.parts import BENCH_FILE, BENCH_SCHEMA, BENCH_VERSION, SpeedRecord

log = logging.getLogger(__name__)


def measured_speed(directory: Path) -> tuple[SpeedRecord, ...]:
    """Return the figures of a directory's bench.json; none without one, and none of another version.

    Raises:
        RecipeError: it is damaged.
    """
    file = directory / BENCH_FILE
    if not file.is_file():
        return ()
    data = read_object(file)
    if (data.get("schema"), data.get("version")) != (BENCH_SCHEMA, BENCH_VERSION):
        log.warning("%s is not what this version of `msp bench` writes: it is left out", file)
        return ()
    try:
        return tuple(_rows(data))
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{file} is damaged: {type(error).__name__}: {error}", hint="measure again"
        ) from None


def _rows(data: dict[str, Any]) -> list[SpeedRecord]:
    options, machine = data["options"], data["machine"]
    source = f"`msp bench`, {machine['threads']} threads of {machine['processor']}"
    against = "its dense form" if data["against"] is None else Path(data["against"]).name
    rows = []
    for step in ("decode", "prefill"):
        for form, name in (("own", "this model"), ("other", against)):
            what = f"{step}, {name}, batch {options['batch']}"
            rows.append(SpeedRecord(name=what, value=data[form][step], unit="tokens/s", source=source))
    return rows
