"""Checks of a checkpoint with values in int8: what rounding to half a scale may change passes, anything else fails."""

import pytest
import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import Dense, export_checkpoint
from msp_plugin.checkpoint.packed_export import Bitmask, Sparse24
from msp_plugin.checkpoint.smaller import Small, Uniform
from msp_plugin.formats import bitmask
from msp_plugin.verify import quality
from msp_plugin.verify.logits import Logits
from msp_plugin.verify.quality import Quality
from msp_plugin.verify.round_trip import RoundTrip
from msp_plugin.verify.structure import Structure

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def int8_dir(tmp_path_factory, run_dir):
    path = tmp_path_factory.mktemp("int8") / "model"
    export_checkpoint(run_dir, Bitmask(values="int8"), path)
    return path


def without_checksums(path):
    (path / "export.json").unlink()
    return path


def test_an_export_passes_with_its_run_as_the_reference(check, states, run_dir, int8_dir):
    rows = check(RoundTrip(), int8_dir, run_dir)
    assert states(rows) == {"unpack": "ok", "reference": "ok", "tokenizer": "ok"}
    assert rows["reference"].found.startswith(
        "7 tensors equal, bit for bit; 14 in int8, each weight within half"
    )
    assert rows["unpack"].details["packed_bytes"] == Checkpoint.open(int8_dir).manifest.packed_bytes
    assert states(check(Structure(), int8_dir)) == dict.fromkeys(
        ("files", "tensors", "layers", "zeros"), "ok"
    )


def test_its_dense_form_has_its_bits_and_is_known_to_be_rounded(check, run_dir, int8_dir, text, tmp_path):
    dense = export_checkpoint(int8_dir, Dense(), tmp_path / "dense")
    assert dense.quantization_errors == Checkpoint.open(int8_dir).manifest.quantization_errors
    assert check(Structure(), tmp_path / "dense")["zeros"].expected.endswith("at least)")
    assert check(Quality(), tmp_path / "dense", run_dir, text=text)["reference"].state == "ok"
    for pair in ((int8_dir, tmp_path / "dense"), (tmp_path / "dense", int8_dir)):
        assert check(RoundTrip(), *pair)["reference"].found == "all 21 tensors equal, bit for bit"
        row = check(Quality(), *pair, text=text)[
            "reference"
        ]  # in float32, in which int8 is not rounded again
        assert row.state == "ok" and 0 < row.details["kl"] < 0.001
    assert check(Quality(dtype="auto"), *pair, text=text)["reference"].details["kl"] == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.index_fill(0, torch.tensor([3]), 0),  # zeros where the export has weights
        lambda w: torch.where(w == w.abs().max(1, keepdim=True).values, w * 1.02, w),
        lambda w: -w,
        lambda w: torch.where(w == 0, w, torch.nan),
    ],
    ids=["zeros filled in", "further than half a scale", "signs", "NaN"],
)
def test_a_reference_of_other_weights_fails_by_name(change, check, run_dir, int8_dir, copied, rewrite):
    row = check(RoundTrip(), int8_dir, rewrite(copied(run_dir), {f"{UP}.weight": change}))["reference"]
    assert row.state == "fail"
    assert row.found == f"1 with other bits, or more than half a scale away in int8, e.g. {UP}.weight"


