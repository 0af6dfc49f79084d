import json
import math
import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from msp_plugin.errors import OutputError
from msp_plugin.runtime import files
from msp_plugin.runtime.files import (
    check_output,
    default_cache,
    finite,
    output_directory,
    replacing,
    write_json,
    write_text,
)
from msp_plugin.runtime.locks import sole_run


class Interrupted(BaseException):
    pass


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_file_appears_when_its_block_succeeds(tmp_path):
    path = tmp_path / "deep" / "er" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "new" and names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("cause", [ValueError, KeyboardInterrupt, Interrupted])
def test_a_failed_block_leaves_the_old_file_and_nothing_else(tmp_path, cause):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(cause), replacing(path) as temporary:
        temporary.write_text("half")
        raise cause
    assert path.read_text() == "old" and names(tmp_path) == ["file.txt"]


def test_a_failed_block_leaves_no_new_file(tmp_path):
    with pytest.raises(ValueError), replacing(tmp_path / "file.txt") as temporary:
        temporary.write_text("half")
        raise ValueError
    assert names(tmp_path) == []


def test_json_is_sorted_indented_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "data.json"
    write_json(path, {"b": 1, "a": 2})
    write_json(path, {"b": [1], "a": "ü"})
    assert path.read_bytes() == '{\n  "a": "ü",\n  "b": [\n    1\n  ]\n}\n'.encode()
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü", "b": [1]}


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "data.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": 1} and names(tmp_path) == ["data.json"]


def test_a_written_file_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "file.txt", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o644


@pytest.mark.parametrize("make_empty_first", [False, True])
def test_an_output_directory_appears_whole(tmp_path, make_empty_first):
    path = tmp_path / "runs" / "out"
    if make_empty_first:
        path.mkdir(parents=True)
    with output_directory(check_output(path)) as temporary:
        (temporary / "a.txt").write_text("a")
        assert not path.exists() or names(path) == []
    assert names(path) == ["a.txt"] and names(path.parent) == ["out"]


def test_a_directory_that_a_shell_stands_in_stays_the_same_one(tmp_path, monkeypatch):
    path = tmp_path / "out"
    path.mkdir()
    monkeypatch.chdir(path)
    before = path.stat().st_ino
    with output_directory(Path().absolute()) as temporary:
        (temporary / "a.txt").write_text("a")
    assert path.stat().st_ino == before and names(Path.cwd()) == ["a.txt"]


@pytest.mark.parametrize(
    "umask, directory, file", [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640), (0o077, 0o700, 0o600)]
)
def test_an_output_directory_may_be_read_by_whom_the_umask_lets(tmp_path, umask, directory, file):
    before = os.umask(umask)
    try:
        with output_directory(tmp_path / "out") as temporary:
            (temporary / "a.txt").write_text("a")
            (temporary / "a.txt").chmod(0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == directory
    assert stat.S_IMODE((tmp_path / "out" / "a.txt").stat().st_mode) == file


def test_json_is_json_whatever_a_record_holds(tmp_path):
    write_json(tmp_path / "a.json", {"curve": [[1, math.inf], (2, math.nan)], "b": 0.5, "c": True})
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert found == {"curve": [[1, None], [2, None]], "b": 0.5, "c": True}


def test_what_json_cannot_say_becomes_none():
    assert [finite(v) for v in (None, 1.5, math.inf, -math.inf, math.nan)] == [None, 1.5, None, None, None]


@pytest.mark.parametrize("cause", [ValueError, KeyboardInterrupt, Interrupted])
def test_a_failed_run_leaves_no_directory(tmp_path, cause):
    path = tmp_path / "out"
    with pytest.raises(cause), output_directory(path) as temporary:
        (temporary / "a.txt").write_text("a")
        raise cause
    assert names(tmp_path) == []


def test_a_directory_that_was_filled_in_the_meantime_is_kept(tmp_path):
    path = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="cannot move the finished run to") as error,
        output_directory(path) as temporary,
    ):
        (temporary / "a.txt").write_text("ours")
        path.mkdir()
        (path / "b.txt").write_text("theirs")
    assert names(path) == ["b.txt"]
    (kept,) = [p for p in tmp_path.iterdir() if p != path]
    assert names(kept) == ["a.txt"] and str(kept) in error.value.hint
    with suppress(OutputError), sole_run(path, str(tmp_path / "cache")):
        pass
    assert kept.exists()  # the next command does not take it for what a killed one left


def test_an_empty_directory_whose_parent_may_not_be_written_can_be_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with output_directory(check_output(".")) as temporary:
        (temporary / "a.txt").write_text("a")
    assert names(tmp_path) == ["a.txt"]


def test_an_output_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(OutputError, match="is not empty") as error:
        check_output(tmp_path)
    assert str(tmp_path) in error.value.message and "another directory" in error.value.hint


def test_an_output_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    with pytest.raises(OutputError, match="a.txt is a file") as error:
        check_output(path)
    assert "does not exist yet" in error.value.hint


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(OutputError, match="a.txt"):
        check_output(tmp_path / "a.txt" / "out")


def test_an_output_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(OutputError, match=f"{tmp_path} is not writable") as error:
        check_output(tmp_path / "new" / "out")
    assert "may write" in error.value.hint


def test_a_new_or_an_empty_directory_may_be_written(tmp_path):
    assert check_output(str(tmp_path / "new" / "out")) == tmp_path / "new" / "out"
    assert check_output(tmp_path) == tmp_path
    assert names(tmp_path) == []


def test_the_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MSP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache() == tmp_path / ".cache" / "msp_plugin"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_cache() == tmp_path / ".cache" / "msp_plugin"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "msp_plugin"
    monkeypatch.setenv("MSP_CACHE", "~/mine")
    assert default_cache() == tmp_path / "mine"
