"""Safetensors files read one tensor at a time and written shard by shard."""

import json
import os
import struct
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from msp_plugin.errors import FormatError, ModelError, OutputError
from msp_plugin.formats.tensor_files import (
    DTYPES,
    INDEX,
    SINGLE,
    ShardWriter,
    TensorFiles,
    TensorInfo,
    read_json,
)


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def sized(**sizes):
    """Tensors of so many bytes each, all different."""
    return {
        name: torch.arange(size, dtype=torch.uint8) + 17 * i for i, (name, size) in enumerate(sizes.items())
    }


def written(directory, tensors, shard_bytes):
    writer = ShardWriter(
        directory, {n: t.numel() * t.element_size() for n, t in tensors.items()}, shard_bytes
    )
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    return writer.finish()


def with_header(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def sharded(tmp_path):
    """Three shards and their index."""
    written(tmp_path, sized(a=40, b=40, c=40), 50)
    return tmp_path


# reading


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_is_written_and_read_back_bit_for_bit(dtype, tmp_path):
    bits = torch.randint(
        0, 256, (3, 4, dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    tensor = (bits % 2 if dtype == torch.bool else bits).view(dtype).reshape(3, 4)
    written(tmp_path, {"x": tensor}, 10**6)
    info = TensorFiles(tmp_path)["x"]
    assert info == TensorInfo(tmp_path / SINGLE, dtype, (3, 4)) and info.bytes == 12 * dtype.itemsize
    found = TensorFiles(tmp_path).read("x")
    assert (found.dtype, found.shape) == (dtype, (3, 4)) and raw(found) == raw(tensor)
    assert raw(load_file(tmp_path / SINGLE)["x"]) == raw(tensor)  # as everyone else reads it


def test_scalars_empty_and_transposed_tensors_survive(tmp_path):
    tensors = {"s": torch.tensor(2.5), "e": torch.zeros(0, 4), "t": torch.arange(6.0).reshape(2, 3).t()}
    written(tmp_path, tensors, 10**6)
    files = TensorFiles(tmp_path)
    assert {name: info.shape for name, info in files.items()} == {"s": (), "e": (0, 4), "t": (3, 2)}
    assert {name: info.bytes for name, info in files.items()} == {"s": 4, "e": 0, "t": 24}
    assert all(torch.equal(files.read(name), tensor) for name, tensor in tensors.items())


def test_writing_into_a_tensor_that_was_read_does_not_reach_the_file(tmp_path):
    written(tmp_path, {"x": torch.ones(4)}, 10**6)
    files = TensorFiles(tmp_path)
    files.read("x").add_(1)
    assert files.read("x").tolist() == TensorFiles(tmp_path).read("x").tolist() == [1.0] * 4


def test_it_is_a_mapping_of_all_tensors_of_all_files(sharded):
    files = TensorFiles(sharded)
    assert list(files) == ["a", "b", "c"] and len(files) == 3 and "b" in files and "d" not in files
    assert [file.name for file in files.files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    with pytest.raises(FormatError, match="holds no tensor d"):
        files.read("d")


def test_without_an_index_all_files_are_read(sharded):
    (sharded / INDEX).unlink()
    assert list(TensorFiles(sharded)) == ["a", "b", "c"]


def test_a_file_that_the_index_does_not_name_is_left_alone(sharded):
    save_file({"a": torch.zeros(1)}, sharded / "adapter.safetensors")
    assert TensorFiles(sharded)["a"].shape == (40,)


def test_beside_the_one_file_that_transformers_reads_variants_are_left_alone(tmp_path):
    for name, value in (("model", 1.0), ("model.fp16", 2.0), ("consolidated", 3.0)):
        save_file({"x": torch.tensor([value])}, tmp_path / f"{name}.safetensors")
    assert TensorFiles(tmp_path).read("x").tolist() == [1.0]


def test_a_directory_without_safetensors_is_no_model(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="has no safetensors files"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_named_before_a_tensor_is_read(keep, tmp_path):
    written(tmp_path, sized(a=400, b=40), 10**6)
    path = tmp_path / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"model\.safetensors is not a complete safetensors file"):
        TensorFiles(tmp_path)


def test_a_file_truncated_after_it_was_opened_is_named_with_the_tensor(tmp_path):
    written(tmp_path, sized(a=400), 10**6)
    files = TensorFiles(tmp_path)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:200])
    with pytest.raises(FormatError, match=r"cannot read a from .*model\.safetensors"):
        files.read("a")


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"x": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}},
        [],
    ],
    ids=["too short", "overflow", "overlap", "backwards", "no such type", "no object"],
)  # fmt: skip
def test_a_header_that_contradicts_itself_is_damage(header, tmp_path):
    with_header(tmp_path / SINGLE, header, b"\0" * 12)
    with pytest.raises(FormatError, match="is not a complete safetensors file"):
        TensorFiles(tmp_path)


