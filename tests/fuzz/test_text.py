"""Calibration text: whatever a file holds, it is tokenized or refused by name."""

import pytest
from hypothesis import given

from msp_plugin.errors import DataError
from tests.fuzz.mutations import byte_files
from tests.fuzz.readers import JSONL, READERS, check


def test_the_valid_files_are_read(tmp_path):
    assert check(READERS["lines"], tmp_path, JSONL.encode()) is None
    assert check(READERS["text"], tmp_path, JSONL.encode()) is None


@given(byte_files(JSONL.encode()))
def test_any_lines_are_read_or_refused(directory, content):
    check(READERS["lines"], directory, content)


@given(byte_files("Grüße\n".encode() * 9))
def test_any_text_is_read_or_refused(directory, content):
    check(READERS["text"], directory, content)


@pytest.mark.parametrize(
    "line", [b'{"text": "\\ud800"}', b'"\\udfff"', b'{"text": 1}', b"[1]", b"NaN", b'{"text": "a", "text": "b"}', b"[" * 9999]
)  # fmt: skip
def test_a_line_that_is_no_text_is_named(line, tmp_path):
    error = check(READERS["lines"], tmp_path, JSONL.encode() + line)
    assert isinstance(error, DataError) and "line 4" in str(error)


def test_a_byte_order_mark_is_no_text(tmp_path):
    from tests.fuzz.readers import read_lines, read_text

    (tmp_path / "data.txt").write_bytes(b"\xef\xbb\xbf" + JSONL.encode())
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + JSONL.encode())
    marked = [read(tmp_path).fingerprint for read in (read_text, read_lines)]
    (tmp_path / "data.txt").write_bytes(JSONL.encode())
    (tmp_path / "data.jsonl").write_bytes(JSONL.encode())
    assert marked == [read(tmp_path).fingerprint for read in (read_text, read_lines)]
