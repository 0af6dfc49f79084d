"""export.json: what was written, and what is wrong with a copy."""

import hashlib
import json

import pytest

from msp_plugin.checkpoint.manifest import MANIFEST_FILE, Manifest, describe_files
from msp_plugin.errors import FormatError


@pytest.fixture
def exported(tmp_path):
    """Two files and the manifest that describes them."""
    (tmp_path / "one").write_bytes(b"first")
    (tmp_path / "two").write_bytes(b"")
    manifest = Manifest(
        "sparse24", describe_files([tmp_path / "one", tmp_path / "two"]), {"x": [2, 3]},
        packed={"a.b": "2:4"}, kept_dense={"a.c": "why"}, packed_bytes=9, dense_bytes=16,
        negative_zeros={"a.b": 1}, quantization_errors={"a.b": 0.01}, rounded_to_zero={"a.b": 3}, versions={"torch": "2"},
    )  # fmt: skip
    manifest.write(tmp_path)
    return tmp_path


def test_the_file_says_schema_version_and_every_field(exported):
    assert json.loads((exported / MANIFEST_FILE).read_text()) == {
        "schema": "msp_plugin/export", "version": 1, "format": "sparse24",
        "files": {
            "one": {"bytes": 5, "sha256": hashlib.sha256(b"first").hexdigest()},
            "two": {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()},
        },
        "tensors": {"x": [2, 3]}, "packed": {"a.b": "2:4"}, "kept_dense": {"a.c": "why"},
        "packed_bytes": 9, "dense_bytes": 16, "negative_zeros": {"a.b": 1}, "structure": {},
        "quantization_errors": {"a.b": 0.01}, "rounded_to_zero": {"a.b": 3}, "versions": {"torch": "2"},
    }  # fmt: skip


def test_reading_gives_what_was_written(exported):
    found = Manifest.read(exported)
    assert found.files == describe_files([exported / "one", exported / "two"])
    assert (found.format, found.tensors, found.packed) == ("sparse24", {"x": [2, 3]}, {"a.b": "2:4"})
    before = (exported / MANIFEST_FILE).read_bytes()
    found.write(exported)
    assert (exported / MANIFEST_FILE).read_bytes() == before


def test_a_directory_without_one_has_none(tmp_path):
    assert Manifest.read(tmp_path) is None


def test_untouched_files_have_no_differences_and_further_files_do_not_matter(exported):
    (exported / "three").write_bytes(b"third")
    assert Manifest.read(exported).differences(exported) == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "one").unlink(), "one is missing"),
        (lambda path: (path / "one").write_bytes(b"firs"), "one has 4 bytes, 5 were written"),
        (
            lambda path: (path / "one").write_bytes(b"fIrst"),
            "one has other bytes than were written (SHA-256)",
        ),
        (lambda path: (path / "two").write_bytes(b"x"), "two has 1 bytes, 0 were written"),
    ],
)
def test_a_file_that_is_not_what_was_written_is_named(damage, words, exported):
    damage(exported)
    assert Manifest.read(exported).differences(exported) == [words]


def test_every_file_that_differs_is_listed(exported):
    (exported / "one").unlink()
    (exported / "two").write_bytes(b"x")
    assert len(Manifest.read(exported).differences(exported)) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(version=2), "has version 2, this package reads 1"),
        (lambda data: data.pop("version") and None, "has version None"),
        (lambda data: data.update(schema="msp_plugin/run"), "is not an export manifest"),
        (lambda data: data.pop("schema") and None, "is not an export manifest"),
        (lambda data: data.pop("files") and None, "is damaged"),
        (lambda data: data.pop("tensors") and None, "is damaged"),
        (lambda data: data.update(colour="red"), "is damaged: a manifest has no key 'colour'"),
        (lambda data: data.update({"[" * 10**5: 1}), "has no key"),
        (lambda data: data["files"].update({"x" * 300: data["files"]["one"]}), "is damaged: .* file 'xxx"),
        (lambda data: data.update(files=[]), "is damaged"),
        (lambda data: data.update(files={"one": 3}), "is damaged"),
        (lambda data: data["files"]["one"].pop("sha256") and None, "is damaged: KeyError"),
        (lambda data: data["files"]["one"].update(sha256=3), "is damaged"),
        (lambda data: data["files"]["one"].update(bytes=-1), "is damaged"),
        (lambda data: data["files"]["one"].update(bytes="5"), "is damaged"),
        (lambda data: data["files"].update({"../one": data["files"]["one"]}), r"file '\.\./one'"),
        (lambda data: data["files"].update({"/etc/hostname": data["files"]["one"]}), "file '/etc/hostname'"),
        (lambda data: data["files"]["one"].update(bytes=True), "is damaged"),
        (lambda data: data.update(tensors={"x": ["2"]}), r"is damaged: tensors\.x\.0"),
        (lambda data: data.update(packed=["a.b"]), "is damaged: packed"),
        (lambda data: data.update(packed_bytes="9"), "is damaged: packed_bytes"),
        (lambda data: data.update(tensors={"x": 3}), "is damaged"),
        (lambda data: data.update(tensors=[]), "is damaged"),
        (lambda data: [], "holds no JSON object"),
    ],
)
def test_a_manifest_that_is_newer_or_damaged_is_refused(change, words, exported, edit_json):
    edit_json(exported / MANIFEST_FILE, change)
    with pytest.raises(FormatError, match=words) as error:
        Manifest.read(exported)
    assert MANIFEST_FILE in error.value.message and len(error.value.message) < 3000
