from functools import cache

import pytest

from msp_plugin.data import demo_corpus as corpus
from msp_plugin.data.demo_corpus import SPLITS, library_files, library_texts, split_of
from msp_plugin.errors import DataError


@cache
def files_of(split):
    return library_files(split)


@pytest.mark.slow
def test_no_file_is_in_two_splits():
    files = {split: files_of(split) for split in SPLITS}
    together = [path for paths in files.values() for path in paths]
    assert len(set(together)) == len(together) > 500
    assert all(len(paths) >= 5 for paths in files.values())
    assert len(files["train"]) > 0.7 * len(together)


@pytest.mark.parametrize("name, split", [
    ("json/decoder.py", "train"), ("argparse.py", "train"), ("test/test_json.py", "train"),
    ("idlelib/idle_test/test_query.py", "train"),
])  # fmt: skip
def test_a_file_belongs_to_its_split_for_good(name, split):
    assert split_of(name) == split


def test_a_split_depends_on_the_path_alone():
    counts = dict.fromkeys(SPLITS, 0)
    for i in range(2000):
        counts[split_of(f"package/module_{i}.py")] += 1
    assert 0.75 < counts["train"] / 2000 < 0.85
    assert all(60 < counts[split] < 140 for split in SPLITS[1:])


def test_test_suites_are_always_training_text():
    assert {
        split_of(f"{folder}/module_{i}.py") for folder in ("test", "x/tests", "idle_test") for i in range(50)
    } == {"train"}


def test_files_are_sorted_and_hold_no_tables_and_no_packages():
    for split in SPLITS[1:]:
        names = [path.as_posix() for path in files_of(split)]
        assert names == sorted(names)
        assert not [n for n in names if "site-packages/" in n or "/encodings/" in n or "/pydoc_data/" in n]


def test_texts_are_those_of_the_files():
    files = files_of("search")
    texts = library_texts("search")
    assert len(texts) == len(files) and texts[0] == files[0].read_text(encoding="utf-8", errors="replace")


def test_an_unknown_split_lists_the_known_ones():
    with pytest.raises(DataError, match="unknown split 'validation'") as error:
        library_texts("validation")
    assert "calibration" in error.value.hint


def test_an_interpreter_without_sources_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="no standard-library source of split 'test'") as error:
        library_files("test")
    assert "give a file of text" in error.value.hint
