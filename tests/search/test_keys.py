"""Keys of what was measured."""

from pathlib import Path

import pytest

import msp_plugin
from msp_plugin.runtime.digests import folders_digest
from msp_plugin.search.keys import MEASURING_ROOMS, measuring_code


@pytest.mark.parametrize("change", ["edited", "added", "renamed", "removed", "moved to the next file"])
def test_every_change_of_a_source_file_changes_the_digest_of_its_rooms(tmp_path, change):
    for name, text in (
        ("a/one.py", "1\n2\n"),
        ("a/deep/two.py", "3\n"),
        ("b/three.py", "4\n"),
        ("c/x.py", "5\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = folders_digest(tmp_path, ("a", "b"))
    (tmp_path / "c/x.py").write_text("of another room\n")
    (tmp_path / "a/notes.txt").write_text("no code\n")
    assert folders_digest(tmp_path, ("a", "b")) == folders_digest(tmp_path, ("b", "a")) == before
    one, two = tmp_path / "a/one.py", tmp_path / "a/deep/two.py"
    if change == "edited":
        two.write_text("3 \n")
    elif change == "added":
        (tmp_path / "b/new.py").write_text("")
    elif change == "renamed":
        two.rename(two.with_name("other.py"))
    elif change == "removed":
        one.unlink()
    else:
        one.write_text("2\n")
        two.write_text("1\n3\n")
    assert folders_digest(tmp_path, ("a", "b")) != before


def test_the_rooms_that_measure_are_rooms_with_code():
    root = Path(msp_plugin.__file__).parent
    assert all(list((root / room).glob("*.py")) for room in MEASURING_ROOMS) and len(measuring_code()) == 64