def test_a_type_that_we_do_not_read_is_named_with_its_tensor(tmp_path):
    with_header(tmp_path / SINGLE, {"x": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, b"\0" * 4)
    with pytest.raises(FormatError, match="tensor x has the unknown type F4"):
        TensorFiles(tmp_path)


def test_a_tensor_in_two_files_is_refused_and_both_are_named(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(FormatError, match=r"tensor x is in one\.safetensors and in two\.safetensors"):
        TensorFiles(tmp_path)


# the index


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "sub/inside.safetensors"])
def test_an_index_that_names_a_file_elsewhere_is_refused(name, tmp_path):
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for place in (tmp_path / "outside.safetensors", directory / "sub" / "inside.safetensors"):
        save_file({"x": torch.zeros(1)}, place)
    (directory / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(FormatError, match="outside of its directory") as error:
        TensorFiles(directory)
    assert repr(name) in error.value.message


@pytest.mark.parametrize("name", ["..", ".", "", "gone.safetensors", "a\0b"])
def test_an_index_that_names_no_file_is_refused(name, sharded, edit_json):
    edit_json(sharded / INDEX, lambda data: data["weight_map"].update(a=name))
    with pytest.raises(FormatError, match="lacks|outside"):
        TensorFiles(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match=r"lacks model-00002-of-00003\.safetensors"):
        TensorFiles(sharded)


def test_a_tensor_that_no_shard_holds_is_named(sharded, edit_json):
    edit_json(
        sharded / INDEX, lambda data: data["weight_map"].update(lost=f"model-00001-of-00003.{'safetensors'}")
    )
    with pytest.raises(FormatError, match="names 1 tensors that are not in their file, e.g. lost"):
        TensorFiles(sharded)


def test_a_tensor_in_another_file_than_the_index_says_is_named(sharded, edit_json):
    def swap(data):
        files = data["weight_map"]
        files["a"], files["b"] = files["b"], files["a"]

    edit_json(sharded / INDEX, swap)
    with pytest.raises(FormatError, match="names 2 tensors that are not in their file, e.g. a, b"):
        TensorFiles(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": None}])
def test_an_index_without_a_map_to_files_is_refused(index, sharded):
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(FormatError, match="has no weight_map"):
        TensorFiles(sharded)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "as JSON"), (b"{", "as JSON"), (b"\xff\xfe", "as JSON"), (b"[" * 100_000, "as JSON"),
        (b"[]", "holds no JSON object"), (b'"text"', "holds no JSON object"), (b"null", "holds no JSON object"),
    ],
)  # fmt: skip
def test_json_that_is_none_or_no_object_is_refused_by_path(content, words, tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=words) as error:
        read_json(path)
    assert "some.json" in error.value.message
    with pytest.raises(FormatError, match="as JSON"):
        read_json(tmp_path / "none.json")


# writing


def test_all_in_one_file_without_an_index_if_it_fits_exactly(tmp_path):
    tensors = sized(a=30, b=30)
    assert written(tmp_path, tensors, 60) == [tmp_path / SINGLE]
    assert [p.name for p in tmp_path.iterdir()] == [SINGLE]
    assert {name: raw(t) for name, t in load_file(tmp_path / SINGLE).items()} == {
        n: raw(t) for n, t in tensors.items()
    }


def test_one_byte_more_begins_a_new_shard_and_an_index_names_them(tmp_path):
    tensors = sized(a=30, b=31, c=29)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert written(tmp_path, tensors, 60) == [tmp_path / name for name in names]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, INDEX]
    assert list(load_file(tmp_path / names[0])) == ["a"] and sorted(load_file(tmp_path / names[1])) == [
        "b",
        "c",
    ]
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 90}, "weight_map": {"a": names[0], "b": names[1], "c": names[1]},
    }  # fmt: skip
    files = TensorFiles(tmp_path)
    assert {name: raw(files.read(name)) for name in files} == {name: raw(t) for name, t in tensors.items()}


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    files = written(tmp_path, sized(a=10, b=200, c=10, d=10), 50)
    assert [sorted(load_file(file)) for file in files] == [["a"], ["b"], ["c", "d"]]


def test_the_files_say_that_they_are_pytorchs(tmp_path):
    from safetensors import safe_open

    written(tmp_path, sized(a=4), 50)
    with safe_open(tmp_path / SINGLE, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers refuses files without it


def test_a_shard_is_on_disk_and_out_of_memory_before_the_next_begins(tmp_path):
    writer = ShardWriter(tmp_path, {"a": 40, "b": 40, "c": 40}, 90)
    gone = []
    for name in ("a", "b"):
        tensor = torch.zeros(40, dtype=torch.uint8)
        gone.append(weakref.ref(tensor))
        writer.add(name, tensor)
    del tensor
    assert [ref() for ref in gone] == [None, None]
    assert sorted(load_file(tmp_path / "model-00001-of-00002.safetensors")) == ["a", "b"]
    assert not (tmp_path / INDEX).exists()


def test_a_shard_that_cannot_be_written_is_named(tmp_path):
    writer = ShardWriter(tmp_path / "gone", {"a": 4}, 10)
    with pytest.raises(OutputError, match=r"cannot write model\.safetensors") as error:
        writer.add("a", torch.zeros(1))
    assert "disk full" in error.value.hint


def test_what_was_not_planned_is_not_written(tmp_path):
    writer = ShardWriter(tmp_path, {"a": 1, "b": 1}, 10)
    with pytest.raises(AssertionError, match="b came where a was planned"):
        writer.add("b", torch.zeros(1))
    writer.add("a", torch.zeros(1))
    with pytest.raises(AssertionError, match="1 planned tensors never came"):
        writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_an_index_that_a_save_over_shards_left_behind_is_not_read(tmp_path):
    """transformers removes the shards, not their index, and reads model.safetensors then."""
    written(tmp_path, sized(a=30, b=20, c=10), 30)
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE)
    assert (tmp_path / INDEX).is_file()
    found = TensorFiles(tmp_path)
    assert list(found) == ["a"] and torch.equal(found.read("a"), torch.ones(2))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_one_may_not_read_is_not_called_damaged(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE)
    (tmp_path / SINGLE).chmod(0)
    with pytest.raises(FormatError, match="you may not read") as error:
        TensorFiles(tmp_path)
    assert "damaged" not in error.value.hint
