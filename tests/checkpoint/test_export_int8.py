"""Exports with values in int8: what is stored, what changes and by how much, and what stays dense."""

import json

import pytest
import torch
from safetensors.torch import load_file

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import Dense, export_checkpoint
from msp_plugin.checkpoint.load import load
from msp_plugin.checkpoint.manifest import Manifest
from msp_plugin.checkpoint.packed_export import Bitmask
from msp_plugin.errors import FormatError, RecipeError
from msp_plugin.formats.bitmask_int8 import MOST_ERROR, dequantize, quantize
from msp_plugin.formats.bits import same_bits
from msp_plugin.plan.units import Layer
from msp_plugin.plugins.manager import Plugins

BLOCKS = [f"model.layers.{i}" for i in range(2)]
UP, DOWN = f"{BLOCKS[1]}.mlp.up_proj", f"{BLOCKS[0]}.mlp.down_proj"
INT8 = Bitmask(values="int8")


@pytest.fixture(scope="module")
def int8_dir(tmp_path_factory, run_dir):
    path = tmp_path_factory.mktemp("int8") / "model"
    export_checkpoint(run_dir, INT8, path)
    return path


def test_the_option_of_the_exporter_is_a_choice_of_two():
    plugins = Plugins(entry_points=False)
    assert plugins.build("exporters", {"name": "bitmask", "values": "int8"}) == INT8
    with pytest.raises(RecipeError, match="values"):
        plugins.build("exporters", {"name": "bitmask", "values": "int4"})


def test_every_layer_is_stored_in_int8_and_the_manifest_says_by_how_much_it_changed(run_dir, int8_dir):
    manifest, levels = Manifest.read(int8_dir), Checkpoint.open(run_dir).allocation.by_layer
    assert (
        set(manifest.packed) == set(levels) and not manifest.kept_dense
    )  # at level dense too: half the bytes
    dense, tensors, size = (
        load_file(run_dir / "model.safetensors"),
        load_file(int8_dir / "model.safetensors"),
        0,
    )
    for layer in manifest.packed:
        weight, (rows, columns) = dense[f"{layer}.weight"], tensors[f"{layer}.shape"].tolist()
        values, scale = quantize(weight)
        assert torch.equal(tensors[f"{layer}.compressed"], values[values != 0])
        assert same_bits(tensors[f"{layer}.scale"], scale)
        kept = levels[layer].kept(Layer(layer, rows, columns)) - manifest.rounded_to_zero.get(layer, 0)
        assert len(tensors[f"{layer}.compressed"]) == kept
        size += kept + rows * columns // 8 + 10 * rows
        change = (dequantize(values, scale).double() - weight.double()).norm() / weight.double().norm()
        assert manifest.quantization_errors[layer] == pytest.approx(float(change)) and 0 < change < MOST_ERROR
    assert manifest.packed_bytes == size and manifest.differences(int8_dir) == []
    assert all(same_bits(tensor, dense[name]) for name, tensor in tensors.items() if name in dense)


def test_at_2_8_the_packed_bytes_are_three_sixteenths_of_dense_ones_and_ten_a_row(make_run, tmp_path):
    run = make_run(tmp_path / "run", levels=("2:8",) * 8)
    manifest = export_checkpoint(run, INT8, tmp_path / "packed")
    rows = sum(Checkpoint.open(run).shape_of(layer)[0] for layer in manifest.packed)
    lost = sum(manifest.rounded_to_zero.values())
    assert manifest.packed_bytes == manifest.dense_bytes * 3 // 16 + 10 * rows - lost


