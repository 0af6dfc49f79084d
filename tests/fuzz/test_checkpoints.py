"""Checkpoints: whatever stands in headers, config, index and manifest, they are read or refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.errors import FormatError
from msp_plugin.formats.bitmask import SparseBitmask
from msp_plugin.formats.bitmask_int8 import Int8Bitmask
from tests.fuzz.mutations import byte_files, documents, json_files
from tests.fuzz.readers import READERS, check, parts, safetensors

FORMS = st.sampled_from(["dense", "packed", "bitmask"])


@pytest.fixture(scope="module")
def originals(checkpoints):
    names = ("model.safetensors", "config.json", "export.json", "tokenizer.json")
    return {
        form: {name: (path / name).read_bytes() for name in names if (path / name).is_file()}
        for form, path in checkpoints.items()
    }


@pytest.fixture(autouse=True)
def restored(checkpoints, originals):
    """Put the files back that the examples damaged."""
    yield
    for form, path in checkpoints.items():
        for name, content in originals[form].items():
            (path / name).unlink(missing_ok=True)
            (path / name).write_bytes(content)


def test_the_valid_files_are_read(checkpoints, originals):
    for form, path in checkpoints.items():
        assert check(READERS["tensors"], path, originals[form]["model.safetensors"]) is None


SIZES = [0, 1, -1, 2**31, 2**63, 2**64 - 1, 2**64, 10**30]


@st.composite
def headers(draw, content):
    """A safetensors file whose header, offsets or length lie."""
    header, data = parts(content)
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
        about, number = dict(header[name]), draw(st.integers(0, 5))
        size = st.sampled_from(SIZES) | st.integers(-(2**65), 2**65)
        if number == 0:
            about["data_offsets"] = [draw(size), draw(size)]
        elif number == 1:
            about["shape"] = draw(st.lists(size, max_size=4))
        elif number == 2:
            about["dtype"] = draw(
                st.sampled_from(["F64", "F4", "F8_E8M0", "I4", "BOOL", "C64", "U64", "X", ""])
            )
        elif number == 3:
            about["data_offsets"] = header[draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))][
                "data_offsets"
            ]
        elif number == 4:
            about = {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}
        header[draw(st.sampled_from([name, name, "x", "", "__metadata__"]))] = about
    else:
        header = draw(documents(header))
    try:
        text = json.dumps(header).encode()
    except (ValueError, RecursionError):
        text = b"{}"
    length = draw(st.none() | st.sampled_from(SIZES))
    return safetensors(text, data[: draw(st.none() | st.integers(0, len(data)))], length)


@given(st.data(), FORMS)
def test_any_tensors_are_read_or_refused(checkpoints, originals, data, form):
    content = originals[form]["model.safetensors"]
    check(READERS["tensors"], checkpoints[form], data.draw(headers(content) | byte_files(content)))


#: Numbers that a damaged row offset, size or byte of a mask may be.
NUMBERS = st.sampled_from([0, 1, -1, 7, 8, 2**31, 2**62, -(2**63)]) | st.integers(-3, 40)
TYPES = st.sampled_from([torch.uint8, torch.int64, torch.bfloat16, torch.float64, torch.int32, torch.bool])


@pytest.mark.parametrize("format", [SparseBitmask(), Int8Bitmask()], ids=lambda format: format.name)
@given(st.data(), st.integers(1, 5), st.integers(1, 20))
def test_any_bitmask_tensors_are_unpacked_to_their_shape_or_refused(format, data, rows, columns):
    tensors = format.pack(torch.arange(rows * columns).reshape(rows, columns) % 3.0, "layer")
    for _ in range(data.draw(st.integers(1, 3))):
        suffix = data.draw(st.sampled_from(format.suffixes))
        action, tensor = data.draw(st.sampled_from(["one", "cut", "type", "shape", "all"])), tensors[suffix]
        if action == "one" and tensor.numel() and tensor.dtype == torch.int64:
            tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = data.draw(NUMBERS)
        elif action == "one" and tensor.numel() and tensor.dtype == torch.uint8:
            tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] ^= data.draw(st.integers(0, 255))
        elif action == "cut":
            tensor = tensor.reshape(-1)[: data.draw(st.integers(0, 9))]
        elif action == "type":
            tensor = tensor.to(data.draw(TYPES))
        elif action == "shape":
            tensor = tensor.reshape(
                data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1), tuple(tensor.shape)]))
            )
        elif action == "all":
            sizes = data.draw(st.lists(st.integers(0, 6), max_size=3))
            tensor = torch.full(sizes, data.draw(st.integers(0, 255))).to(data.draw(TYPES))
        tensors[suffix] = tensor
    try:
        weight = format.unpack(tensors, "layer")
    except FormatError as error:
        assert "layer" in error.message and len(error.message) < 1000
    else:
        assert list(weight.shape) == tensors["shape"].reshape(-1).tolist()
        assert int((weight != 0).sum()) == int((tensors["compressed"] != 0).sum())


@given(st.data(), FORMS)
def test_any_config_is_read_or_refused(checkpoints, originals, data, form):
    content = json.loads(originals[form]["config.json"])
    check(READERS["config"], checkpoints[form], data.draw(json_files(content)))


@given(st.data())
def test_any_manifest_is_read_or_refused(checkpoints, originals, data):
    content = json.loads(originals["packed"]["export.json"])
    check(READERS["manifest"], checkpoints["packed"], data.draw(json_files(content)))


@given(st.data())
def test_any_index_is_read_or_refused(checkpoints, originals, data):
    header, _ = parts(originals["dense"]["model.safetensors"])
    names = sorted(set(header) - {"__metadata__"})
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    try:
        check(READERS["index"], checkpoints["dense"], data.draw(json_files(index)))
    finally:
        (checkpoints["dense"] / READERS["index"].file).unlink()


@given(st.data())
def test_any_tokenizer_is_loaded_or_refused(checkpoints, originals, data):
    content = json.loads(originals["dense"]["tokenizer.json"])
    check(READERS["loaded tokenizer"], checkpoints["dense"], data.draw(json_files(content)))
