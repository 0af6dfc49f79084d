"""A checkpoint's directory opened in either form, and every way in which it can contradict itself."""

import pytest
import torch
from safetensors.torch import load_file

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.packed_layers import packed_layers
from msp_plugin.errors import FormatError, ModelError, RecipeError, VerificationError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plan.allocation import Allocation

UP = "model.layers.1.mlp.up_proj"
O_PROJ = "model.layers.1.self_attn.o_proj"


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def config(**sparsity):
    return {"quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": sparsity}}


GOOD = {"format": "sparse-24-bitmask", "targets": ["a.b", "a.c"]}


# what is there


def test_a_dense_checkpoint_is_what_its_file_holds(run_dir):
    checkpoint, tensors = Checkpoint.open(run_dir), load_file(run_dir / "model.safetensors")
    assert (checkpoint.format, checkpoint.packed, checkpoint.quantization) == (None, (), None)
    assert dict(checkpoint.dense_names) == dict.fromkeys(checkpoint.tensors)
    assert set(checkpoint.dense_names) == set(tensors)
    for name, tensor in checkpoint.dense_tensors():
        assert tensor.dtype == tensors[name].dtype and raw(tensor) == raw(tensors[name])
    assert checkpoint.shape_of(UP) == (128, 64) and checkpoint.shape_of("model.layers.9.mlp.up_proj") is None
    assert raw(checkpoint.weight(UP)) == raw(tensors[f"{UP}.weight"])
    assert checkpoint.manifest is None


def test_a_packed_checkpoint_has_the_dense_ones_tensors_bit_for_bit(run_dir, packed_dir):
    packed, dense = Checkpoint.open(packed_dir), load_file(run_dir / "model.safetensors")
    assert (
        packed.format.name == "sparse-24-bitmask" and packed.quantization is None and len(packed.packed) == 9
    )
    assert set(packed.dense_names) == set(dense)
    assert {name for name, layer in packed.dense_names.items() if layer} == {
        f"{n}.weight" for n in packed.packed
    }
    assert {name: raw(tensor) for name, tensor in packed.dense_tensors()} == {
        n: raw(t) for n, t in dense.items()
    }
    assert f"{UP}.weight" not in packed.tensors and packed.shape_of(UP) == (128, 64)
    assert raw(packed.weight(UP)) == raw(packed.dense(f"{UP}.weight")) == raw(dense[f"{UP}.weight"])
    assert packed.allocation == Checkpoint.open(run_dir).allocation
    assert packed.manifest.format == "sparse24"


def test_the_allocation_beside_the_tensors_is_read_and_may_be_missing(run_dir, copied, llama):
    found = Checkpoint.open(run_dir).allocation
    assert found == Allocation.read(run_dir / "allocation.json") and found.table == prunable_layers(llama)
    path = copied(run_dir)
    (path / "allocation.json").unlink()
    assert Checkpoint.open(path).allocation is None


def test_a_quantized_checkpoint_is_opened_and_said_to_be_so(run_dir, copied, edit_json):
    path = copied(run_dir)
    said = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}
    edit_json(path / "config.json", lambda data: data.update(quantization_config=said))
    checkpoint = Checkpoint.open(path)
    assert (checkpoint.format, checkpoint.quantization) == (None, said)


# what is no checkpoint


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")]
)
def test_what_has_no_config_is_no_checkpoint(make, tmp_path):
    make(tmp_path / "m")
    with pytest.raises(ModelError, match="has no config.json"):
        Checkpoint.open(tmp_path / "m")


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff"])
def test_a_config_that_is_no_object_is_damage(content, run_dir, copied):
    path = copied(run_dir)
    (path / "config.json").write_bytes(content)
    with pytest.raises(FormatError, match="config.json"):
        Checkpoint.open(path)


# what config.json says of packing


def test_the_layers_are_those_that_the_config_names_in_its_order():
    assert packed_layers(config(**GOOD), "c").layers == ("a.b", "a.c")
    assert packed_layers(config(format="sparse-24-bitmask", targets=["a.c", "a.b"]), "c").layers == (
        "a.c",
        "a.b",
    )


