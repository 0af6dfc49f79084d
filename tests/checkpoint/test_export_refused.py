"""Exports that are refused or stopped: the reason is named and nothing is left behind."""

import errno
from collections import namedtuple
from pathlib import Path

import pytest

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import Dense, export_checkpoint
from msp_plugin.checkpoint.manifest import Manifest
from msp_plugin.checkpoint.packed_export import Sparse24
from msp_plugin.errors import FormatError, ModelError, OutputError, RecipeError, VerificationError
from msp_plugin.runtime import disk as writing

UP = "model.layers.1.mlp.up_proj"


def contents(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("where", [(0, 0), (64, 8), (127, 60)])
def test_a_layer_that_is_not_what_its_level_says_is_refused_by_name(
    where, run_dir, copied, rewrite, nothing_left
):
    row, column = where

    def fill(weight):
        weight[row, column : column + 4] = 1
        return weight

    path = rewrite(copied(run_dir), {f"{UP}.weight": fill})
    with pytest.raises(FormatError) as error:
        export_checkpoint(path, Sparse24(shard_bytes=20_000), nothing_left)
    assert f"{UP} is not 2:4" in error.value.message
    assert f"row {row}, columns {column} to {column + 3}" in error.value.message


@pytest.mark.parametrize("content", ["file", "hidden"])
def test_an_output_directory_with_something_in_it_is_untouched(content, run_dir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / {"file": "precious", "hidden": ".precious"}[content]).write_text("x")
    with pytest.raises(OutputError, match="is not empty"):
        export_checkpoint(run_dir, Dense(), tmp_path / "out")
    assert list(contents(tmp_path / "out").values()) == [b"x"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_source_is_never_the_output(run_dir):
    before = contents(run_dir)
    with pytest.raises(OutputError, match="is not empty"):
        export_checkpoint(run_dir, Sparse24(), run_dir)
    assert contents(run_dir) == before


def test_an_output_that_is_a_file_is_untouched(run_dir, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        export_checkpoint(run_dir, Dense(), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "x"


def test_an_empty_output_directory_is_filled(run_dir, tmp_path):
    (tmp_path / "out").mkdir()
    export_checkpoint(run_dir, Sparse24(), tmp_path / "out")
    assert Manifest.read(tmp_path / "out").differences(tmp_path / "out") == []
    assert not [name for name in contents(tmp_path / "out") if ".partial" in name]


def test_a_second_packing_is_refused(packed_dir, nothing_left):
    with pytest.raises(FormatError, match="is packed already"):
        export_checkpoint(packed_dir, Sparse24(), nothing_left)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}, r"is quantized \(compressed-tensors"),
        ({"quant_method": "fp8"}, r"is quantized \(fp8\)"),
        ("fp8", "is quantized"),
    ],
)  # fmt: skip
def test_a_quantized_source_is_refused(said, words, run_dir, copied, edit_json, nothing_left):
    path = copied(run_dir)
    edit_json(path / "config.json", lambda data: data.update(quantization_config=said))
    with pytest.raises(FormatError, match=words):
        export_checkpoint(path, Sparse24(), nothing_left)


def test_a_run_without_a_servable_layer_is_refused_with_the_reasons(make_run, tmp_path, nothing_left):
    run = make_run(tmp_path / "run", levels=["3:8", "dense"] * 4)
    with pytest.raises(FormatError) as error:
        export_checkpoint(run, Sparse24(), nothing_left)
    assert "has no layer that 2:4 kernels could run" in error.value.message
    assert (
        "level 3:8 does not run" in error.value.message and "level dense does not run" in error.value.message
    )


def test_a_dense_model_without_an_allocation_is_refused(llama_dir, nothing_left):
    with pytest.raises(FormatError, match="no layer that 2:4 kernels could run: its weights are not 2:4"):
        export_checkpoint(llama_dir, Sparse24(), nothing_left)


@pytest.mark.parametrize("exporter", [Dense(), Sparse24()], ids=["dense", "sparse24"])
def test_an_allocation_of_another_model_stops_every_export(
    exporter, run_dir, copied, edit_json, nothing_left
):
    path = copied(run_dir)
    edit_json(path / "allocation.json", lambda data: data["units"][1]["layers"][0].update(name="model.other"))
    written = []
    with pytest.raises(VerificationError, match="is for another model"):
        export_checkpoint(path, exporter, nothing_left, progress=lambda *step: written.append(step))
    assert written == []


