"""Write a report's file."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from msp_plugin.errors import OutputError
from msp_plugin.runtime.disk import writing
from msp_plugin.runtime.files import expanded, write_text

if TYPE_CHECKING:
    from msp_plugin.plugins.manager import Plugins

log = logging.getLogger(__name__)

REPORT_FILE = "report.html"
#: The mark in the head of every report; only files with it are overwritten.
GENERATOR = '<meta name="generator" content="msp_plugin'


def write_report(
    source: str | Path, out: str | Path | None = None, *, plugins: Plugins | None = None
) -> Path:
    """Write the report of a run or of a comparison, and return its path.

    Equal records give equal bytes. An older report is overwritten, any other file is not.

    Args:
        source: a run's directory, an allocation.json, a comparison's directory or its compare.json.
        out: the file to write; default: ``report.html`` beside the records.
        plugins: the plugins that may add sections; default: the installed ones.

    Raises:
        RecipeError: the records are missing, damaged, of another kind or of a newer version.
        FormatError: the checkpoint beside them is damaged.
        PluginError: a package is missing, or a plugin's section failed.
        OutputError: the file cannot be written, or is not a report.
    """
    from msp_plugin.report.page import render
    from msp_plugin.report.source import read_source

    began = time.monotonic()
    records = read_source(expanded(source))
    path = expanded(out) if out is not None else records.directory / REPORT_FILE
    with writing(path):
        _check_replaceable(path)
    text = render(records, plugins)
    with writing(path):
        write_text(path, text)
    log.info("report %s: %d bytes, %.1f s", path, len(text.encode()), time.monotonic() - began)
    return path


def _check_replaceable(path: Path) -> None:
    """Raise OutputError if the path is a directory, or a file that is not a report."""
    if path.is_dir():
        raise OutputError(f"{path} is a directory", hint=f"give a file, e.g. {path / REPORT_FILE}")
    if path.exists():
        with path.open("rb") as file:
            if GENERATOR.encode() not in file.read(2048):
                raise OutputError(
                    f"{path} exists and is not a report", hint="give another file, or remove it"
                )
