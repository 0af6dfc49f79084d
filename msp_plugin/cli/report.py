"""``msp report``: the records of a run or of a comparison as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    source: Annotated[
        Path, typer.Argument(metavar="PATH", help="directory of a run or a comparison, or its JSON file")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="default: report.html beside the records")
    ] = None,
) -> None:
    """Draw one HTML page from a run's records or from a comparison; it needs no network and no server.

    Example: msp report llama-75 --out llama-75.html
    """
    from msp_plugin.report import write_report

    typer.echo(f"Written: {write_report(source, out)}")