@pytest.mark.parametrize("factor", [1.02, 20, 1000])
def test_a_scale_coarser_than_the_largest_weight_of_its_row_needs_fails(
    factor, check, run_dir, int8_dir, copied, rewrite
):
    path = without_checksums(copied(int8_dir))
    layer, whole = Checkpoint.open(int8_dir), Checkpoint.open(run_dir)
    scale = layer.tensors.read(f"{UP}.scale") * factor
    values = (whole.weight(UP).double() / scale.double()[:, None]).round().to(torch.int8)
    packed = {**bitmask.pack(values, UP).by_suffix, "scale": scale}
    rewrite(path, {f"{UP}.{suffix}": tensor for suffix, tensor in packed.items()})
    row = check(RoundTrip(), path, run_dir)["reference"]
    assert row.state == "fail" and row.found.endswith(f"e.g. {UP}.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_of_zeros_and_of_tiny_weights_pass(dtype, check, run_dir, copied, rewrite, tmp_path):
    def change(weight):
        weight = weight.to(dtype)
        weight[3], weight[4] = 0, weight[4] * 1e-4
        return weight

    run = rewrite(copied(run_dir), {f"{UP}.weight": change})
    export_checkpoint(run, Bitmask(values="int8"), tmp_path / "int8")
    assert UP in Checkpoint.open(tmp_path / "int8").packed
    assert check(RoundTrip(), tmp_path / "int8", run)["reference"].state == "ok"


def test_tensors_that_are_not_in_int8_must_keep_their_bits(check, run_dir, int8_dir, copied, rewrite):
    reference = rewrite(copied(run_dir), {"model.norm.weight": lambda t: t * 1.001 + 1e-2})
    row = check(RoundTrip(), int8_dir, reference)["reference"]
    assert row.state == "fail" and row.found.endswith("e.g. model.norm.weight")


def test_damage_is_a_failed_check(check, run_dir, int8_dir, copied, rewrite):
    path = rewrite(without_checksums(copied(int8_dir)), {f"{UP}.scale": lambda t: -t})
    (row,) = check(RoundTrip(), path, run_dir).values()
    assert row.state == "fail" and UP in row.found


def test_kl_to_the_run_is_small_but_not_zero_and_bounded(check, states, run_dir, int8_dir, text, monkeypatch):
    rows = check(Quality(), int8_dir, run_dir, text=text)
    assert states(rows) == {"perplexity": "skip", "reference": "ok"}
    kl = rows["reference"].details["kl"]
    assert 0 < kl < 0.002 and rows["reference"].expected.startswith("KL at most 0.01")
    monkeypatch.setattr(quality, "_INT8_KL", 0.99 * kl)
    assert check(Quality(), int8_dir, run_dir, text=text)["reference"].state == "fail"
    same = check(Quality(), int8_dir, int8_dir, text=text)["reference"]
    assert same.state == "ok" and same.details["kl"] == 0 and same.expected.startswith("KL 0")


@pytest.mark.parametrize(("off", "state"), [(1.0, "ok"), (1.04, "ok"), (1.06, "fail"), (0.95, "fail")])
def test_perplexity_may_differ_from_the_runs_by_a_twentieth(
    off, state, check, int8_dir, copied, edit_json, text
):
    value = check(Quality(), int8_dir, text=text)["perplexity"].details["perplexity"]
    path = without_checksums(copied(int8_dir))
    change = {
        "test": {"fingerprint": text.fingerprint},
        "perplexity": {"mixed": off * value},
        "model": {"dtype": "float32"},
    }
    edit_json(path / "run.json", lambda data: data.update(change))
    assert check(Quality(), path, text=text)["perplexity"].state == state


@pytest.fixture
def small_int8(llama, tmp_path):
    """A model with silent channels and a mask, its smaller form in int8, and that one dense."""
    with torch.no_grad():
        for block in llama.model.layers:
            block.mlp.down_proj.weight[:, 64:] = 0
            block.mlp.up_proj.weight[:, ::2] = 0
    llama.save_pretrained(tmp_path / "zeros")
    export_checkpoint(tmp_path / "zeros", Small(), tmp_path / "small")
    export_checkpoint(tmp_path / "small", Bitmask(values="int8"), tmp_path / "int8")
    return tmp_path / "int8", tmp_path / "zeros"


def test_a_smaller_model_in_int8_passes_against_the_whole_one(small_int8, check, states):
    rows = check(RoundTrip(), *small_int8)
    assert states(rows) == {"unpack": "ok", "reference": "ok", "left out": "ok"}
    assert "14 in int8, each weight within half a scale" in rows["reference"].found
    rows = check(Logits(), *small_int8)
    assert states(rows) == {"logits": "ok", "greedy tokens": "skip"}
    assert 1e-4 < rows["logits"].details["difference"] < 0.05


def test_another_model_in_int8_fails_against_the_whole_one(small_int8, check, rewrite):
    rewrite(small_int8[1], {f"{UP}.weight": lambda w: w * 1.5})
    assert check(RoundTrip(), *small_int8)["reference"].found.endswith(f"e.g. {UP}.weight")
    assert check(Logits(), *small_int8)["logits"].state == "fail"


def test_a_smaller_dense_form_of_int8_in_16_bits_passes_against_it(llama, check, states, text, tmp_path):
    with torch.no_grad():
        for block in llama.model.layers:
            block.mlp.down_proj.weight[:, 64:] = 0
            block.mlp.up_proj.weight[:, ::2] = 0
    llama.bfloat16().save_pretrained(tmp_path / "zeros")
    export_checkpoint(tmp_path / "zeros", Bitmask(values="int8"), tmp_path / "int8")
    export_checkpoint(tmp_path / "int8", Dense(), tmp_path / "dense")
    export_checkpoint(tmp_path / "dense", Small(), tmp_path / "small")
    pair = tmp_path / "small", tmp_path / "int8"
    assert states(check(Logits(), *pair)) == {"logits": "ok", "greedy tokens": "skip"}
    assert check(Quality(), *pair, text=text)["reference"].state == "ok"


def test_a_model_cut_from_int8_is_known_to_be_rounded_in_every_form(llama, check, states, tmp_path):
    with torch.no_grad():
        llama.model.layers[0].self_attn.o_proj.weight.zero_()
        llama.model.layers[0].mlp.down_proj.weight.zero_()
        for layer in ("gate_proj", "up_proj", "down_proj"):
            llama.model.layers[1].get_submodule(f"mlp.{layer}").weight[:, 2::4] = 0
            llama.model.layers[1].get_submodule(f"mlp.{layer}").weight[:, 3::4] = 0
    llama.save_pretrained(tmp_path / "zeros")
    export_checkpoint(tmp_path / "zeros", Bitmask(values="int8"), tmp_path / "int8")
    errors = Checkpoint.open(tmp_path / "int8").manifest.quantization_errors
    cut = export_checkpoint(tmp_path / "int8", Uniform(), tmp_path / "uniform").quantization_errors
    assert cut == {name.replace(".1.", ".0."): e for name, e in errors.items() if ".1." in name} != {}
    assert export_checkpoint(tmp_path / "uniform", Sparse24(), tmp_path / "packed").quantization_errors == cut
    assert states(check(Logits(), tmp_path / "packed", tmp_path / "zeros"))["greedy tokens"] == "skip"
