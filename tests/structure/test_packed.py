"""Smaller models whose remaining weights are packed: 2:4 inside a width survives the cut, and every step that follows."""

import json

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import msp_plugin
from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import Dense, export_checkpoint
from msp_plugin.checkpoint.packed_export import Bitmask, Sparse24
from msp_plugin.checkpoint.smaller import Small, Uniform
from msp_plugin.errors import FormatError
from msp_plugin.plan.levels import Level
from msp_plugin.pruning.masks import nm_mask
from msp_plugin.serving.cpu import build
from msp_plugin.serving.cpu.linear import PackedLinear

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "head_dim": 16,
}
#: Of 128 channels every other one stays; of these the eleventh puts nothing out, though it has a place in each mask.
KEPT, DEAD = torch.arange(0, 128, 2), 20
no_kernels = pytest.mark.skipif(build.load_operator() is not None, reason="no kernels here")


def masked(weight):
    return weight.masked_fill(~nm_mask(weight.abs(), Level.parse("2:4")), 0)


@torch.no_grad()
def pruned(drop=False):
    """Return a model of ``1/2 wide 2:4`` MLPs and attentions; with ``drop`` its second attention is dropped."""
    torch.manual_seed(0)
    config = MistralConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=None, initializer_range=0.2,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = MistralForCausalLM(config).float().eval()
    for block in model.model.layers:
        heads = torch.arange(32)  # of the first KV head
        for layer, rows in (("q", heads), ("k", heads[:16]), ("v", heads[:16]), ("gate", KEPT), ("up", KEPT)):
            weight = block.get_submodule(f"{'mlp' if len(layer) > 1 else 'self_attn'}.{layer}_proj").weight
            gone = torch.ones(len(weight), dtype=torch.bool)
            gone[rows] = False
            weight[gone] = 0
            weight[rows] = masked(weight[rows])
        block.mlp.down_proj.weight[:, DEAD] = 0
        for layer, columns in ((block.self_attn.o_proj, heads), (block.mlp.down_proj, KEPT)):
            part = masked(layer.weight[:, columns])
            layer.weight.zero_()
            layer.weight[:, columns] = part
    if drop:
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    return model


@pytest.fixture(scope="module", params=["small", "uniform"])
def smaller(request, tmp_path_factory):
    """Return the directories of a model with zeros and of its smaller form."""
    path = tmp_path_factory.mktemp(request.param)
    pruned(drop=request.param == "small").save_pretrained(path / "zeros")
    export_checkpoint(path / "zeros", Small() if request.param == "small" else Uniform(), path / "smaller")
    return path / "zeros", path / "smaller"


@pytest.fixture(scope="module", params=[Sparse24(), Bitmask()], ids=lambda packer: packer.name)
def packed(request, smaller, tmp_path_factory):
    """Return (model with zeros, its smaller form, that one packed)."""
    path = tmp_path_factory.mktemp("packed") / "packed"
    export_checkpoint(smaller[1], request.param, path)
    return *smaller, path


def tokens(model):
    ids = torch.tensor([[3, 14, 15, 92], [6, 5, 3, 5]])
    return model.generate(ids, max_new_tokens=12, do_sample=False).tolist()


def test_every_linear_that_is_left_is_packed(packed):
    found = Checkpoint.open(packed[2])
    linears = [name for name, module in msp_plugin.load(packed[1]).named_modules() if "_proj" in name]
    assert sorted(found.packed) == sorted(linears) and not found.manifest.kept_dense
    assert found.shape_of("model.layers.0.mlp.down_proj") == (64, 64)


def test_it_loads_dense_and_packed_and_gives_the_same_tokens(packed):
    zeros, small, path = packed
    expected = tokens(msp_plugin.load(zeros))
    dense, other = msp_plugin.load(small).state_dict(), msp_plugin.load(path)
    assert all(torch.equal(dense[name], weight) for name, weight in other.state_dict().items())
    assert tokens(other) == expected


@no_kernels
def test_it_is_multiplied_packed(packed):
    model = msp_plugin.load(packed[2], packed=True)
    kernels = {module.kernel for module in model.modules() if isinstance(module, PackedLinear)}
    assert kernels and "dense" not in kernels
    assert tokens(model) == tokens(msp_plugin.load(packed[0]))


def test_it_comes_back_dense_byte_for_byte(packed, tmp_path):
    _, small, path = packed
    export_checkpoint(path, Dense(), tmp_path / "back")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (small / name).read_bytes()
    card = (tmp_path / "back" / "README.md").read_text()
    assert ("msp_plugin.load" in card) == (
        "per_layer_config" in json.loads((small / "config.json").read_text())
    )
    assert Checkpoint.open(tmp_path / "back").manifest.structure == Checkpoint.open(small).manifest.structure


@pytest.mark.parametrize("reference", [0, 1], ids=["zeros", "smaller"])
def test_it_is_verified_against_both_models_before_it(packed, reference, msp):
    rows = json.loads(msp("verify", packed[2], "--reference", packed[reference], "--json").out)
    states = {finding["item"]: finding["state"] for row in rows for finding in row["findings"]}
    assert states["widths"] == states["pack and unpack"] == states["reference"] == "ok"
    assert states["logits"] == ("skip" if reference else "ok")


