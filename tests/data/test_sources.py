import bz2
import gzip
import json
import lzma
import sys

import pytest

from msp_plugin.data.sources import load_texts
from msp_plugin.errors import DataError
from tests.helpers.rows import ROWS, read, write_rows


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo ü\n", encoding="utf-8")
    assert read(str(path)) == ["one\ntwo ü\n"]


def test_a_jsonl_file_holds_a_document_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "id": 1}\n\n"two"\n{"text": "thrée"}\n', encoding="utf-8")
    assert read(str(path)) == ["one", "two", "thrée"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_a_jsonl_line_ends_at_a_newline_only(tmp_path, mark):
    path = tmp_path / "a.jsonl"
    row = json.dumps({"text": f"one{mark}two"}, ensure_ascii=False)
    path.write_text(f"{row}\n{row}\n", encoding="utf-8")
    assert read(str(path)) == [f"one{mark}two"] * 2


def test_another_column_is_read_when_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "no", "content": "yes"}\n')
    assert read(str(path), "content") == ["yes"]


def test_a_jsonl_line_that_is_no_json_is_named_by_its_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": two}\n')
    with pytest.raises(DataError, match="a.jsonl, line 3 is not JSON") as error:
        read(str(path))
    assert "one JSON object a line" in error.value.hint


@pytest.mark.parametrize("line", ["1" * 5000, "[" * 100_000], ids=["too long a number", "too deep"])
def test_a_jsonl_line_beyond_pythons_limits_is_named_too(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one"}}\n{line}\n')
    with pytest.raises(DataError, match="a.jsonl, line 2 is not JSON"):
        read(str(path))


@pytest.mark.parametrize("line, hint", [
    ('{"texts": "two", "id": 1}', "did you mean 'texts'?"), ('{"tag": 5, "body": "x"}', "known: body"),
    ("[1, 2]", "known: (none)"), ("5", "known: (none)"),
])  # fmt: skip
def test_a_jsonl_line_without_the_column_names_the_nearest(tmp_path, line, hint):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one"}}\n{line}\n')
    with pytest.raises(DataError, match="a.jsonl, line 2 has no text in 'text'") as error:
        read(str(path))
    assert hint in error.value.hint


def test_a_directory_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub" / "c.py").write_text("c")
    (tmp_path / "image.png").write_bytes(b"\xff\x00")
    assert read(str(tmp_path)) == ["a", "b", "c"]


def test_a_directory_without_text_says_what_it_looked_for(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\xff\x00")
    with pytest.raises(DataError, match="holds no text, no table and no saved dataset"):
        read(str(tmp_path))


@pytest.mark.parametrize("source", ["/nowhere/a.jsonl", "a.txt", "./nowhere", "~/nowhere-at-all", "x.json"])
def test_a_missing_file_is_no_hub_dataset(source):
    with pytest.raises(DataError, match="there is no data file at") as error:
        read(source)
    assert (
        source.removeprefix("./").removeprefix("~/") in error.value.message and "dataset" in error.value.hint
    )


@pytest.mark.parametrize(
    "name, content", [("a.txt", ""), ("a.txt", " \n\t\n"), ("a.jsonl", ""), ("a.jsonl", '{"text": " "}\n')]
)
def test_a_source_without_text_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name} holds no text"):
        read(str(tmp_path / name))


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="a.txt is not UTF-8"):
        read(str(path))


@pytest.fixture(scope="module")
def saved_datasets(tmp_path_factory):
    from datasets import Dataset, DatasetDict

    root = tmp_path_factory.mktemp("datasets")
    rows = Dataset.from_dict({"text": ["one", "two"], "id": [1, 2]})
    rows.save_to_disk(str(root / "rows"))
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(root / "splits"))
    DatasetDict({"first": rows}).save_to_disk(str(root / "odd"))
    return root


@pytest.mark.parametrize("name", ["rows", "splits"])
def test_a_saved_dataset_is_read_from_its_train_split(saved_datasets, name):
    assert read(str(saved_datasets / name)) == ["one", "two"]


def test_a_dataset_without_the_column_names_the_nearest(saved_datasets):
    with pytest.raises(DataError, match="has no column 'txt'") as error:
        read(str(saved_datasets / "rows"), "txt")
    assert "did you mean 'text'?" in error.value.hint


def test_a_dataset_without_a_train_split_lists_its_splits(saved_datasets):
    with pytest.raises(DataError, match="has the splits first and no train") as error:
        read(str(saved_datasets / "odd"))
    assert "directory" in error.value.hint