@pytest.mark.parametrize(
    "found",
    [
        {}, {"quantization_config": None}, {"quantization_config": {}}, {"quantization_config": "fp8"},
        {"quantization_config": {"sparsity_config": None}}, {"quantization_config": {"sparsity_config": {}}},
        config(format="dense", targets=[]), config(format="dense"),
    ],
)  # fmt: skip
def test_a_config_without_a_sparse_format_names_no_layer(found):
    assert packed_layers(found, "c") is None


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (config(**{**GOOD, "targets": ["Linear"]}), "does not name layers one by one: ['Linear']"),
        (config(**{**GOOD, "targets": ["a.b", "Linear"]}), "does not name layers one by one"),
        (config(**{**GOOD, "targets": ["re:.*proj"]}), "does not name layers one by one"),
        (config(**{**GOOD, "targets": "a.b"}), "does not name layers one by one"),
        (config(**{**GOOD, "targets": [["a.b"]]}), "does not name layers one by one"),
        (config(**{**GOOD, "targets": [3]}), "does not name layers one by one"),
        (config(**{**GOOD, "targets": []}), "does not name layers one by one"),
        (config(format="sparse-24-bitmask"), "does not name layers one by one"),
        (config(**{**GOOD, "targets": ["a.b", "a.b"]}), "names a layer twice"),
        (config(**{**GOOD, "format": "sparse-other"}), "sparsity format 'sparse-other' is not read"),
        (config(**{**GOOD, "format": "dense"}), "sparsity format 'dense' is not read"),
        (config(**{**GOOD, "format": None}), "sparsity format None is not read"),
        (config(targets=["a.b"]), "sparsity format None is not read"),
        ({"quantization_config": {"sparsity_config": ["x"]}}, "sparsity_config is not a mapping"),
        ({"quantization_config": {"sparsity_config": GOOD, "config_groups": {"g": 1}}}, "quantized and packed at once"),
    ],
)  # fmt: skip
def test_a_sparse_format_that_we_do_not_read_is_refused_by_file(found, words):
    with pytest.raises(FormatError) as error:
        packed_layers(found, "here/config.json")
    assert error.value.message.startswith("here/config.json: ") and words in error.value.message


def test_class_names_in_targets_are_refused_before_a_tensor_is_touched(packed_dir, copied, edit_json):
    path = copied(packed_dir)
    edit_json(
        path / "config.json",
        lambda data: data["quantization_config"]["sparsity_config"].update(targets=["Linear"]),
    )
    with pytest.raises(FormatError, match="does not name layers one by one"):
        Checkpoint.open(path)


# config and tensors against each other


def targets(change):
    return lambda data: change(data["quantization_config"]["sparsity_config"]["targets"])


def test_a_config_that_names_a_layer_that_is_not_there_is_refused(packed_dir, copied, edit_json):
    path = copied(packed_dir)
    edit_json(path / "config.json", targets(lambda names: names.append("model.layers.7.mlp.up_proj")))
    with pytest.raises(
        FormatError, match="layers.7.mlp.up_proj is packed, but there is no .*7.mlp.up_proj.compressed"
    ):
        Checkpoint.open(path)


def test_a_config_that_names_a_dense_layer_is_refused(packed_dir, copied, edit_json):
    path = copied(packed_dir)
    edit_json(path / "config.json", targets(lambda names: names.append("model.layers.1.mlp.down_proj")))
    with pytest.raises(FormatError, match="down_proj is packed, but there is no"):
        Checkpoint.open(path)


def test_a_packed_layer_that_the_config_does_not_name_is_refused(packed_dir, copied, edit_json):
    path = copied(packed_dir)
    edit_json(path / "config.json", targets(lambda names: names.remove(UP)))
    with pytest.raises(FormatError, match=f"{UP} is stored packed, but config.json does not name it"):
        Checkpoint.open(path)


def test_packed_tensors_under_a_dense_config_are_refused(packed_dir, copied, edit_json):
    path = copied(packed_dir)
    edit_json(path / "config.json", lambda data: data.pop("quantization_config") and None)
    with pytest.raises(FormatError, match="is stored packed, but config.json does not name it"):
        Checkpoint.open(path)


@pytest.mark.parametrize("suffix", ["compressed", "bitmask", "shape"])
def test_a_lost_part_of_a_packed_layer_is_named(suffix, packed_dir, copied, rewrite):
    path = rewrite(copied(packed_dir), {f"{UP}.{suffix}": None})
    with pytest.raises(FormatError, match=f"{UP} is packed, but there is no {UP}.{suffix}"):
        Checkpoint.open(path)


def test_a_layer_both_packed_and_dense_is_refused(packed_dir, copied, rewrite):
    path = rewrite(copied(packed_dir), {f"{UP}.weight": torch.zeros(128, 64)})
    with pytest.raises(FormatError, match=f"{UP}.weight is there too"):
        Checkpoint.open(path)


