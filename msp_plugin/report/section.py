"""A section that a plugin adds to a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Section:
    """A section of a report; plugins' sections stand after the report's own, sorted by title.

    Args:
        title: its heading.
        text: plain text; an empty line begins a paragraph.
        columns: headings of a table, if there is one.
        rows: the table's cells as text, one entry per column.
        html: put into the page unchanged, after text and table; the plugin must escape text from elsewhere. The page
            allows no scripts, and nothing from another address.
    """

    title: str
    text: str = ""
    columns: Sequence[str] = field(default=())
    rows: Sequence[Sequence[object]] = field(default=())
    html: str = ""

    @property
    def paragraphs(self) -> list[str]:
        """The text's paragraphs."""
        return [part.strip() for part in self.text.split("\n\n") if part.strip()]