@pytest.mark.parametrize("source", ["no-such-data", "nobody/nothing", "nobody/nothing:config:test"])
def test_a_hub_dataset_that_cannot_be_loaded_is_explained(source):
    with pytest.raises(DataError, match="is neither a file nor a dataset that can be loaded") as error:
        read(source)
    assert repr(source) in error.value.message and "id[:config][:split]" in error.value.hint


def test_the_embedded_corpus_is_a_source():
    assert any("def " in text for text in read("demo:search"))


@pytest.mark.parametrize("name", [
    "a.jsonl", "a.json", "array.json", "a.ndjson", "a.jsonl.gz", "c4-train.00000-of-01024.json.gz", "array.json.bz2",
    "a.jsonl.xz", "a.parquet", "a.arrow", "a.stream.arrow", "a.csv", "a.csv.gz", "a.tsv", "data [1] *.parquet",
])  # fmt: skip
def test_a_table_is_read_in_every_form(tmp_path, name):
    documents = load_texts(write_rows(tmp_path / name))
    assert list(documents) == ["one", "zwei\nü"]
    assert documents.rows == 2 and documents.skipped == 0 and documents.columns == ("text",)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.xz", "a.md.bz2"])
def test_a_compressed_text_is_one_document(tmp_path, name):
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[name[name.rindex(".") :]]
    (tmp_path / name).write_bytes(pack("one\ntwo ü\n".encode()))
    assert read(str(tmp_path / name)) == ["one\ntwo ü\n"]


def test_a_long_text_comes_in_pieces_that_end_with_a_line(tmp_path):
    text = "a line of a long text\n" * 100_000
    (tmp_path / "a.txt").write_text(text)
    (document,) = [list(pieces) for pieces in load_texts(str(tmp_path / "a.txt"))]
    assert len(document) == 3 and "".join(document) == text and all(p.endswith("\n") for p in document)


def test_rows_are_read_as_far_as_they_are_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 3 + "damaged")
    documents = iter(load_texts(str(tmp_path / "a.jsonl")))
    assert [next(documents) for _ in range(3)] == ["one"] * 3
    with pytest.raises(DataError, match="line 4 is not JSON"):
        next(documents)


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.parquet", "a.arrow"])
def test_null_and_empty_rows_are_skipped_and_counted(tmp_path, name):
    texts = ["one", None, "", "None", " \n", "two"]
    documents = load_texts(write_rows(tmp_path / name, [{"text": text} for text in texts]))
    assert list(documents) == ["one", "None", "two"] and (documents.rows, documents.skipped) == (6, 3)


@pytest.mark.parametrize("content", ['{"text": "one"}\nnull\n"two"\n', '[{"text": "one"}, null, "two"]'])
def test_a_row_that_is_null_itself_is_skipped_and_counted(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    documents = load_texts(str(tmp_path / "a.json"))
    assert list(documents) == ["one", "two"] and (documents.rows, documents.skipped) == (3, 1)


def test_rows_that_are_all_null_are_no_text(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": None}] * 3)
    with pytest.raises(DataError, match="a.jsonl holds no text: all 3 rows are null or empty"):
        read(path)


def test_null_rows_of_a_dataset_are_skipped(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"text": ["one", None, "two"]}).save_to_disk(str(tmp_path / "saved"))
    documents = load_texts(str(tmp_path / "saved"))
    assert list(documents) == ["one", "two"] and (documents.rows, documents.skipped) == (3, 1)


@pytest.mark.parametrize("value", [5, 1.5, True, [1, 2], ["a"], {"a": 1}, [{"role": "user"}], [[]]])
def test_a_column_of_another_type_is_named_with_its_value(tmp_path, value):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"text": value}])
    with pytest.raises(DataError, match="a.jsonl, line 2: 'text' is .*neither text nor messages") as error:
        read(path)
    assert "column that holds the text" in error.value.hint


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
def test_a_column_of_numbers_or_bytes_is_named(tmp_path, name):
    from datasets import Dataset

    rows = [{"text": "one", "id": 7, "raw": b"xyz"}]
    if name == "saved":
        Dataset.from_list(rows).save_to_disk(str(tmp_path / name))
    else:
        write_rows(tmp_path / name, rows)
    for column, value in (("id", "7"), ("raw", "b'xyz'")):
        with pytest.raises(DataError, match=f"row 1: '{column}' is {value}"):
            read(str(tmp_path / name), column)


