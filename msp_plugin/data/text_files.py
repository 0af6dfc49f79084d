"""Read files of text and tables as rows, and choose the data files of a directory.

A row is a pair: its place, for errors, and its value: a text, an iterator over pieces of a text, or a dict of columns.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib
import json
import logging
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from msp_plugin.errors import DataError, plain
from msp_plugin.runtime.documents import parse_json

log = logging.getLogger(__name__)

#: (the row's place for errors, its value).
Row = tuple[str, Any]

DEFAULT_COLUMN = "text"
#: Columns that hold conversations, never plain text.
CHAT_COLUMNS = ("messages", "conversations")
#: Columns that hold the text where there is none with the default name.
_USUAL = (*((name,) for name in CHAT_COLUMNS), ("prompt", "completion"))
_TEXT = (".txt", ".md", ".py", ".text")
_LINES = (".jsonl", ".json", ".ndjson")
_TABLES = {".csv": ",", ".tsv": "\t"}
_ARROW = (".parquet", ".arrow", ".feather")
_ROWS = (*_LINES, *_TABLES, *_ARROW)
_PACKED = (".gz", ".bz2", ".xz", ".zst")
#: Files of a directory that describe its data and hold none.
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_NOT_TRAIN = {"test", "validation", "valid", "val", "dev", "eval"}
#: Characters of a piece of a text.
_PIECE = 2**20
FORMS = (
    f"known are {', '.join((*_TEXT, *_ROWS))}, each but {', '.join(_ARROW)} also with {', '.join(_PACKED)}; "
    "any other file is read as text"
)


def is_known(path: Path) -> bool:
    """Return True if a file has the suffix of a text or a table."""
    return _kind(path)[0] in (*_TEXT, *_ROWS)


def text_columns(row: Iterable[str], column: str) -> tuple[str, ...]:
    """Return the columns that hold a row's text: ``column``, or the usual ones if that is the default."""
    if column in row:
        return (column,)
    usual = _USUAL if column == DEFAULT_COLUMN else ()
    return next((names for names in usual if all(name in row for name in names)), ())


def data_files(path: Path) -> list[Path]:
    """Return the data files of a directory, sorted by name: all of the first kind below that is there.

    1. Parquet and arrow files; 2. jsonl files and compressed tables; 3. csv and JSON files; 4. texts; 5. JSON files with
    one object over several lines, which are settings. Warns of what is left out, but for READMEs. If some tables have
    "train" in their path, those of other splits are left out; so are texts whose names all name splits.
    """
    there = [p for p in _files_below(path) if p.name not in _ABOUT]
    places = {p: _place(p) for p in there if is_known(p)}
    first = min(places.values(), default=0)
    files = [p for p in places if places[p] == first]
    left = [p for p in there if places.get(p) != first and p.stem.lower() != "readme"]
    if left:
        log.warning(
            "%s: %d files beside the data are not read: %s%s",
            plain(path),
            len(left),
            ", ".join(plain(p.relative_to(path)) for p in left[:5]),
            ", ..." if left[5:] else "",
        )
    words = {p: set(re.split("[^a-z]+", str(p.relative_to(path)).lower())) for p in files}
    splits = all(_kind(p)[0] in _ROWS or named & {"train", *_NOT_TRAIN} for p, named in words.items())
    if splits and any("train" in named for named in words.values()):
        others = {p for p, named in words.items() if "train" not in named and named & _NOT_TRAIN}
        if others:
            log.info("%s: %d files of other splits than train are not read", plain(path), len(others))
        files = [p for p in files if p not in others]
    return files


def _files_below(path: Path) -> list[Path]:
    """Return the files in a directory and in those below, sorted, also behind links; without hidden ones.

    A directory that can be reached without links is read there, and none is read twice or above ``path``.
    """
    found: list[Path] = []
    near, far = [path], list[Path]()
    seen = set(path.resolve().parents)
    while near or far:
        folder = near.pop() if near else far.pop()
        if (real := folder.resolve()) in seen:
            continue
        seen.add(real)
        inside = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
        found += [p for p in inside if p.is_file()]
        near += [p for p in inside if p.is_dir() and not p.is_symlink()]
        far += [p for p in inside if p.is_dir() and p.is_symlink()]
    return sorted(found)


def _place(path: Path) -> int:
    """Return the place of a file in the list of data_files, from 1."""
    kind, packing = _kind(path)
    if kind in _ARROW:
        return 1
    if kind in _TEXT:
        return 4
    if packing or kind not in (".json", *_TABLES):
        return 2
    return 5 if kind == ".json" and _is_spread(path) else 3


def _is_spread(path: Path) -> bool:
    """Return True if a file begins with a JSON object that goes on after its first line."""
    try:
        with _open(path) as file:
            line, newline, _ = file.read(_PIECE).lstrip().partition("\n")
    except (OSError, UnicodeDecodeError):
        return False  # explained when it is read
    return bool(newline) and line.startswith("{") and not line.rstrip().endswith("}")


def _kind(path: Path) -> tuple[str, str]:
    """Return (suffix of a file's form, suffix of its compression), lower case; the second may be empty."""
    name = path.name.lower()
    packing = next((suffix for suffix in _PACKED if name.endswith(suffix)), "")
    return Path(name.removesuffix(packing)).suffix, packing


