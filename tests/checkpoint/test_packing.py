"""Which layers are packed, why the others are not, and the config that says so."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.packed_layers import packed_layers
from msp_plugin.checkpoint.packing import other_matrices, pack_layer
from msp_plugin.errors import FormatError, VerificationError
from msp_plugin.formats.sparse24 import Sparse24Bitmask

SPARSE24 = Sparse24Bitmask()

BLOCKS = [f"model.layers.{i}" for i in range(2)]
QKV = [f"self_attn.{part}_proj" for part in "qkv"]
SERVABLE = {
    **{f"{BLOCKS[0]}.{name}": "2:4" for name in QKV},
    f"{BLOCKS[0]}.mlp.gate_proj": "2:8", f"{BLOCKS[0]}.mlp.up_proj": "2:8", f"{BLOCKS[0]}.mlp.down_proj": "1:8",
    f"{BLOCKS[1]}.self_attn.o_proj": "2:4",
    f"{BLOCKS[1]}.mlp.gate_proj": "2:8", f"{BLOCKS[1]}.mlp.up_proj": "2:8",
}  # fmt: skip
OTHERS = {
    f"{BLOCKS[0]}.self_attn.o_proj": "3:8",
    **{f"{BLOCKS[1]}.{name}": "dense" for name in QKV},
    f"{BLOCKS[1]}.mlp.down_proj": "3:8",
}


def config_of(source):
    packing = source.packing_in(SPARSE24)
    return SPARSE24.config(list(packing.packed), other_matrices(source.tensors, packing))


def unpack(tensors):
    return SPARSE24.unpack(tensors, "layer")


def small(**sizes):
    torch.manual_seed(4)
    given = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15, **sizes,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**given))


def test_layers_at_servable_levels_are_packed_and_the_others_say_their_level(run_dir):
    choice = Checkpoint.open(run_dir).packing_in(SPARSE24)
    assert choice.packed == SERVABLE
    assert choice.dense == {
        layer: f"level {level} does not run on 2:4 kernels" for layer, level in OTHERS.items()
    }


def test_every_layer_of_the_allocation_is_either_packed_or_has_a_reason(run_dir):
    source = Checkpoint.open(run_dir)
    choice = source.packing_in(SPARSE24)
    assert sorted([*choice.packed, *choice.dense]) == sorted(source.allocation.by_layer)


def test_without_an_allocation_the_weights_themselves_decide(run_dir, copied):
    path = copied(run_dir)
    (path / "allocation.json").unlink()
    choice = Checkpoint.open(path).packing_in(SPARSE24)
    assert choice.packed == dict.fromkeys(SERVABLE, "2:4")
    assert choice.dense == dict.fromkeys(OTHERS, "its weights are not 2:4")


def test_without_an_allocation_one_group_of_three_makes_a_layer_and_its_siblings_dense(
    run_dir, copied, rewrite
):
    path = copied(run_dir)
    (path / "allocation.json").unlink()

    def fill(weight):
        weight[-1, -4:] = 1
        return weight

    rewrite(path, {f"{BLOCKS[0]}.self_attn.k_proj.weight": fill})
    choice = Checkpoint.open(path).packing_in(SPARSE24)
    assert choice.dense[f"{BLOCKS[0]}.self_attn.k_proj"] == "its weights are not 2:4"
    assert set(SERVABLE) - set(choice.packed) == {f"{BLOCKS[0]}.{name}" for name in QKV}


def test_embeddings_head_and_norms_are_never_packed(llama, make_run, tmp_path):
    with torch.no_grad():
        llama.model.embed_tokens.weight[:, ::2] = 0
        llama.lm_head.weight[:, ::2] = 0
    path = make_run(tmp_path / "run", llama)
    (path / "allocation.json").unlink()
    choice = Checkpoint.open(path).packing_in(SPARSE24)
    assert set(choice.packed) == set(SERVABLE) and set(choice.dense) == set(OTHERS)


@pytest.mark.parametrize("left_out", ["v_proj", "q_proj", "k_proj"])
def test_one_ignored_layer_keeps_those_dense_that_inference_fuses_with_it(left_out, make_run, tmp_path):
    path = make_run(tmp_path / "run", ignore=[f"layers.0.self_attn.{left_out}"])
    choice = Checkpoint.open(path).packing_in(SPARSE24)
    other = f"{BLOCKS[0]}.self_attn.{left_out}"
    assert other not in choice.packed and other not in choice.dense
    for name in QKV:
        if not name.endswith(left_out):
            assert choice.dense[f"{BLOCKS[0]}.{name}"] == (
                f"inference fuses it with {other}, which stays dense: it was not pruned"
            )
    assert set(SERVABLE) - set(choice.packed) == {f"{BLOCKS[0]}.{name}" for name in QKV}


def test_a_sibling_that_stays_dense_hands_its_reason_on(run_dir, copied, edit_json):
    path = copied(run_dir)

    def split(data):  # gate at 3:8, up at 2:8: no search gives that, a hand may
        unit = data["units"][2]
        gate, up = unit["layers"]
        assert (gate["name"], up["name"]) == (f"{BLOCKS[0]}.mlp.gate_proj", f"{BLOCKS[0]}.mlp.up_proj")
        data["units"][2] = {**unit, "name": gate["name"], "layers": [gate], "level": "3:8", "weights": 8192}
        data["units"].append({**unit, "name": up["name"], "layers": [up], "weights": 8192})
        data["budget"]["kept"] += 1024

    edit_json(path / "allocation.json", split)
    choice = Checkpoint.open(path).packing_in(SPARSE24)
    assert choice.dense[f"{BLOCKS[0]}.mlp.gate_proj"] == "level 3:8 does not run on 2:4 kernels"
    assert choice.dense[f"{BLOCKS[0]}.mlp.up_proj"] == (
        f"inference fuses it with {BLOCKS[0]}.mlp.gate_proj, which stays dense: "
        "level 3:8 does not run on 2:4 kernels"
    )
    assert set(choice.packed) == set(SERVABLE) - {f"{BLOCKS[0]}.mlp.gate_proj", f"{BLOCKS[0]}.mlp.up_proj"}


def test_shapes_that_the_kernels_have_no_tiles_for_stay_dense(make_run, tmp_path):
    path = make_run(tmp_path / "run", small(hidden_size=48), levels=["2:4"] * 8)
    choice = Checkpoint.open(path).packing_in(SPARSE24)
    assert choice.packed == {f"{block}.mlp.down_proj": "2:4" for block in BLOCKS}  # [48, 128]
    assert choice.dense[f"{BLOCKS[0]}.mlp.up_proj"] == "shape [128, 48] is not a multiple of [16, 32]"
    assert len(choice.dense) == 12


def test_one_narrow_sibling_keeps_the_fused_ones_dense(make_run, tmp_path):
    model = small(num_attention_heads=8, num_key_value_heads=1)
    path = make_run(tmp_path / "run", model, levels=["2:4"] * 8)
    choice = Checkpoint.open(path).packing_in(SPARSE24)
    why = "shape [8, 64] is not a multiple of [16, 32]"
    k, v, q = (f"{BLOCKS[0]}.self_attn.{part}_proj" for part in "kvq")
    assert choice.dense[k] == choice.dense[v] == why
    assert choice.dense[q] in [f"inference fuses it with {name}, which stays dense: {why}" for name in (k, v)]
    assert f"{BLOCKS[0]}.self_attn.o_proj" in choice.packed


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_dtypes_that_are_not_served_stay_dense(dtype, run_dir, copied, rewrite):
    name = f"{BLOCKS[0]}.mlp.down_proj"
    path = rewrite(copied(run_dir), {f"{name}.weight": lambda t: t.to(dtype)})
    choice = Checkpoint.open(path).packing_in(SPARSE24)
    assert choice.dense[name] == f"dtype {dtype} is not served" and len(choice.packed) == 8


def test_experts_stay_dense_and_the_rest_of_their_block_does_not(tmp_path):
    weight = torch.tensor([1.0, 0, 0, 2]).repeat(32, 16)
    names = [
        f"{BLOCKS[0]}.{name}"
        for name in ("mlp.experts.0.up_proj", "mlp.experts.11.down_proj", "self_attn.o_proj")
    ]
    save_file({f"{name}.weight": weight.clone() for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    choice = Checkpoint.open(tmp_path).packing_in(SPARSE24)
    assert choice.dense == dict.fromkeys(names[:2], "experts are served dense")
    assert choice.packed == {names[2]: "2:4"}


def test_the_sorting_is_done_once_and_kept(run_dir):
    source = Checkpoint.open(run_dir)
    assert source.packing_in(SPARSE24) is source.packing_in(SPARSE24)


def test_a_layer_is_packed_exactly_where_it_can_be_and_without_signs_of_zeros_where_not():
    fits = torch.tensor([[1.0, -0.0, 0, 0], [-0.0, -0.0, 0, 0]])
    packed, count = pack_layer(SPARSE24, fits, "layer")
    assert count == 0 and torch.equal(unpack(packed).signbit(), fits.signbit())
    packed, count = pack_layer(SPARSE24, torch.tensor([[1.0, -0.0, -3.0, 0], [-0.0, -0.0, 0, 0]]), "layer")
    assert count == 3 and unpack(packed).tolist() == [[1.0, 0, -3.0, 0], [0, 0, 0, 0]]
    assert int(unpack(packed).signbit().sum()) == 1
    with pytest.raises(FormatError, match="layer is not 2:4"):
        pack_layer(SPARSE24, torch.tensor([[1.0, -0.0, -3.0, 2.0]]), "layer")


def test_an_allocation_of_another_model_decides_nothing(run_dir, copied, edit_json):
    path = copied(run_dir)
    edit_json(path / "allocation.json", lambda data: data["units"][1]["layers"][0].update(name="model.other"))
    with pytest.raises(VerificationError, match="is for another model"):
        _ = Checkpoint.open(path).packing_in(SPARSE24)


# the config


def test_the_config_has_exactly_the_keys_that_compressed_tensors_0_13_wants(run_dir):
    source = Checkpoint.open(run_dir)
    assert config_of(source) == {
        "quant_method": "compressed-tensors",
        "version": "0.13.0",
        "sparsity_config": {
            "format": "sparse-24-bitmask",
            "sparsity_structure": "2:4",
            "global_sparsity": 0.5,
            "registry_requires_subclass": False,
            "targets": list(SERVABLE),
            "ignore": [name.removesuffix(".weight") for name in source.tensors if name.removesuffix(".weight") in
                       {*OTHERS, "lm_head", "model.embed_tokens"}],
        },
    }  # fmt: skip


def test_targets_and_ignore_share_no_layer_and_miss_no_matrix(run_dir):
    source = Checkpoint.open(run_dir)
    found = config_of(source)["sparsity_config"]
    assert not set(found["targets"]) & set(found["ignore"])
    matrices = {n.removesuffix(".weight") for n, info in source.tensors.items() if len(info.shape) == 2}
    assert {*found["targets"], *found["ignore"]} == matrices


def test_the_written_config_is_the_sources_with_that_and_is_read_back(run_dir, packed_dir):
    dense, packed = (json.loads((p / "config.json").read_text()) for p in (run_dir, packed_dir))
    source = Checkpoint.open(run_dir)
    assert packed == {**dense, "quantization_config": config_of(source)}
    assert packed_layers(packed, "c").layers == tuple(SERVABLE)


def test_levels_inside_2_4_are_packed_and_shares_of_zeros_are_not(make_run, tmp_path):
    levels = ("3:8 in 2:4", "7/10", "2:4", "5:16 in 2:4", "1/2", "dense", "3:8 in 2:4", "9/10")
    path = make_run(tmp_path / "run", levels=levels)
    choice = Checkpoint.open(path).packing_in(SPARSE24)
    by_unit = {
        "self_attn.qkv": ("3:8 in 2:4", None), "self_attn.o": (None, None), "mlp.gate_up": ("2:4", "3:8 in 2:4"),
        "mlp.down": ("5:16 in 2:4", None),
    }  # fmt: skip
    expected = {}
    for unit, found in by_unit.items():
        parent, _, leaf = unit.partition(".")
        parts = {"qkv": "qkv", "gate_up": ("gate", "up")}.get(leaf, (leaf,))
        for b, level in enumerate(found):
            expected |= {f"{BLOCKS[b]}.{parent}.{part}_proj": level for part in parts if level}
    assert choice.packed == expected
    assert choice.dense[f"{BLOCKS[1]}.mlp.down_proj"] == "level 9/10 does not run on 2:4 kernels"
    for layer in choice.packed:
        weight = Checkpoint.open(path).weight(layer)
        packed, _ = pack_layer(SPARSE24, weight, layer)
        assert torch.equal(unpack(packed), weight)
