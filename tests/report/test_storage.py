"""The bytes that a report says are those that the export writes."""

import pytest
import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import export_checkpoint
from msp_plugin.checkpoint.manifest import Manifest
from msp_plugin.checkpoint.packed_export import Bitmask, Sparse24
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plugins.manager import Plugins
from msp_plugin.report import write_report
from msp_plugin.report.storage import storage, storages

#: Beside values and bitmask a packed layer stores its shape: two int64.
SHAPE_BYTES = 16


def of(path, exporter=Sparse24):
    checkpoint = Checkpoint.open(path)
    return storage(Allocation.read(path / "allocation.json"), None, checkpoint, exporter.format)


def written(path):
    return sum(info.bytes for info in Checkpoint.open(path).tensors.values())


@pytest.mark.parametrize("exporter", [Sparse24, Bitmask])
@pytest.mark.parametrize(
    ("dtype", "ignore"),
    [(torch.bfloat16, ()), (torch.float32, ()), (torch.bfloat16, ("layers.0.self_attn.v_proj", "down_proj"))],
)
def test_bytes_are_those_of_the_files_that_an_export_writes(exporter, dtype, ignore, make_run, tmp_path):
    levels = ("2:4", "3:8", "2:8", "1:8", "dense", "2:4", "2:8", "3:8")
    levels = levels[:3] + levels[4:7] if ignore else levels
    run = make_run(tmp_path / "run", dtype=dtype, ignore=ignore, levels=levels)
    export_checkpoint(run, exporter(), tmp_path / "packed")
    manifest, found = Manifest.read(tmp_path / "packed"), of(run, exporter)
    assert found.packed.layers == len(manifest.packed) > 0
    assert found.packed.dense == manifest.dense_bytes
    assert found.packed.stored == manifest.packed_bytes + SHAPE_BYTES * len(manifest.packed)
    assert found.whole.dense == written(run) and found.whole.stored == written(tmp_path / "packed")
    assert sum(part.layers for part in found.dense) == len(manifest.kept_dense)
    assert found.dtype == str(dtype).removeprefix("torch.") and not found.assumed
    assert of(tmp_path / "packed", exporter) == found


def test_the_checkpoints_own_format_comes_first(run_dir, packed_dir, packed_any_dir):
    for path, names in (
        (run_dir, ["sparse-24-bitmask", "sparse-bitmask"]),
        (packed_dir, ["sparse-24-bitmask", "sparse-bitmask"]),
        (packed_any_dir, ["sparse-bitmask", "sparse-24-bitmask"]),
    ):
        checkpoint = Checkpoint.open(path)
        found = storages(Allocation.read(path / "allocation.json"), None, checkpoint)
        assert [each.format.name for each in found] == names
        assert {each.total.dense for each in found} == {of(run_dir).total.dense}


def test_a_checkpoint_with_values_in_int8_is_counted_in_its_format(run_dir, tmp_path):
    manifest = export_checkpoint(run_dir, Bitmask(values="int8"), tmp_path / "int8")
    own, *others = storages(
        Allocation.read(run_dir / "allocation.json"), None, Checkpoint.open(tmp_path / "int8")
    )
    lost = sum(manifest.rounded_to_zero.values())
    assert own.format.name == "sparse-bitmask-int8" and own.dtype == "bfloat16"
    assert own.packed.stored == manifest.packed_bytes + SHAPE_BYTES * len(manifest.packed) + lost
    assert [other.total.dense for other in others] == [own.total.dense] * 2


def test_without_a_checkpoint_the_allocation_gives_the_same_bytes_of_the_layers(run_dir):
    allocation, whole = Allocation.read(run_dir / "allocation.json"), of(run_dir)
    for said, dtype, assumed in (
        ("bfloat16", "bfloat16", False),
        ("auto", "bfloat16", True),
        (None, "bfloat16", True),
    ):
        found = storage(allocation, said)
        assert (found.packed, found.dense, found.total) == (whole.packed, whole.dense, whole.total)
        assert (found.dtype, found.assumed, found.whole) == (dtype, assumed, None)
    assert storage(allocation, "float32").total.dense == 2 * whole.total.dense


def test_the_report_shows_them(run_dir, packed_dir, page, tmp_path):
    found, rows = of(run_dir), []
    for source in (run_dir, packed_dir):
        write_report(source, tmp_path / "r.html", plugins=Plugins(entry_points=False))
        drawn = page(tmp_path / "r.html")
        rows.append(drawn.row("packed for 2:4 kernels"))
        assert drawn.row("whole checkpoint")[4] == f"{written(packed_dir):,}"
        assert drawn.row("dense: level 3:8 does not run on 2:4 kernels")[1] == "2"
        any_level = of(run_dir, Bitmask).packed
        assert drawn.row("packed as sparse-bitmask")[1:5] == [
            "11", f"{any_level.weights:,}", f"{any_level.dense:,}", f"{any_level.stored:,}",
        ]  # fmt: skip
    assert rows[0] == rows[1]
    assert rows[0][1:5] == [
        "9",
        f"{found.packed.weights:,}",
        f"{found.packed.dense:,}",
        f"{found.packed.stored:,}",
    ]


def test_a_quantized_checkpoint_is_left_aside_and_said(run_dir, copied, edit_json, page):
    path = copied(run_dir)
    edit_json(path / "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    found = of(path)
    assert found.quantized and found.whole is None and found.packed == of(run_dir).packed
    drawn = page(write_report(path, plugins=Plugins(entry_points=False)))
    assert "these are the bytes before quantization" in drawn.text
