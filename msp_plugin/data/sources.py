"""Sources of text: files, directories, saved datasets and hub datasets, read only as far as needed."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from msp_plugin.data.chats import Chat, as_messages, as_tools, written_messages
from msp_plugin.data.text_files import (
    CHAT_COLUMNS,
    DEFAULT_COLUMN,
    FORMS,
    Row,
    data_files,
    file_rows,
    is_known,
    need,
    text_columns,
)
from msp_plugin.errors import DataError, nearest, plain, shown
from msp_plugin.runtime.files import expanded

log = logging.getLogger(__name__)

#: A text, the pieces of a text (each ends with a line), or a conversation.
Document = str | Iterator[str] | Chat


class Documents:
    """The documents of a source in order, read only as far as they are iterated over.

    Attributes:
        rows: the rows that were read so far.
        skipped: how many of them were null or empty.
        columns: the columns that held the text; empty if the source has no columns.
    """

    def __init__(self, source: str, read: Callable[[], Iterator[Row]], column: str = DEFAULT_COLUMN):
        self.source, self._read, self._column = plain(source), read, column
        self.rows = self.skipped = 0
        self.columns: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents that are not empty.

        Raises:
            DataError: a row cannot be read or holds no text but another value, or all rows are empty.
        """
        self.rows = self.skipped = 0
        for where, row in self._read():
            self.rows += 1
            document = self._document(row, where)
            if document is None:
                self.skipped += 1
            else:
                yield document
        if self.rows == self.skipped:
            empty = f": all {self.rows:,} rows are null or empty" if self.rows > 1 else ""
            raise DataError(f"{self.source} holds no text{empty}", hint="give a file with text in it")

    def _document(self, row: Any, where: str) -> Document | None:
        """Return the document of a row; None if it is null or empty."""
        if row is None:
            return None
        if isinstance(row, str):
            return row if row.strip() else None
        if isinstance(row, Iterator):
            return _unless_blank(row)
        columns = text_columns(row, self._column) if isinstance(row, dict) else ()
        if not columns:
            known = [key for key, value in row.items() if _is_text(value)] if isinstance(row, dict) else []
            raise DataError(f"{where} has no text in {self._column!r}", hint=near(self._column, known))
        if columns != self.columns:
            self.columns = columns
            log.info("%s: the text is in column %s", self.source, " and ".join(map(plain, columns)))
        document = _of_columns([row[name] for name in columns], columns, where)
        return replace(document, tools=as_tools(row.get("tools"))) if isinstance(document, Chat) else document


def near(column: str, columns: Iterable[object]) -> str:
    """Return a hint that lists up to 50 columns, beginning with the one closest to ``column`` (see nearest)."""
    return nearest(column, [plain(name)[:60] for name in itertools.islice(columns, 50)])


def _is_text(value: object) -> bool:
    return isinstance(value, str) or bool(as_messages(value))


def _of_columns(values: Sequence[object], columns: Sequence[str], where: str) -> Document | None:
    """Return the text or the conversation of a row; None if it is empty.

    Args:
        values: of one column, or of a prompt and its completion.
        where: the row's place, for errors.

    Raises:
        DataError: a value is neither text nor messages.
    """
    values = [_read_chat(value, name, where) for name, value in zip(columns, values, strict=True)]
    texts = [value or "" for value in values if value is None or isinstance(value, str)]
    if len(texts) == len(values):
        text = "".join(texts)
        return text if text.strip() else None
    messages: list[dict[str, Any]] = []
    for name, value in zip(columns, values, strict=True):
        part = [] if value is None else as_messages(value)
        if part is None:
            raise DataError(
                f"{where}: {name!r} is {shown(value)}, neither text nor messages with role and content",
                hint="name the column that holds the text",
            )
        messages += part
    return Chat(tuple(messages), where) if any(m["content"].strip() for m in messages) else None


def _read_chat(value: object, column: str, where: str) -> object:
    """Return a column's value, as messages if it is a text that holds a conversation (see written_messages).

    Raises:
        DataError: the text is none, in a column for conversations.
    """
    if not isinstance(value, str) or column == DEFAULT_COLUMN:
        return value
    messages = written_messages(value)
    if column not in CHAT_COLUMNS:
        return messages or value
    if messages is None:
        raise DataError(
            f"{where}: {column!r} is {shown(value)}, expected a list of messages with role and content",
            hint="the list may be written as JSON; plain text belongs in a column of another name",
        )
    return messages


def _unless_blank(pieces: Iterator[str]) -> Iterator[str] | None:
    """Return the same pieces of a text; None if all are blank."""
    first: list[str] = []
    for piece in pieces:
        first.append(piece)
        if piece.strip():
            return itertools.chain(first, pieces)
    return None