def test_values_that_are_no_matrix_are_refused(packed_dir, copied, rewrite):
    path = rewrite(copied(packed_dir), {f"{UP}.compressed": lambda t: t.reshape(-1)})
    with pytest.raises(FormatError, match=f"{UP} is not a packed weight: compressed torch.bfloat16 .4096."):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    "shape",
    [
        [[128], [128]], [[64], [128]], [[128]], [[128], [64], [1]], [[-128], [-64]], [[2**62], [64]],
        [[128], [2**63 - 1]], [[0], [0]], [],
    ],
)  # fmt: skip
def test_a_shape_tensor_that_disagrees_with_the_values_is_named(shape, packed_dir, copied, rewrite):
    path = rewrite(copied(packed_dir), {f"{UP}.shape": torch.tensor(shape, dtype=torch.int64)})
    with pytest.raises(
        FormatError, match=f"{UP}.shape says|{UP} is not a packed weight: .* shape torch.int64"
    ):
        Checkpoint.open(path).weight(UP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.uint8, torch.bool])
def test_a_shape_tensor_of_another_type_is_refused(dtype, packed_dir, copied, rewrite):
    path = rewrite(copied(packed_dir), {f"{UP}.shape": lambda t: t.to(dtype)})
    with pytest.raises(FormatError, match=f"{UP} is not a packed weight: .* shape {dtype}"):
        Checkpoint.open(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.float64])
def test_values_without_a_scale_of_a_type_that_needs_one_are_refused(dtype, packed_dir, copied, rewrite):
    path = rewrite(copied(packed_dir), {f"{UP}.compressed": lambda t: t.to(dtype)})
    with pytest.raises(FormatError, match=f"{UP} is not a packed weight: compressed {dtype}"):
        Checkpoint.open(path)


@pytest.mark.parametrize(("key", "value"), [("architectures", 5), ("architectures", {"a": 1}), ("architectures", [1]),
                                            ("max_position_embeddings", "many"), ("max_position_embeddings", 0)])  # fmt: skip
def test_a_config_with_values_of_other_types_is_refused(key, value, run_dir, copied, edit_json):
    path = copied(run_dir)
    edit_json(path / "config.json", lambda config: config.update({key: value}))
    with pytest.raises(FormatError, match=f"{key} is"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("bitmask", lambda t: t ^ 1),
        ("bitmask", lambda t: t[:, :-1].contiguous()),
        ("bitmask", lambda t: t.to(torch.int32)),
        ("compressed", lambda t: t.to(torch.float64)),
    ],
)
def test_a_packed_layer_that_disagrees_with_itself_is_named(suffix, change, packed_dir, copied, rewrite):
    path = rewrite(copied(packed_dir), {f"{UP}.{suffix}": change})
    with pytest.raises(FormatError, match=UP):
        Checkpoint.open(path).weight(UP)


def test_values_of_another_width_disagree_with_the_shape(packed_dir, copied, rewrite):
    path = rewrite(copied(packed_dir), {f"{UP}.compressed": lambda t: t[:, :-2].contiguous()})
    (path / "allocation.json").unlink()
    with pytest.raises(
        FormatError, match=rf"{UP}.shape says \[128, 64\], its values are those of a weight \[128, 60\]"
    ):
        Checkpoint.open(path).weight(UP)


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("compressed", lambda t: t[None]),
        ("compressed", lambda t: t[:0]),
        ("compressed", lambda t: t[:, :0]),
        ("compressed", lambda t: t[:, :-1].contiguous()),
        ("compressed", lambda t: t[:-1].contiguous()),
        ("bitmask", lambda t: t[:, :-1].contiguous()),
        ("bitmask", lambda t: t[:-1].contiguous()),
        ("bitmask", lambda t: t.reshape(-1)),
        ("bitmask", lambda t: t.view(torch.int8)),
        ("shape", lambda t: t[:1]),
        ("shape", lambda t: torch.cat([t, t])),
    ],
)
def test_packed_tensors_whose_headers_cannot_be_a_weights_are_refused_at_once(
    suffix, change, packed_dir, copied, rewrite
):
    path = rewrite(copied(packed_dir), {f"{UP}.{suffix}": change})
    with pytest.raises(
        FormatError, match=f"{UP} is not a packed weight: compressed torch.* bitmask torch.* shape"
    ):
        Checkpoint.open(path)


