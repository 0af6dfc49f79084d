"""Journals of values: bit for bit, whole or not at all."""

import errno
from contextlib import closing

import numpy as np
import pytest

from msp_plugin.errors import OutputError
from msp_plugin.runtime.journal import Journal, journals_of, packed, unpacked


def test_arrays_come_back_bit_for_bit():
    array = np.array([[0.1, -0.0, np.nan], [np.inf, 1e-310, -3.5]])
    found = unpacked(packed(array))
    assert found.tobytes() == array.tobytes() and found.shape == (2, 3) and found.flags.writeable


def test_a_disk_that_fills_up_is_named_once(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "a.jsonl", {"model": "a", "seed": 0})
    journal.get("a", lambda: 1)

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OutputError, match="a.jsonl"), closing(journal):
            journal.get("b", lambda: 2)
    again = Journal(tmp_path / "a.jsonl", {"model": "a", "seed": 0})
    assert again.get("a", lambda: "anew") == 1


def test_what_a_killed_process_left_of_a_journal_goes(tmp_path):
    left = tmp_path / ".a.jsonl.0f.partial"
    left.write_bytes(b"half")
    Journal(tmp_path / "a.jsonl", {"model": "a", "seed": 0})
    assert not left.exists()


def test_a_journal_of_another_command_is_kept_until_that_comes_again(tmp_path, caplog):
    path, values = tmp_path / "a.jsonl", []

    def value(seed, new):
        with closing(Journal(path, {"model": "a", "seed": seed})) as journal:
            values.append(journal.get("loss", lambda: new))

    value(0, "hours of work")
    value(1, "another")
    assert "belongs to another seed: it is kept" in caplog.text
    value(0, "anew")
    value(1, "anew")
    assert values == ["hours of work", "another", "hours of work", "another"]
    assert len(journals_of(path)) == 2 and all(file.exists() for file in journals_of(path))