def test_a_damaged_bitmask_stops_the_way_back_by_layer_name(packed_dir, copied, rewrite, nothing_left):
    path = rewrite(copied(packed_dir), {f"{UP}.bitmask": lambda t: t ^ 2})
    (path / "export.json").unlink(missing_ok=True)
    with pytest.raises(FormatError, match=f"{UP}: the bitmask does not store two of four"):
        export_checkpoint(path, Dense(shard_bytes=20_000), nothing_left)


def test_a_bit_flipped_checkpoint_is_not_exported_as_if_it_were_whole(packed_dir, copied, nothing_left):
    path = copied(packed_dir)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-5] ^= 16
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match="is not what was exported: model.safetensors has other bytes"):
        export_checkpoint(path, Dense(), nothing_left)


def test_an_export_into_its_own_source_is_refused(run_dir, copied):
    path = copied(run_dir)
    before = sorted(path.rglob("*"))
    with pytest.raises(OutputError, match="is inside"):
        export_checkpoint(path, Sparse24(), path / "packed")
    assert sorted(path.rglob("*")) == before
    export_checkpoint(
        path, Sparse24(), path.parent / f"{path.name}-packed"
    )  # beside it, though alike in name


@pytest.mark.parametrize("source", ["nowhere", "empty"])
def test_a_source_that_is_no_checkpoint_is_refused(source, tmp_path, nothing_left):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="has no config.json"):
        export_checkpoint(tmp_path / source, Dense(), nothing_left)
    (tmp_path / "empty").rmdir()


@pytest.mark.parametrize("exporter", [Dense(), Sparse24()], ids=["dense", "sparse24"])
@pytest.mark.parametrize("missing", [1, 0])
def test_a_disk_one_byte_too_small_is_refused_before_anything_is_written(
    exporter, missing, run_dir, tmp_path, monkeypatch
):
    usage = namedtuple("usage", "free")
    needed, asked = exporter.size(Checkpoint.open(run_dir)), []

    def disk_usage(path):
        asked.append(Path(path))
        return usage(needed - missing)

    monkeypatch.setattr(writing.shutil, "disk_usage", disk_usage)
    out = tmp_path / "deep" / "out"
    if missing:
        with pytest.raises(OutputError, match="GiB free"):
            export_checkpoint(run_dir, exporter, out)
        assert list(tmp_path.iterdir()) == []
    else:
        export_checkpoint(run_dir, exporter, out)
        assert (out / "export.json").is_file()
    assert asked == [out.parent]  # the nearest directory that exists: it holds the lock


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(errno.ENOSPC, "disk full")])
def test_an_interrupted_export_leaves_nothing(error, run_dir, tmp_path):
    seen = []

    def progress(done, total):
        seen[:] = [p.name for p in tmp_path.rglob("*.safetensors")]
        if done == total - 1:
            raise error

    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        export_checkpoint(run_dir, Sparse24(shard_bytes=20_000), tmp_path / "out", progress=progress)
    assert len(seen) > 3  # shards were on disk when it stopped
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_an_empty_directory_empty(run_dir, tmp_path):
    def progress(done, total):
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(run_dir, Dense(), tmp_path / "out", progress=progress)
    assert list((tmp_path / "out").iterdir()) == [] and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("exporter", [Dense, Sparse24])
@pytest.mark.parametrize("size", [0, -1])
def test_shards_of_no_bytes_are_refused(exporter, size):
    with pytest.raises(RecipeError, match="shard_bytes"):
        exporter(shard_bytes=size)


def test_nothing_that_a_checkpoint_names_is_executed(run_dir, copied, edit_json, tmp_path):
    path = copied(run_dir)
    (path / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass C: pass\n")
    edit_json(
        path / "config.json",
        lambda data: data.update(auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C"}),
    )
    export_checkpoint(path, Sparse24(), tmp_path / "packed")
    export_checkpoint(tmp_path / "packed", Dense(), tmp_path / "dense")
    assert (tmp_path / "dense" / "own.py").is_file() and not (tmp_path / "executed").exists()