def test_a_flat_shape_tensor_is_read_too(packed_dir, copied, rewrite):
    path = rewrite(copied(packed_dir), {f"{UP}.shape": lambda t: t.reshape(-1)})
    assert raw(Checkpoint.open(path).weight(UP)) == raw(Checkpoint.open(packed_dir).weight(UP))


@pytest.mark.parametrize("suffix", ["compressed", "bitmask"])
def test_half_a_packed_layer_that_the_config_does_not_name_is_refused(suffix, run_dir, copied, rewrite):
    path = rewrite(copied(run_dir), {f"{UP}.{suffix}": torch.zeros(128, 8, dtype=torch.uint8)})
    with pytest.raises(FormatError, match=f"{UP} is stored packed, but config.json does not name it"):
        Checkpoint.open(path)


# the files against the export


def test_files_are_held_against_the_checksums_where_there_are_any(run_dir, packed_dir, copied, rewrite):
    Checkpoint.open(run_dir).check_files()
    Checkpoint.open(packed_dir).check_files()
    path = rewrite(copied(packed_dir), {"model.norm.weight": lambda t: t + 1})
    with pytest.raises(FormatError, match=r"is not what was exported: model\.safetensors has other bytes"):
        Checkpoint.open(path).check_files()


def test_a_tensor_that_the_export_wrote_and_is_gone_is_named_first(packed_dir, copied, rewrite):
    path = rewrite(copied(packed_dir), {"model.norm.weight": None})
    with pytest.raises(FormatError, match="is not what was exported: there is no tensor model.norm.weight"):
        Checkpoint.open(path).check_files()


@pytest.mark.parametrize("file", ["allocation.json", "run.json"])
def test_an_exchanged_record_is_found_by_its_checksum(file, packed_dir, copied, edit_json):
    path = copied(packed_dir)
    edit_json(path / file, lambda data: data.update(further="key"))
    with pytest.raises(FormatError, match=f"is not what was exported: {file}"):
        Checkpoint.open(path).check_files()


# the allocation against the tensors


def test_the_allocation_of_a_quantized_model_is_not_held_against_its_shapes(
    run_dir, copied, rewrite, edit_json
):
    path = rewrite(
        copied(run_dir), {f"{UP}.weight": None, f"{UP}.weight_packed": torch.zeros(2, dtype=torch.int32)}
    )
    with pytest.raises(VerificationError, match="is for another model"):
        _ = Checkpoint.open(path).allocation
    edit_json(path / "config.json", lambda data: data.update(quantization_config={"quant_method": "fp8"}))
    assert Checkpoint.open(path).allocation == Checkpoint.open(run_dir).allocation


def test_an_allocation_of_another_model_is_refused_with_its_layers(run_dir, packed_dir, copied, edit_json):
    for i, source in enumerate((run_dir, packed_dir)):
        path = copied(source, f"copy{i}")

        def other(data):
            layer = data["units"][-1]["layers"][0]
            assert layer["name"] == "model.layers.1.mlp.down_proj"
            layer["name"] = "model.layers.2.mlp.down_proj"

        edit_json(path / "allocation.json", other)
        with pytest.raises(VerificationError, match="1 of its 14 layers are not in this one") as error:
            _ = Checkpoint.open(path).allocation
        assert "model.layers.2.mlp.down_proj [64, 128], found None" in error.value.message


def test_an_allocation_of_other_shapes_is_refused(run_dir, copied, make_run, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    wider = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    )  # fmt: skip
    other = make_run(tmp_path / "other", wider)
    path = copied(run_dir)
    (path / "allocation.json").write_bytes((other / "allocation.json").read_bytes())
    with pytest.raises(VerificationError, match=r"6 of its 14 layers .* \[192, 64\], found \(128, 64\)"):
        _ = Checkpoint.open(path).allocation


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(version=2), "has version 2, this package reads 1"),
        (lambda data: data.update(schema="other"), "is not an allocation file"),
        (lambda data: data["units"].clear(), "no units"),
        (lambda data: data["budget"].update(kept=3), "its budget says 3"),
        (lambda data: [], "is not an allocation file"),
    ],
)
def test_an_allocation_that_is_newer_or_damaged_is_refused(change, words, run_dir, copied, edit_json):
    path = copied(run_dir)
    edit_json(path / "allocation.json", change)
    with pytest.raises(RecipeError, match=words):
        _ = Checkpoint.open(path).allocation