def file_rows(path: Path, column: str) -> Iterator[Row]:
    """Yield the rows of a file; parquet and arrow files give only the columns that hold the text.

    Raises:
        DataError: the file does not fit its suffix, or is damaged; the message names the line or row.
    """
    kind, packing = _kind(path)
    if kind in _LINES:
        return _json_rows(path)
    if kind in _TABLES:
        return _csv_rows(path, _TABLES[kind])
    if kind in _ARROW and not packing:
        return _arrow_rows(path, kind, column)
    return iter([(plain(path), _pieces(path))])


def _open(path: Path, newline: str | None = None) -> IO[str]:
    """Open a text file, which may be compressed, and skip a byte order mark."""
    openers: dict[str, Callable[..., IO[str]]]
    openers = {"": Path.open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    packing = _kind(path)[1]
    opener = openers.get(packing) or need("zstandard", path, "zstandard").open
    return opener(path, "rt", encoding="utf-8-sig", newline=newline)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn a failure to read ``path`` in the block into a DataError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{plain(path)} is not UTF-8 text: {error}", hint=FORMS) from None
    except PermissionError:
        raise DataError(f"you may not read {plain(path)}", hint="ask for its permissions") from None
    except _damage_errors() as error:
        raise DataError(
            f"cannot read {plain(path)}: {error}", hint="the file is damaged or incomplete"
        ) from None


def _damage_errors() -> tuple[type[Exception], ...]:
    """Return the types of errors that damaged files raise; zstandard's only if it is loaded."""
    zstandard = sys.modules.get("zstandard")
    own = () if zstandard is None else (zstandard.ZstdError,)
    return (OSError, EOFError, zlib.error, lzma.LZMAError, *own)


def need(module: str, source: object, package: str) -> Any:
    """Return an imported module of an optional package.

    Args:
        source: the file that needs it, for the error.
        package: name to install.

    Raises:
        DataError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(
            f"{plain(source)} cannot be read without the package {package}", hint=f"pip install {package}"
        ) from None


def _pieces(path: Path) -> Iterator[str]:
    """Yield a file's text in pieces of about ``_PIECE`` characters, each ending with a line."""
    with _reading(path), _open(path) as file:
        while piece := file.read(_PIECE) + file.readline():
            yield piece


def _json_rows(path: Path) -> Iterator[Row]:
    """Yield the JSON value of each line, or the elements of one array."""
    with _reading(path), _open(path) as file:
        first = True
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if first and line.lstrip().startswith("["):
                yield from _array_rows(path, line + file.read())
                return
            first = False
            try:
                row = _parse_text(line)
            except ValueError as error:
                raise DataError(
                    f"{plain(path)}, line {number} is not JSON: {error}",
                    hint="jsonl holds one JSON object a line, or one array of objects",
                ) from None
            yield f"{plain(path)}, line {number}", row


def _parse_text(text: str) -> Any:
    """Return the value of a JSON text that a tokenizer can read.

    Raises:
        ValueError: see parse_json; or the text has half of a surrogate pair, which UTF-8 cannot encode.
    """
    value = parse_json(text)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _array_rows(path: Path, text: str) -> Iterator[Row]:
    """Yield the elements of a JSON array."""
    try:
        rows = _parse_text(text)
    except ValueError as error:
        raise DataError(
            f"{plain(path)} begins as a JSON array and is none: {error}",
            hint="it is damaged, or has an array in each line: give one array of objects, or one object a line",
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{plain(path)}, row {number}", row


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a csv or tsv file."""
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # a document may be longer than 128 KiB
    with _reading(path), _open(path, newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                yield f"{plain(path)}, line {reader.line_num}", row
        except csv.Error as error:
            raise DataError(
                f"{plain(path)} is damaged after line {reader.line_num}: {error}",
                hint="quotes must be closed and doubled",
            ) from None


def _arrow_rows(path: Path, kind: str, column: str) -> Iterator[Row]:
    """Yield the rows of a parquet or arrow file, batch by batch, with only the columns that hold the text."""
    pa = need("pyarrow", path, "datasets")
    number = 0
    try:
        for batch in _parquet_batches(path, column) if kind == ".parquet" else _arrow_batches(pa, path):
            names = text_columns(batch.schema.names, column)
            for row in (batch.select(names) if names else batch).to_pylist():
                number += 1
                yield f"{plain(path)}, row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        raise DataError(
            f"cannot read {plain(path)} after row {number:,}: {error}",
            hint="the file is damaged or incomplete",
        ) from None


def _parquet_batches(path: Path, column: str) -> Iterator[Any]:
    file = need("pyarrow.parquet", path, "datasets").ParquetFile(path)
    yield from file.iter_batches(256, columns=text_columns(file.schema_arrow.names, column) or None)


def _arrow_batches(pa: Any, path: Path) -> Iterator[Any]:
    with pa.memory_map(str(path)) as file:
        try:
            yield from pa.ipc.open_stream(file)
        except pa.ArrowInvalid:  # arrow's other form, a file instead of a stream; or damaged
            whole = pa.ipc.open_file(file)
            yield from (whole.get_batch(i) for i in range(whole.num_record_batches))
