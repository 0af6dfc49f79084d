"""Checkpoints: whatever stands in headers, config, index and manifest, they are read or refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import byte_files, documents, json_files
from readers import READERS, check, parts, safetensors

FORMS = st.sampled_from(["dense", "packed"])


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
