"""The round trip check: what changes a bit fails, and nothing else does."""

import pytest
import torch

from msp_plugin.verify.round_trip import RoundTrip

UP = "model.layers.1.mlp.up_proj"  # 2:8, packed
DOWN = "model.layers.1.mlp.down_proj"  # 3:8, dense


def test_the_round_trip_passes_in_both_forms_with_and_without_a_reference(check, states, run_dir, packed_dir):
    for path, reference in (
        (run_dir, None),
        (packed_dir, None),
        (packed_dir, run_dir),
        (run_dir, packed_dir),
    ):
        rows = check(RoundTrip(), path, reference)
        compared = {"reference": "ok", "tokenizer": "ok"} if reference else {"reference": "skip"}
        assert states(rows) == {"pack and unpack": "ok", **compared}
        assert rows["pack and unpack"].found.startswith("9 of 9 layers unchanged")
        details = rows["pack and unpack"].details
        assert details["packed_bytes"] * 16 == details["dense_bytes"] * 9
        if reference:
            assert rows["reference"].found == "all 21 tensors equal, bit for bit"


@pytest.mark.parametrize("name", [f"{UP}.weight", f"{DOWN}.weight", "model.norm.weight", "lm_head.weight"])
def test_one_changed_bit_in_the_reference_is_found_and_the_tensor_named(
    check, states, name, run_dir, packed_dir, copied, rewrite
):
    def flip(tensor):
        bits = tensor.view(torch.int16)
        bits[tuple((tensor != 0).nonzero()[0])] ^= 1
        return tensor

    reference = rewrite(copied(run_dir), {name: flip})
    for pair in ((packed_dir, reference), (reference, packed_dir)):
        rows = check(RoundTrip(), *pair)
        assert states(rows) == {"pack and unpack": "ok", "reference": "fail", "tokenizer": "ok"}
        assert rows["reference"].found == f"1 with other bits, e.g. {name}"


def test_a_tokenizer_that_splits_text_otherwise_than_the_references_fails(
    check, states, run_dir, packed_dir, copied, edit_json
):
    path = copied(packed_dir)
    edit_json(path / "tokenizer.json", lambda data: data.update(normalizer={"type": "Lowercase"}))
    rows = check(RoundTrip(), path, run_dir)
    assert states(rows) == {"pack and unpack": "ok", "reference": "ok", "tokenizer": "fail"}
    assert rows["tokenizer"].found == f"other tokens than {run_dir}"


def test_lost_and_further_tensors_are_named(check, run_dir, packed_dir, copied, rewrite):
    reference = rewrite(copied(run_dir), {"model.norm.weight": None, "model.extra.weight": torch.zeros(2)})
    row = check(RoundTrip(), packed_dir, reference)["reference"]
    assert row.state == "fail"
    assert row.found == "1 missing, e.g. model.extra.weight; 1 too many, e.g. model.norm.weight"


@pytest.mark.parametrize(("robbed", "found"), [("copy", "1 missing"), ("reference", "1 too many")])
def test_either_alone_is_enough_to_fail(check, robbed, found, run_dir, copied, rewrite):
    paths = {name: copied(run_dir, name) for name in ("copy", "reference")}
    rewrite(paths[robbed], {"model.norm.weight": None})
    row = check(RoundTrip(), paths["copy"], paths["reference"])["reference"]
    assert row.state == "fail" and row.found == f"{found}, e.g. model.norm.weight"


@pytest.mark.parametrize("change", [lambda t: t.float(), lambda t: t.reshape(64, 128)])
def test_the_same_numbers_in_another_dtype_or_shape_are_not_equal(check, change, run_dir, copied, rewrite):
    name = "lm_head.weight"
    path, reference = copied(run_dir), copied(run_dir, "reference")
    row = check(RoundTrip(), path, rewrite(reference, {name: change}))["reference"]
    assert row.state == "fail" and name in row.found


def test_zeros_of_another_sign_are_equal_and_counted(check, run_dir, packed_dir, copied, rewrite):
    reference = rewrite(copied(run_dir), {f"{UP}.weight": lambda t: torch.where(t == 0, -0.0, t)})
    for pair in ((packed_dir, reference), (reference, packed_dir)):
        row = check(RoundTrip(), *pair)["reference"]
        assert row.state == "ok"
        assert row.found == "all 21 tensors equal but for signs of zeros; 6,144 zeros have another sign"


@pytest.mark.parametrize("name", [f"{DOWN}.weight", "model.layers.0.self_attn.o_proj.weight"])
def test_zeros_of_another_sign_in_layers_that_are_not_packed_are_other_bits(
    check, name, run_dir, packed_dir, copied, rewrite
):
    reference = rewrite(copied(run_dir), {name: lambda t: torch.where(t == 0, -0.0, t)})
    row = check(RoundTrip(), packed_dir, reference)["reference"]
    assert row.state == "fail" and row.found == f"1 with other bits, e.g. {name}"


def test_a_changed_value_does_not_hide_among_signs_of_zeros(check, run_dir, packed_dir, copied, rewrite):
    def change(weight):
        weight = torch.where(weight == 0, -0.0, weight)
        weight[tuple((weight != 0).nonzero()[9])] *= -1
        return weight

    reference = rewrite(copied(run_dir), {f"{UP}.weight": change})
    row = check(RoundTrip(), packed_dir, reference)["reference"]
    assert row.state == "fail" and row.found == f"1 with other bits, e.g. {UP}.weight"


def test_the_round_trip_passes_on_negative_zeros_without_a_place(check, run_dir, copied, rewrite):
    path = rewrite(copied(run_dir), {f"{UP}.weight": lambda t: torch.where(t == 0, -0.0, t)})
    assert check(RoundTrip(), path)["pack and unpack"].state == "ok"


def test_equal_nans_are_equal_bits(check, spoil, run_dir, packed_dir, copied, rewrite):
    change = {"model.norm.weight": spoil(float("nan"), 3)}
    rows = check(
        RoundTrip(), rewrite(copied(packed_dir), change), rewrite(copied(run_dir, "reference"), change)
    )
    assert rows["reference"].state == "ok"


def test_a_servable_layer_that_cannot_be_packed_fails_with_its_name(check, spoil, run_dir, copied, rewrite):
    rows = check(RoundTrip(), rewrite(copied(run_dir), {f"{UP}.weight": spoil(1.0, slice(0, 1))}))
    assert rows["round_trip"].state == "fail" and f"{UP} is not 2:4" in rows["round_trip"].found


def test_a_damaged_bitmask_fails_with_the_layers_name(check, unsealed, rewrite):
    rows = check(RoundTrip(), rewrite(unsealed, {f"{UP}.bitmask": lambda t: t ^ 4}))
    assert rows["round_trip"].state == "fail" and f"{UP}: the bitmask" in rows["round_trip"].found


def test_a_checkpoint_without_servable_layers_and_a_quantized_one_are_skipped(
    check, make_run, copied, edit_json, tmp_path
):
    run = make_run(tmp_path / "run", levels=["3:8"] * 8)
    row = check(RoundTrip(), run)["pack and unpack"]
    assert (row.state, row.found) == ("skip", "no layer runs on 2:4 kernels")
    edit_json(run / "config.json", lambda data: data.update(quantization_config={"quant_method": "fp8"}))
    row = check(RoundTrip(), run)["pack and unpack"]
    assert row.state == "skip" and "is quantized" in row.found