@pytest.mark.parametrize(
    "name, cut", [("a.jsonl.gz", 9), ("a.json.xz", 9), ("a.parquet", 30), ("a.arrow", 30)]
)
def test_a_file_that_was_cut_off_is_named(tmp_path, name, cut):
    path = write_rows(tmp_path / name, ROWS * 100)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-cut])
    with pytest.raises(DataError, match=f"cannot read .*{name}") as error:
        read(path)
    assert "damaged or incomplete" in error.value.hint


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet", "a.arrow"])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, name):
    (tmp_path / name).write_text("just text")
    with pytest.raises(DataError, match=f"cannot read .*{name}"):
        read(str(tmp_path / name))


def test_a_damaged_array_and_csv_are_named(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "one"},\n')
    with pytest.raises(DataError, match="a.json begins as a JSON array and is none"):
        read(str(tmp_path / "a.json"))
    (tmp_path / "a.csv").write_text('text\n"one"\n"two\n')
    with pytest.raises(DataError, match="a.csv is damaged after line 2"):
        read(str(tmp_path / "a.csv"))


def test_a_binary_file_hears_which_forms_there_are(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x93\xff")
    with pytest.raises(DataError, match="is not UTF-8 text") as error:
        read(str(tmp_path / "a.bin"))
    assert ".parquet" in error.value.hint and ".gz" in error.value.hint


@pytest.mark.parametrize(
    "name, module", [("a.parquet", "pyarrow"), ("a.arrow", "pyarrow"), ("saved", "datasets")]
)
def test_a_missing_package_is_named_and_text_needs_none(tmp_path, monkeypatch, name, module):
    from datasets import Dataset

    if name == "saved":
        Dataset.from_list(ROWS).save_to_disk(str(tmp_path / name))
    else:
        write_rows(tmp_path / name)
    write_rows(tmp_path / "a.jsonl.gz")
    for missing in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(DataError, match="without the package datasets") as error:
        read(str(tmp_path / name))
    assert error.value.hint == "pip install datasets"
    assert read(str(tmp_path / "a.jsonl.gz")) == ["one", "zwei\nü"]


@pytest.mark.parametrize("form", ["{}.parquet", "{}.jsonl", "{}.json.gz", "{}.csv"])
def test_a_directory_of_tables_is_read_from_its_training_split(tmp_path, form):
    for split in ("train-00000-of-00002", "train-00001-of-00002", "test-00000", "validation"):
        write_rows(tmp_path / form.format(split), [{"text": split, "id": 1}])
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.json").write_text("{}")
    assert read(str(tmp_path)) == ["train-00000-of-00002", "train-00001-of-00002"]


def test_settings_beside_texts_are_no_data(tmp_path, caplog):
    (tmp_path / "a.py").write_text("code")
    (tmp_path / "package.json").write_text('{\n "name": "x"\n}')
    assert read(str(tmp_path)) == ["code"]
    assert "not read: package.json" in caplog.text


@pytest.mark.parametrize(
    "name", ["train.json", "array.json", "a.jsonl", "a.csv", "a.tsv", "a.json.gz", "a.parquet"]
)
def test_texts_beside_a_table_are_no_data_and_named(tmp_path, caplog, name):
    write_rows(tmp_path / name)
    for text in ("LICENSE.txt", "LICENSE.md", "README.md", "loader.py", "notes.txt.gz"):
        (tmp_path / text).write_text("no data")
    assert read(str(tmp_path)) == ["one", "zwei\nü"]
    assert (
        "4 files beside the data are not read: LICENSE.md, LICENSE.txt, loader.py, notes.txt.gz"
        in caplog.text
    )


def test_a_name_that_no_terminal_should_see_is_written_with_escapes(tmp_path):
    name = "a\x1b[31m\n\udcff [red].jsonl"
    (tmp_path / name).write_text("damaged")
    with pytest.raises(DataError) as error:
        read(str(tmp_path / name))
    assert r"a\x1b[31m\n\udcff [red].jsonl, line 1 is not JSON" in error.value.message
    for path in (tmp_path / name, tmp_path / "gone" / name):
        with pytest.raises(DataError) as error:
            read(str(path), "x\x1b")
        str(error.value).encode()
        assert "\x1b" not in str(error.value)


def test_a_text_in_the_place_of_its_file_is_explained():
    with pytest.raises(DataError, match="cannot read the data at .*File name too long"):
        load_texts("some text " * 60)