def test_the_config_names_the_format(int8_dir):
    about = json.loads((int8_dir / "config.json").read_text())["quantization_config"]["sparsity_config"]
    assert about["format"] == "sparse-bitmask-int8"
    assert sorted(about["targets"]) == sorted(Manifest.read(int8_dir).packed)
    card = (int8_dir / "README.md").read_text(encoding="utf-8")
    assert "14 layers are stored in the format `sparse-bitmask-int8` of msp_plugin" in card


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dense_form_holds_value_times_scale_in_the_checkpoints_own_type(dtype, make_run, tmp_path):
    run = make_run(tmp_path / "run", dtype=dtype)
    manifest = export_checkpoint(run, INT8, tmp_path / "packed")
    export_checkpoint(tmp_path / "packed", Dense(), tmp_path / "dense")
    before, after = (load_file(path / "model.safetensors") for path in (run, tmp_path / "dense"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        layer = name.removesuffix(".weight")
        expected = dequantize(*quantize(weight)) if layer in manifest.packed else weight
        assert same_bits(after[name], expected)
    model = load(tmp_path / "packed")
    assert model.dtype == dtype
    assert same_bits(model.get_submodule(UP).weight.detach(), after[f"{UP}.weight"])


def test_a_model_loaded_in_float32_has_weights_that_were_not_rounded_before(run_dir, int8_dir):
    values, scale = quantize(load_file(run_dir / "model.safetensors")[f"{UP}.weight"])
    assert scale.dtype == torch.bfloat16
    weight = load(int8_dir, "float32").get_submodule(UP).weight.detach()
    assert same_bits(weight, values.float() * scale.float()[:, None])


def test_layers_that_do_not_fit_stay_dense_and_say_why(run_dir, copied, rewrite, tmp_path):
    changes = {
        f"{UP}.weight": lambda t: t.index_fill(1, torch.tensor([0]), 200),
        f"{DOWN}.weight": lambda t: torch.where(torch.arange(t.shape[1]) == 3, torch.nan, t),
    }
    path = rewrite(copied(run_dir), changes)
    (path / "allocation.json").unlink()  # its levels are not those of the changed layers
    manifest = export_checkpoint(path, INT8, tmp_path / "packed")
    assert set(manifest.kept_dense) == {UP, DOWN}
    assert manifest.kept_dense[UP].startswith("int8 makes too many weights zero (")
    assert manifest.kept_dense[DOWN] == "row 0 holds weights that are not finite"
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert torch.equal(stored[f"{UP}.weight"], load_file(path / "model.safetensors")[f"{UP}.weight"])


def test_kept_weights_that_round_to_zero_leave_the_bitmask_and_are_counted(
    run_dir, copied, rewrite, tmp_path
):
    def small(weight):
        row, kept = weight[7].clone(), weight[7].nonzero()[:2, 0]
        row[kept] = weight[7].abs().max() / 300
        return torch.cat([weight[:7], row[None], weight[8:]])

    path = rewrite(copied(run_dir), {f"{UP}.weight": small})
    before = int(torch.count_nonzero(load_file(path / "model.safetensors")[f"{UP}.weight"]))
    manifest = export_checkpoint(path, INT8, tmp_path / "packed")
    lost = manifest.rounded_to_zero[UP]
    assert lost >= 2 and manifest.tensors[f"{UP}.compressed"] == [before - lost]


def test_a_layer_of_zeros_comes_back(run_dir, copied, rewrite, tmp_path):
    path = rewrite(copied(run_dir), {f"{UP}.weight": torch.zeros_like})
    manifest = export_checkpoint(path, INT8, tmp_path / "packed")
    assert manifest.tensors[f"{UP}.compressed"] == [0] and manifest.quantization_errors[UP] == 0
    assert not Checkpoint.open(tmp_path / "packed").weight(UP).any()


def test_rounded_twice_it_says_how_far_it_is_from_the_first_weights(run_dir, int8_dir, tmp_path):
    export_checkpoint(int8_dir, Dense(), tmp_path / "dense")
    again = export_checkpoint(tmp_path / "dense", INT8, tmp_path / "again")
    first, dense = Manifest.read(int8_dir), Checkpoint.open(run_dir)
    for layer, error in again.quantization_errors.items():
        before, after = dense.weight(layer).double(), Checkpoint.open(tmp_path / "again").weight(layer)
        assert error == pytest.approx(float((after.double() - before).norm() / before.norm()), rel=0.05)
        assert error >= first.quantization_errors[layer] > 0
    assert all(again.rounded_to_zero[layer] >= lost for layer, lost in first.rounded_to_zero.items())


def test_it_is_not_packed_again(int8_dir, tmp_path):
    for exporter in (INT8, Bitmask()):
        with pytest.raises(FormatError, match="is packed already"):
            export_checkpoint(int8_dir, exporter, tmp_path / "again")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{UP}.scale": None}, f"there is no {UP}.scale"),
        ({f"{UP}.scale": lambda t: t[:-1]}, f"{UP} is not a packed weight"),
        ({f"{UP}.scale": lambda t: t.double()}, f"{UP} is not a packed weight"),
        ({f"{UP}.scale": lambda t: -t}, f"{UP}: it has a scale that is not above 0"),
        (
            {f"{UP}.scale": lambda t: t * torch.nan},
            f"{UP}: it has a scale that is not above 0, or not finite",
        ),
        ({f"{UP}.compressed": lambda t: t.bfloat16()}, f"{UP} is not a packed weight"),
        ({f"{UP}.compressed": lambda t: torch.full_like(t, -128)}, f"{UP}: it has values of 0 or below -127"),
        ({f"{UP}.compressed": torch.zeros_like}, f"{UP}: it has values of 0"),
        ({f"{UP}.bitmask": lambda t: t ^ 16}, f"{UP}: the bitmask keeps"),
    ],
)
def test_damaged_tensors_are_named(changes, words, int8_dir, copied, rewrite):
    path = copied(int8_dir)
    (path / "export.json").unlink()
    with pytest.raises(FormatError, match=words):
        load(rewrite(path, changes))


def test_a_changed_scale_is_found_by_the_checksum(int8_dir, copied, rewrite):
    path = rewrite(copied(int8_dir), {f"{UP}.scale": lambda t: 2 * t})
    with pytest.raises(FormatError, match=r"model\.safetensors has other bytes"):
        load(path)