def test_another_weight_of_the_reference_is_found(packed, msp, copied, rewrite):
    zeros = copied(packed[0])

    def changed(weight):
        weight[weight != 0] *= 1.001
        return weight

    rewrite(zeros, {"model.layers.0.mlp.up_proj.weight": changed})
    found = msp("verify", packed[2], "--check", "round_trip", "--reference", zeros, "--json", code=1).out
    assert "1 with other bits or another shape, e.g. model.layers.0.mlp.up_proj.weight" in found


def test_signs_of_zeros_that_packing_drops_are_counted(msp, tmp_path):
    model = pruned()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1)  # its zeros become negative
    model.save_pretrained(tmp_path / "zeros")
    export_checkpoint(tmp_path / "zeros", Small(), tmp_path / "small")
    export_checkpoint(tmp_path / "small", Bitmask(), tmp_path / "packed")
    found = msp(
        "verify", tmp_path / "packed", "--check", "round_trip", "--reference", tmp_path / "zeros", "--json"
    )
    assert f"are its slices, but for signs of {64 * 32:,} zeros" in found.out


@no_kernels
def test_it_is_measured(packed, msp):
    options = ("--prompt", 4, "--tokens", 2, "--repeats", 1, "--json")
    record = json.loads(msp("bench", packed[2], *options).out)
    assert sum(record["kernels"].values()) == len(Checkpoint.open(packed[2]).packed)
    assert record["ratios"]["bytes"] < 1


def test_a_packed_one_is_not_packed_again(packed, tmp_path):
    with pytest.raises(FormatError, match="is packed already"):
        export_checkpoint(packed[2], Sparse24(), tmp_path / "again")


def channels(path, source, **options):
    export_checkpoint(source, Small(**options), path)
    return Checkpoint.open(path).shape_of("model.layers.0.mlp.down_proj")[1]


def test_a_silent_channel_keeps_its_place_in_a_2_4_mask_unless_told_otherwise(smaller, tmp_path):
    assert channels(tmp_path / "aligned", smaller[0]) == 64
    assert channels(tmp_path / "least", smaller[0], aligned=False) == 63
    found = Checkpoint.open(tmp_path / "least").packing_in(Sparse24.format)
    assert "not a multiple of" in found.dense["model.layers.0.mlp.down_proj"]


def test_whole_pieces_of_silent_channels_go_whatever_the_mask(tmp_path):
    model = pruned()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, KEPT[32:]] = 0
    model.save_pretrained(tmp_path / "zeros")
    assert channels(tmp_path / "small", tmp_path / "zeros") == 32


def test_a_silent_channel_goes_where_there_is_no_2_4_mask(tmp_path):
    model = pruned()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, KEPT[:4]] = 1.0
    model.save_pretrained(tmp_path / "zeros")
    assert channels(tmp_path / "small", tmp_path / "zeros") == 63


def test_a_quantum_that_the_pieces_cannot_hold_is_filled_up_as_before(tmp_path):
    pruned().save_pretrained(tmp_path / "zeros")
    assert channels(tmp_path / "small", tmp_path / "zeros", quantum=64) == 64


@torch.no_grad()
def differently_wide(*counts):
    """Return a model of 256 channels, of which so many of the first 192 stay by block, 2:4 in ``down_proj``."""
    torch.manual_seed(1)
    config = MistralConfig(
        **{**SIZES, "intermediate_size": 256},
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
    )
    model = MistralForCausalLM(config).float().eval()
    for block, count in zip(model.model.layers, counts, strict=True):
        held = torch.randperm(192)[:count].sort().values
        down = block.mlp.down_proj.weight
        part = masked(down[:, held])
        down.zero_()
        down[:, held] = part
    return model


@pytest.mark.parametrize(
    ("exporter", "counts"), [(Uniform(pad=True), (128, 192)), (Small(quantum=128), (96, 128))]
)
def test_what_fills_a_width_up_leaves_its_mask_whole(exporter, counts, tmp_path):
    differently_wide(*counts).save_pretrained(tmp_path / "zeros")
    export_checkpoint(tmp_path / "zeros", exporter, tmp_path / "small")
    downs = {f"model.layers.{block}.mlp.down_proj" for block in (0, 1)}
    assert downs <= set(Checkpoint.open(tmp_path / "small").packing_in(Sparse24.format).packed)


def test_a_mask_that_no_filling_up_leaves_whole_is_refused_unless_told_otherwise(tmp_path):
    differently_wide(128, 160).save_pretrained(tmp_path / "zeros")
    with pytest.raises(FormatError, match=r"layers\.1\.mlp uses 160 channels in a 2:4 mask"):
        export_checkpoint(tmp_path / "zeros", Small(quantum=128), tmp_path / "small")
    assert channels(tmp_path / "small", tmp_path / "zeros", quantum=128, aligned=False) == 128
