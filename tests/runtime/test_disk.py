"""Disks that are full, places that cannot be written: one clear error, and nothing half-written."""

import errno
import os
import resource
import sys
from contextlib import contextmanager, suppress

import pytest
from safetensors import SafetensorError

from msp_plugin.errors import OutputError
from msp_plugin.runtime.disk import cannot_write, check_new, writing
from msp_plugin.runtime.files import check_output

needs_user = pytest.mark.skipif(
    os.getuid() == 0, reason="root may write into read-only directories: that they are refused is not checked"
)


@contextmanager
def full_after(size):
    """A disk that is full after ``size`` bytes of each file: a limit on the size of files, as `ulimit -f` sets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (size, hard)
    )  # Python ignores SIGXFSZ: a write fails with EFBIG
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("while True:\n    x = x + 1\n" * 300)
    return path


@pytest.fixture
def commands(run_dir, llama_dir, text):
    """By name the arguments of each command that writes, but for its output, and the bytes after which it fails."""
    data = ["--data", text, "--samples", "4", "--length", "32"]
    plain = ["-s", "0.75", "-m", "magnitude", "--allocator", "uniform"]
    return {
        "allocate": (["allocate", llama_dir, *plain, *data], 100),
        "prune": (["prune", llama_dir, *plain, *data, "--test-samples", "0"], 20_000),
        "compare": (
            ["compare", llama_dir, "-s", "0.75", "--methods", "magnitude", "--allocators", "uniform", "--no-prune",
             "--test-samples", "2", *data],
            200,
        ),
        "eval": (["eval", llama_dir, *data], 100),
        "export": (["export", run_dir, "--to", "sparse24"], 20_000),
        "report": (["report", run_dir], 1000),
    }  # fmt: skip


NAMES = ["allocate", "prune", "compare", "eval", "export", "report"]


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(name, commands, msp, tmp_path, text):
    if name == "report":
        pytest.importorskip("matplotlib", reason="no report is drawn: the extra `report` is not installed")
    arguments, size = commands[name]
    out = tmp_path / "results" / "out"
    out.parent.mkdir()
    with full_after(size):
        said = msp(*arguments, "--out", out, code=2).err
    error = said[said.index("error: ") :]
    assert "Traceback" not in said and len(error.splitlines()) == 2, said
    assert "cannot write" in error and "ulimit -f" in error
    named = {"export": "model.safetensors", "compare": "cache"}  # compare writes its cache first
    assert named.get(name, str(out)) in error
    assert not list(out.parent.iterdir()) and not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["below a file", "/proc"])
def test_a_place_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    name, place, commands, msp, text, monkeypatch
):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    if name not in ("export", "report"):
        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    out = text / "out" if place == "below a file" else "/proc/msp/out"
    said = msp(*commands[name][0], "--out", out, code=2).err
    assert "Traceback" not in said and len(said.strip().splitlines()) == 2
    assert str(text if place == "below a file" else out) in said


@needs_user
@pytest.mark.parametrize("name", NAMES)
def test_a_read_only_directory_is_refused(name, commands, msp, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o555)
    said = msp(*commands[name][0], "--out", place / "out", code=2).err
    assert "not writable" in said or "may write" in said


def test_a_full_stdout_is_an_error_of_its_own(msp, monkeypatch):
    full = open("/dev/full", "w")  # noqa: PTH123, SIM115
    monkeypatch.setattr(sys, "stdout", full)
    said = msp("plugins", "--json", code=2).err
    assert said.startswith("error: cannot read or write the output: No space left on device")
    assert "Traceback" not in said
    with suppress(OSError):
        full.close()


def test_a_cache_that_cannot_be_written_is_an_error_without_a_traceback(msp, llama_dir, text, tmp_path):
    said = msp(
        "allocate", llama_dir, "-s", "0.75", "-m", "magnitude", "--data", text, "--samples", "8", "--length", "32",
        "--set", "allocator.tokens=64", "--set", "allocator.holdout=32", "--cache", text / "cache", "--out", tmp_path / "a.json",
        code=2,
    ).err  # fmt: skip
    assert (
        "Traceback" not in said
        and f"error: no cache can be made at {text}/cache" in said
        and "MSP_CACHE" in said
    )


def test_what_is_probed_is_not_left(tmp_path):
    check_output(tmp_path / "new")
    check_new(tmp_path / "new.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "new.json").touch()
    with pytest.raises(OutputError, match="exists"):
        check_new(tmp_path / "new.json")
    with pytest.raises(OutputError, match="is a directory") as error:
        check_new(tmp_path)
    assert "remove" not in str(error.value)
    with pytest.raises(OutputError, match="cannot write .*File name too long"):
        check_output(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free some space"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "free some space"),
        (SafetensorError("Error: odd"), "is the disk full"),
        (OSError(errno.EROFS, "Read-only file system", "/x/y"), "not read-only"),
    ],
)
def test_an_error_of_a_disk_says_where_and_what_to_do(error, hint, tmp_path):
    with pytest.raises(OutputError, match=f"cannot write {tmp_path}: ") as found, writing(tmp_path):
        raise error
    assert hint in found.value.hint and found.value.__cause__ is error
    assert str(getattr(error, "filename", None) or "the output") in str(cannot_write(None, error))


def test_our_own_errors_are_left_as_they_are(tmp_path):
    with pytest.raises(OutputError, match="^mine$"), writing(tmp_path):
        raise OutputError("mine")