def load_texts(source: str, text_column: str = DEFAULT_COLUMN) -> Documents:
    """Return the documents of a source.

    Args:
        source: ``demo:SPLIT`` (the embedded corpus); a text file; a table (jsonl, a JSON array, csv, tsv,
            parquet or arrow); a directory of such files or of a saved dataset; or a hub dataset
            ``id[:config][:split]``. Text, JSON and csv files may be compressed.
        text_column: column with the text, or with the messages of a conversation. Where rows have no column
            ``text``, the default also reads ``messages``, ``conversations``, or ``prompt`` and
            ``completion``.

    Raises:
        DataError: the source is missing or unreadable. Damaged lines and columns without text raise when they
            are read.
    """
    if source.startswith("demo:"):
        from msp_plugin.data.demo_corpus import library_texts

        texts = library_texts(source[5:])
        return Documents(source, lambda: zip(itertools.repeat(source), texts, strict=False))
    path = expanded(source)
    try:
        if path.is_file():
            return Documents(source, lambda: file_rows(path, text_column), text_column)
        if path.is_dir():
            return _directory(path, source, text_column)
    except OSError as error:  # e.g. a text in the place of its file's name
        raise DataError(
            f"cannot read the data at {shown(source)}: {error.strerror}",
            hint="give a text or jsonl file that you may read, or a dataset",
        ) from None
    if is_known(path) or source.startswith((".", "/", "~")):
        raise DataError(
            f"there is no data file at {plain(path)}", hint="give a text or jsonl file, or a dataset"
        )
    return _dataset(_hub_dataset(source), text_column, source)


def _directory(path: Path, source: str, column: str) -> Documents:
    """Return the documents of a saved dataset, or of the data files in a directory."""
    names = {entry.name for entry in path.iterdir()}
    if {"dataset_info.json", "state.json"} <= names or "dataset_dict.json" in names:
        datasets = need("datasets", f"{plain(path)}, a saved dataset,", "datasets")
        try:
            return _dataset(datasets.load_from_disk(str(path)), column, source)
        except DataError:
            raise
        except Exception as error:  # datasets raises many types
            raise DataError(
                f"{plain(path)} is a saved dataset that cannot be loaded: {type(error).__name__}: {error}",
                hint="a file is missing or damaged",
            ) from error
    files = data_files(path)
    if not files:
        raise DataError(f"{plain(path)} holds no text, no table and no saved dataset", hint=FORMS)
    return Documents(source, lambda: (row for file in files for row in file_rows(file, column)), column)


def _hub_dataset(source: str) -> Any:
    """Return a hub dataset as a stream, which downloads only the shards that are read.

    One suffix is a split or, if there is no such split, a config, whose ``train`` is read.
    """
    name, *rest = source.split(":")
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"there is no file {plain(source)}, and hub datasets need the datasets package",
            hint="pip install datasets, or give a file",
        ) from None
    log.info("reading %s from the hub or its cache", source)
    readings: list[tuple[str | None, str]] = []
    match rest:
        case []:
            readings = [(None, "train")]
        case [one]:
            readings = [(None, one), (one, "train")]
        case [config, split]:
            readings = [(config, split)]
    reasons = []
    for of, part in readings:
        try:
            return load_dataset(name, of, split=part, streaming=True)
        except Exception as error:  # datasets raises many types, and a connection many more
            reasons.append(f"{type(error).__name__}: {error}")
    why = "; ".join(dict.fromkeys(reasons)) or "it has more than two colons"
    raise DataError(
        f"{source!r} is neither a file nor a dataset that can be loaded: {why}",
        hint="give a path, or id[:config][:split] of a hub dataset",
    )


def _dataset(data: Any, column: str, source: str) -> Documents:
    """Return the documents of a dataset; if it has several splits, those of ``train``."""
    if isinstance(data, dict):
        if "train" not in data:
            raise DataError(
                f"{plain(source)} has the splits {', '.join(map(plain, data))} and no train",
                hint="give one split's directory",
            )
        data = data["train"]
    names = data.column_names
    if not names:  # a stream without declared features
        names = list(next((row for _, row in _dataset_rows(data, source)), {}))
    columns = text_columns(names, column)
    if not columns:
        raise DataError(f"{plain(source)} has no column {column!r}", hint=near(column, names))
    return Documents(source, lambda: _dataset_rows(data.select_columns(list(columns)), source), column)


def _dataset_rows(data: Any, source: str) -> Iterator[Row]:
    """Yield the rows of a dataset."""
    number = 0
    try:
        for row in data:
            number += 1
            yield f"{plain(source)}, row {number}", row
    except Exception as error:  # datasets raises many types, and a connection many more
        raise DataError(
            f"cannot read {plain(source)} after row {number:,}: {type(error).__name__}: {error}",
            hint="the data is damaged, or the connection was lost: try again",
        ) from error
