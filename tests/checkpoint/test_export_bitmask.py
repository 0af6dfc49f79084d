"""Exports in the bitmask format: every level at its own size, what stays dense and why, and what a reader refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import Dense, export_checkpoint
from msp_plugin.checkpoint.load import load
from msp_plugin.checkpoint.manifest import Manifest
from msp_plugin.checkpoint.packed_export import Bitmask, Sparse24
from msp_plugin.errors import FormatError
from msp_plugin.formats.bitmask import SUFFIXES, SparseBitmask
from msp_plugin.formats.bits import same_bits
from msp_plugin.plan.units import Layer

BLOCKS = [f"model.layers.{i}" for i in range(2)]
UP = f"{BLOCKS[1]}.mlp.up_proj"
QKV = [f"{BLOCKS[1]}.self_attn.{part}_proj" for part in "qkv"]


def dense_tensors(directory):
    return dict(Checkpoint.open(directory).dense_tensors())


def assert_equal(first, second):
    first, second = dense_tensors(first), dense_tensors(second)
    assert first.keys() == second.keys()
    assert all(same_bits(tensor, second[name]) for name, tensor in first.items())


def test_every_pruned_layer_is_packed_at_its_own_size_and_the_dense_ones_say_why(run_dir, packed_any_dir):
    manifest, levels = Manifest.read(packed_any_dir), Checkpoint.open(run_dir).allocation.by_layer
    assert manifest.packed == {layer: level.name for layer, level in levels.items() if not level.is_dense}
    assert set(manifest.kept_dense) == set(QKV)
    assert manifest.kept_dense[QKV[0]] == (
        "at level dense packing does not pay (9,232 bytes packed, 8,192 dense)"
    )
    tensors = load_file(packed_any_dir / "model.safetensors")
    for layer in manifest.packed:
        rows, columns = tensors[f"{layer}.shape"].tolist()
        kept = levels[layer].kept(Layer(layer, rows, columns))
        assert tensors[f"{layer}.compressed"].shape == (kept,)
        assert tensors[f"{layer}.bitmask"].shape == (rows, columns // 8)
        assert tensors[f"{layer}.row_offsets"].tolist() == list(range(0, kept, kept // rows))
    stored = [t.nbytes for n, t in tensors.items() if n.endswith(SUFFIXES[:3])]
    assert manifest.packed_bytes == sum(stored) and len(stored) == 33
    assert manifest.differences(packed_any_dir) == []


def test_all_other_tensors_are_untouched_and_all_come_back_bit_for_bit(run_dir, packed_any_dir):
    assert_equal(packed_any_dir, run_dir)
    dense, packed = (load_file(path / "model.safetensors") for path in (run_dir, packed_any_dir))
    assert {f"{layer}.weight" for layer in QKV} < set(packed)
    assert all(same_bits(tensor, dense[name]) for name, tensor in packed.items() if name in dense)


def test_the_config_names_the_layers_one_by_one(run_dir, packed_any_dir):
    dense, packed = (json.loads((p / "config.json").read_text()) for p in (run_dir, packed_any_dir))
    about = packed.pop("quantization_config")
    assert packed == dense
    targets, ignored = (about["sparsity_config"].pop(key) for key in ("targets", "ignore"))
    assert about == {
        "quant_method": "compressed-tensors",
        "version": "0.13.0",
        "sparsity_config": {
            "format": "sparse-bitmask",
            "sparsity_structure": "unstructured",
            "global_sparsity": 0.0,
            "registry_requires_subclass": False,
        },
    }
    assert sorted(targets) == sorted(Manifest.read(packed_any_dir).packed)
    assert set(ignored) == {*QKV, "lm_head", "model.embed_tokens"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_to_bitmask_to_dense_is_byte_identical(dtype, make_run, tmp_path):
    run = make_run(tmp_path / "run", dtype=dtype)
    export_checkpoint(run, Bitmask(shard_bytes=20_000), tmp_path / "packed")
    export_checkpoint(tmp_path / "packed", Dense(), tmp_path / "dense")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 4
    assert (tmp_path / "dense/model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_load_gives_the_dense_models_bits(dtype, run_dir, packed_any_dir, bits):
    expected = AutoModelForCausalLM.from_pretrained(run_dir, dtype=dtype)
    assert bits(load(packed_any_dir, dtype)) == bits(expected)


@pytest.mark.parametrize("levels", [("6:8", "1/2", "1/3", "1:16", "31/32", "5:8", "dense", "3:8 in 2:4")])
def test_any_level_comes_back(levels, make_run, tmp_path):
    run = make_run(tmp_path / "run", levels=levels)
    manifest = export_checkpoint(run, Bitmask(), tmp_path / "packed")
    assert set(manifest.packed.values()) == {*levels} - {"dense"}
    assert_equal(tmp_path / "packed", run)


def test_layers_that_inference_fuses_are_packed_each_by_itself(run_dir, copied, rewrite, tmp_path):
    path = copied(run_dir)
    (path / "allocation.json").unlink()
    rewrite(path, {f"{QKV[0]}.weight": lambda t: t.masked_fill(torch.arange(t.shape[1]) % 3 > 0, 0)})
    manifest = export_checkpoint(path, Bitmask(), tmp_path / "packed")
    assert QKV[0] in manifest.packed and set(manifest.packed.values()) == {"unstructured"}
    assert set(manifest.kept_dense) == {QKV[1], QKV[2]} and len(manifest.packed) == 12
    assert_equal(tmp_path / "packed", path)
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert manifest.packed_bytes == sum(t.nbytes for n, t in stored.items() if n.endswith(SUFFIXES[:3]))


def test_a_layer_of_zeros_and_one_that_holds_more_than_its_level_come_back(
    run_dir, copied, rewrite, tmp_path
):
    down = f"{BLOCKS[0]}.mlp.down_proj"
    changes = {f"{UP}.weight": torch.zeros_like, f"{down}.weight": lambda t: torch.where(t == 0, 1, t)}
    path = rewrite(copied(run_dir), changes)
    manifest = export_checkpoint(path, Bitmask(), tmp_path / "packed")
    assert manifest.tensors[f"{UP}.compressed"] == [0]
    assert manifest.tensors[f"{down}.compressed"] == [64 * 128]
    assert_equal(tmp_path / "packed", path)


def test_negative_zeros_become_positive_and_are_counted(run_dir, copied, rewrite, tmp_path):
    path = rewrite(copied(run_dir), {f"{UP}.weight": lambda t: torch.where(t == 0, -0.0, t)})
    manifest = export_checkpoint(path, Bitmask(), tmp_path / "packed")
    assert manifest.negative_zeros == {UP: 128 * 64 * 3 // 4}
    assert_equal(tmp_path / "packed", run_dir)


def test_a_model_without_a_layer_to_pack_is_refused(run_dir, copied, rewrite, tmp_path):
    path = copied(run_dir)
    (path / "allocation.json").unlink()
    rewrite(
        path, {n: torch.ones_like for n in load_file(path / "model.safetensors") if n.endswith("proj.weight")}
    )
    with pytest.raises(FormatError, match="has no layer that bitmask packs: packing does not pay") as error:
        export_checkpoint(path, Bitmask(), tmp_path / "packed")
    assert error.value.hint == "export it to dense"


def test_a_packed_checkpoint_is_not_packed_again(packed_dir, packed_any_dir, tmp_path):
    for source, exporter in ((packed_dir, Bitmask()), (packed_any_dir, Sparse24())):
        with pytest.raises(FormatError, match="is packed already"):
            export_checkpoint(source, exporter, tmp_path / "again")


def test_the_card_counts_the_dense_layers_by_level(packed_any_dir):
    card = (packed_any_dir / "README.md").read_text(encoding="utf-8")
    assert "11 layers are stored in the compressed-tensors format `sparse-bitmask`" in card
    assert "- 3 because at level dense packing does not pay\n" in card


# damage that no checksum covers


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{UP}.bitmask": lambda t: t ^ 16}, f"{UP}: the bitmask keeps"),
        ({f"{UP}.row_offsets": lambda t: t.flip(0)}, f"{UP}: row 0 starts at value"),
        ({f"{UP}.row_offsets": lambda t: t * 2**40}, f"{UP}: row 1 starts at value"),
        ({f"{UP}.row_offsets": lambda t: t.int()}, f"{UP} is not a packed weight"),
        ({f"{UP}.compressed": lambda t: t[:-1]}, f"{UP}: the bitmask keeps 2,048 weights, there are 2,047"),
        ({f"{UP}.shape": lambda t: t.flip(0)}, f"{UP}.shape says"),
        ({f"{UP}.shape": lambda t: t - torch.tensor([0, 1])}, f"{UP}: the bitmask keeps weights beyond its 63"),
        ({f"{UP}.shape": lambda t: t.double()}, f"{UP} is not a packed weight"),
        ({f"{UP}.row_offsets": None}, f"there is no {UP}.row_offsets"),
        ({f"{UP}.weight": torch.zeros(128, 64)}, f"{UP}.weight is there too"),
        ({f"{QKV[0]}.bitmask": torch.zeros(3)}, f"{QKV[0]} is stored packed, but config.json does not name it"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_named(changes, words, packed_any_dir, copied, rewrite):
    path = copied(packed_any_dir)
    (path / "export.json").unlink()
    with pytest.raises(FormatError, match=words):
        load(rewrite(path, changes))


def test_a_flipped_bit_of_a_value_is_found_by_the_checksum(packed_any_dir, copied, rewrite):
    path = rewrite(copied(packed_any_dir), {f"{UP}.compressed": lambda t: -t})
    with pytest.raises(FormatError, match=r"model\.safetensors has other bytes"):
        load(path)


def test_a_level_that_the_layout_does_not_shrink_is_never_larger_than_dense(run_dir):
    packing = Checkpoint.open(run_dir).packing_in(SparseBitmask())
    source = Checkpoint.open(run_dir)
    for layer in packing.packed:
        info = source.tensors[f"{layer}.weight"]
        kept = int(torch.count_nonzero(source.weight(layer)))
        assert sum(SparseBitmask().sizes(info.shape, info.dtype, kept).values()) < info.bytes
