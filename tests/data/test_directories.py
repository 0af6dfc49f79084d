"""Directories of files, links in them, and repositories of datasets with splits and configs."""

import pytest

from msp_plugin.errors import DataError
from tests.helpers.rows import read, write_rows


@pytest.mark.parametrize("name", ["{}.txt", "wiki.{}.txt", "{}/a.txt"])
def test_texts_that_all_name_splits_are_read_from_their_training_split(tmp_path, name):
    for split in ("train", "valid", "test"):
        path = tmp_path / name.format(split)
        path.parent.mkdir(exist_ok=True)
        path.write_text(split)
    assert read(str(tmp_path)) == ["train"]


def test_texts_about_trains_are_no_splits(tmp_path):
    for name in ("a train.txt", "a test.txt", "a ship.txt"):
        (tmp_path / name).write_text(name)
    assert read(str(tmp_path)) == ["a ship.txt", "a test.txt", "a train.txt"]


def test_files_behind_links_are_read_once(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.txt").write_text("one")
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "far")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "readme.md").write_text("about")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "far")
    assert read(str(tmp_path / "data")) == ["one", "about"]


def test_a_link_to_one_split_is_not_read_in_its_place(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write_rows(tmp_path / split / "x.jsonl", [{"text": split}])
    (tmp_path / "a link").symlink_to(tmp_path / "train")
    (tmp_path / "up").symlink_to(tmp_path.parent)
    assert read(str(tmp_path)) == ["train"]


def test_files_of_unknown_kinds_beside_data_are_named(tmp_path, caplog):
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "wiki.raw").write_text("wiki")
    assert read(str(tmp_path)) == ["notes"]
    assert "not read: wiki.raw" in caplog.text


def test_a_column_name_that_is_there_twice_is_explained(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table([pa.array(["one"]), pa.array(["two"])], names=["text", "text"])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="cannot read .*a.parquet.* exists 2 times"):
        read(str(tmp_path / "a.parquet"))


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A dataset with a config, as the hub holds it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    about = "configs:\n- config_name: en\n  data_files:\n  - {split: train, path: a.jsonl}\n  - {split: test, path: b.jsonl}\n"
    (tmp_path / "set" / "README.md").write_text(f"---\n{about}---\n")
    for name in ("a", "b"):
        write_rows(tmp_path / "set" / f"{name}.jsonl", [{"text": name}])


@pytest.mark.parametrize("suffix, text", [(":en:test", "b"), (":test", "b"), (":en", "a")])
def test_one_suffix_of_a_hub_dataset_is_a_split_or_a_config(repository, suffix, text):
    assert read(f"set{suffix}") == [text]


@pytest.mark.parametrize("suffix", [":fr", ":en:train:more"])
def test_a_suffix_that_a_hub_dataset_lacks_is_refused(repository, suffix):
    with pytest.raises(DataError, match="neither a file nor a dataset") as error:
        read(f"set{suffix}")
    assert "id[:config][:split]" in error.value.hint
