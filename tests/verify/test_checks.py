"""Every check passes on a good checkpoint, and each kind of damage fails in a row that names it."""

import json
import math
from dataclasses import dataclass

import pytest
import torch

from msp_plugin.calibration import CalibrationSet
from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import Dense, Sparse24, export_checkpoint
from msp_plugin.checkpoint.load import load
from msp_plugin.errors import FormatError, NumericsError, RecipeError
from msp_plugin.evaluation import mean_kl, perplexity
from msp_plugin.verify.base import Check, Finding, Subject, run_checks
from msp_plugin.verify.quality import Quality
from msp_plugin.verify.round_trip import RoundTrip
from msp_plugin.verify.served import Served
from msp_plugin.verify.structure import Structure

UP = "model.layers.1.mlp.up_proj"  # 2:8, packed
DOWN = "model.layers.1.mlp.down_proj"  # 3:8, dense


def check(checker, path, reference=None, **fields):
    """The rows of one check by item; the progress counts up to its total."""
    counted = {}
    subject = Subject(Checkpoint.open(path), Checkpoint.open(reference) if reference else None, **fields)
    (result,) = run_checks(
        subject, [checker], lambda step, done, total: counted.update({step: (done, total)})
    )
    assert result.check == checker.name and result.seconds >= 0
    assert not result.passed or all(done == total for done, total in counted.values())
    rows = {finding.item: finding for finding in result.findings}
    assert len(rows) == len(result.findings)
    assert result.passed == all(row.state != "fail" for row in rows.values())
    return rows


def states(rows):
    return {item: row.state for item, row in rows.items()}


def revive(weight):
    """Fill one zero in."""
    row, column = (weight == 0).nonzero()[-1]
    weight[row, column] = 0.5
    return weight


def spoil(value, index=(3, 5)):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


@pytest.fixture
def unsealed(packed_dir, copied):
    """The packed checkpoint without export.json, so that only the content can give damage away."""
    path = copied(packed_dir)
    (path / "export.json").unlink()
    return path


# structure


def test_structure_passes_on_a_run_a_packed_and_a_dense_export(run_dir, packed_dir, tmp_path):
    export_checkpoint(packed_dir, Dense(shard_bytes=30_000), tmp_path / "dense")
    budget = Checkpoint.open(run_dir).allocation.budget
    for path, sealed in ((run_dir, False), (packed_dir, True), (tmp_path / "dense", True)):
        rows = check(Structure(), path)
        assert states(rows) == {
            "files": "ok" if sealed else "skip", "tensors": "ok" if sealed else "skip", "layers": "ok", "zeros": "ok",
        }  # fmt: skip
        assert rows["layers"].found == "14 of 14 layers hold their level"
        assert rows["layers"].details[UP] == {"level": "2:8", "zeros": 128 * 64 * 3 // 4}
        assert rows["zeros"].found.startswith(f"{budget.zeros:,} of {budget.weights:,} (")
        assert rows["zeros"].expected == f"{budget.zeros:,} (run.json)"


@pytest.mark.parametrize("layer", [DOWN, "model.layers.0.self_attn.o_proj"])
def test_a_zero_filled_in_breaks_the_pattern_and_the_count(layer, run_dir, copied, rewrite):
    rows = check(Structure(), rewrite(copied(run_dir), {f"{layer}.weight": revive}))
    assert states(rows) == {
        "files": "skip",
        "tensors": "skip",
        "layers": "fail",
        layer: "fail",
        "zeros": "fail",
    }
    assert rows[layer].found == "keeps 4 of 8 in some group" and rows[layer].expected == "3:8"
    assert rows["layers"].found == "13 of 14 layers hold their level"


def test_a_packed_layer_of_a_freer_pattern_than_planned_is_found(run_dir, unsealed, rewrite):
    """Two in every four are 2:4, but not 2:8."""
    from msp_plugin.formats.sparse24 import pack

    weight = torch.zeros(128, 64, dtype=torch.bfloat16)
    weight[:, ::2] = 1
    rows = check(Structure(), rewrite(unsealed, pack(weight).tensors(UP)))
    assert rows[UP].state == "fail" and rows[UP].found == "keeps 4 of 8 in some group"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [DOWN, "model.layers.1.self_attn.q_proj"])
def test_weights_that_are_not_finite_are_found_in_pruned_and_dense_layers(
    value, layer, run_dir, copied, rewrite
):
    def change(weight):
        row, column = (weight != 0).nonzero()[7]
        weight[row, column] = value
        return weight

    rows = check(Structure(), rewrite(copied(run_dir), {f"{layer}.weight": change}))
    assert rows[layer].state == "fail" and "not finite" in rows[layer].found
    assert rows["zeros"].state == "ok"


def test_a_nan_in_a_packed_layer_is_found(unsealed, rewrite):
    rows = check(Structure(), rewrite(unsealed, {f"{UP}.compressed": spoil(float("nan"))}))
    assert rows[UP].state == "fail" and "not finite" in rows[UP].found


def test_a_damaged_bitmask_is_a_row_of_its_layer_and_the_other_layers_are_looked_at(unsealed, rewrite):
    rows = check(Structure(), rewrite(unsealed, {f"{UP}.bitmask": lambda t: t ^ 4}))
    assert "the bitmask does not store two of four" in rows[UP].found and rows[UP].state == "fail"
    assert rows["layers"].found == "13 of 14 layers hold their level"


def test_ten_layers_that_fail_are_named_and_all_are_counted(run_dir, copied, rewrite):
    names = [
        name for name, level in Checkpoint.open(run_dir).allocation.by_layer.items() if not level.is_dense
    ]
    assert len(names) == 11
    rows = check(Structure(), rewrite(copied(run_dir), {f"{name}.weight": revive for name in names}))
    assert rows["layers"].found == "3 of 14 layers hold their level"
    assert [item for item in rows if item.startswith("model.")] == names[:10]


@pytest.mark.parametrize("change", [-1, 1, 5])
def test_a_run_json_that_counted_other_zeros_is_found(change, run_dir, copied, edit_json):
    path = copied(run_dir)
    edit_json(
        path / "run.json", lambda data: data["sparsity"].update(zeros=data["sparsity"]["zeros"] + change)
    )
    assert states(check(Structure(), path)) == {
        "files": "skip",
        "tensors": "skip",
        "layers": "ok",
        "zeros": "fail",
    }


def test_zeros_beyond_the_plan_are_right_where_the_run_counted_them_and_where_nothing_did(
    run_dir, copied, rewrite, edit_json
):
    path = rewrite(copied(run_dir), {f"{DOWN}.weight": lambda t: t * (torch.arange(64)[:, None] > 0)})
    more = Checkpoint.open(run_dir).allocation.budget.zeros + 128 * 3 // 8
    assert check(Structure(), path)["zeros"].state == "fail"
    edit_json(path / "run.json", lambda data: data["sparsity"].update(zeros=more))
    assert check(Structure(), path)["zeros"].state == "ok"
    (path / "run.json").unlink()
    row = check(Structure(), path)["zeros"]
    assert row.state == "ok" and "allocation.json, at least" in row.expected


def test_fewer_zeros_than_planned_are_wrong_without_a_run_json_too(run_dir, copied, rewrite):
    path = copied(run_dir)
    (path / "run.json").unlink()
    rows = check(Structure(), rewrite(path, {f"{DOWN}.weight": revive}))
    assert rows["zeros"].state == "fail"


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"sparsity": {"zeros": "many"}}', '{"sparsity": 3}'])
def test_a_run_json_that_says_nothing_is_passed_over(content, run_dir, copied):
    path = copied(run_dir)
    (path / "run.json").write_text(content)
    row = check(Structure(), path)["zeros"]
    assert row.state == "ok" and "allocation.json" in row.expected


def test_without_an_allocation_the_layers_are_skipped_and_said_to_be(run_dir, copied):
    path = copied(run_dir)
    (path / "allocation.json").unlink()
    rows = check(Structure(), path)
    assert states(rows) == {"files": "skip", "tensors": "skip", "layers": "skip"}
    assert "no allocation.json" in rows["layers"].found


def test_a_flipped_bit_is_found_by_the_checksum(packed_dir, copied, rewrite):
    rows = check(
        Structure(),
        rewrite(
            copied(packed_dir), {"model.norm.weight": lambda t: t.view(torch.int16).add(1).view(t.dtype)}
        ),
    )
    assert states(rows) == {"files": "fail", "tensors": "ok", "layers": "ok", "zeros": "ok"}
    assert rows["files"].found == "model.safetensors has other bytes than were written (SHA-256)"


def test_tensors_that_are_not_those_of_the_export_are_named(packed_dir, copied, rewrite):
    path = rewrite(
        copied(packed_dir),
        {
            "model.norm.weight": None,
            "model.extra.weight": torch.zeros(2),
            "lm_head.weight": lambda t: t[:64].contiguous(),
        },
    )
    rows = check(Structure(), path)
    assert rows["tensors"].state == "fail" and rows["files"].state == "fail"
    assert rows["tensors"].found == (
        "1 missing, e.g. model.norm.weight; 1 not of the export, e.g. model.extra.weight; "
        "1 of another shape, e.g. lm_head.weight"
    )


def test_an_allocation_of_another_model_fails_and_is_explained(run_dir, copied, edit_json):
    path = copied(run_dir)
    edit_json(path / "allocation.json", lambda data: data["units"][1]["layers"][0].update(name="model.other"))
    rows = check(Structure(), path)
    assert rows["structure"].state == "fail" and "is for another model" in rows["structure"].found


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_quantized_weights_are_counted_too(dtype, run_dir, copied, rewrite):
    """As the recipe of the README leaves them, with a quantizer after the pruning."""
    path = rewrite(copied(run_dir), {f"{DOWN}.weight": lambda t: (t.float() * 50).sign().to(dtype)})
    rows = check(Structure(), path)
    assert states(rows) == {"files": "skip", "tensors": "skip", "layers": "ok", "zeros": "ok"}
    rows = check(Structure(), rewrite(path, {f"{DOWN}.weight": lambda t: revive(t.float()).sign().to(dtype)}))
    assert rows[DOWN].found == "keeps 4 of 8 in some group"


def quantized(path, edit_json):
    said = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}
    edit_json(path / "config.json", lambda data: data.update(quantization_config=said))
    return path


def test_quantizing_may_round_weights_to_zero_but_not_fill_zeros_in(run_dir, copied, rewrite, edit_json):
    path = quantized(copied(run_dir), edit_json)

    def round_one(weight):
        weight[tuple((weight != 0).nonzero()[0])] = 0
        return weight

    row = check(Structure(), rewrite(path, {f"{DOWN}.weight": round_one}))["zeros"]
    assert row.state == "ok" and row.expected.endswith("(run.json, at least)")
    rows = check(Structure(), rewrite(path, {f"{DOWN}.weight": lambda t: revive(revive(t))}))
    assert rows["zeros"].state == rows["layers"].state == "fail"


def test_quantized_weights_in_a_form_of_their_own_are_skipped(run_dir, copied, rewrite, edit_json):
    path = quantized(copied(run_dir), edit_json)
    rewrite(path, {f"{UP}.weight": None, f"{UP}.weight_packed": torch.zeros(128, 8, dtype=torch.int32)})
    rows = check(Structure(), path)
    assert states(rows) == {"files": "skip", "tensors": "skip", "layers": "skip"}
    assert "not read here" in rows["layers"].found


def test_a_nan_among_eight_bit_floats_is_found(run_dir, copied, rewrite):
    path = rewrite(
        copied(run_dir),
        {f"{DOWN}.weight": lambda t: torch.where(t == t.max(), float("nan"), t).to(torch.float8_e4m3fn)},
    )
    assert "not finite" in check(Structure(), path)[DOWN].found


# round trip


def test_the_round_trip_passes_in_both_forms_with_and_without_a_reference(run_dir, packed_dir):
    for path, reference in (
        (run_dir, None),
        (packed_dir, None),
        (packed_dir, run_dir),
        (run_dir, packed_dir),
    ):
        rows = check(RoundTrip(), path, reference)
        assert states(rows) == {"pack and unpack": "ok", "reference": "ok" if reference else "skip"}
        assert rows["pack and unpack"].found.startswith("9 of 9 layers unchanged")
        details = rows["pack and unpack"].details
        assert details["packed_bytes"] * 16 == details["dense_bytes"] * 9
        if reference:
            assert rows["reference"].found == "all 21 tensors equal, bit for bit"


@pytest.mark.parametrize("name", [f"{UP}.weight", f"{DOWN}.weight", "model.norm.weight", "lm_head.weight"])
def test_one_changed_bit_in_the_reference_is_found_and_the_tensor_named(
    name, run_dir, packed_dir, copied, rewrite
):
    def flip(tensor):
        bits = tensor.view(torch.int16)
        bits[tuple((tensor != 0).nonzero()[0])] ^= 1
        return tensor

    reference = rewrite(copied(run_dir), {name: flip})
    for pair in ((packed_dir, reference), (reference, packed_dir)):
        rows = check(RoundTrip(), *pair)
        assert states(rows) == {"pack and unpack": "ok", "reference": "fail"}
        assert rows["reference"].found == f"1 with other bits, e.g. {name}"


def test_lost_and_further_tensors_are_named(run_dir, packed_dir, copied, rewrite):
    reference = rewrite(copied(run_dir), {"model.norm.weight": None, "model.extra.weight": torch.zeros(2)})
    row = check(RoundTrip(), packed_dir, reference)["reference"]
    assert row.state == "fail"
    assert row.found == "1 missing, e.g. model.extra.weight; 1 too many, e.g. model.norm.weight"


@pytest.mark.parametrize(("robbed", "found"), [("copy", "1 missing"), ("reference", "1 too many")])
def test_either_alone_is_enough_to_fail(robbed, found, run_dir, copied, rewrite):
    paths = {name: copied(run_dir, name) for name in ("copy", "reference")}
    rewrite(paths[robbed], {"model.norm.weight": None})
    row = check(RoundTrip(), paths["copy"], paths["reference"])["reference"]
    assert row.state == "fail" and row.found == f"{found}, e.g. model.norm.weight"


@pytest.mark.parametrize("change", [lambda t: t.float(), lambda t: t.reshape(64, 128)])
def test_the_same_numbers_in_another_dtype_or_shape_are_not_equal(change, run_dir, copied, rewrite):
    name = "lm_head.weight"
    path, reference = copied(run_dir), copied(run_dir, "reference")
    row = check(RoundTrip(), path, rewrite(reference, {name: change}))["reference"]
    assert row.state == "fail" and name in row.found


def test_zeros_of_another_sign_are_equal_and_counted(run_dir, packed_dir, copied, rewrite):
    reference = rewrite(copied(run_dir), {f"{UP}.weight": lambda t: torch.where(t == 0, -0.0, t)})
    for pair in ((packed_dir, reference), (reference, packed_dir)):
        row = check(RoundTrip(), *pair)["reference"]
        assert row.state == "ok"
        assert row.found == "all 21 tensors equal but for signs of zeros; 6,144 zeros have another sign"


@pytest.mark.parametrize("name", [f"{DOWN}.weight", "model.layers.0.self_attn.o_proj.weight"])
def test_zeros_of_another_sign_in_layers_that_are_not_packed_are_other_bits(
    name, run_dir, packed_dir, copied, rewrite
):
    reference = rewrite(copied(run_dir), {name: lambda t: torch.where(t == 0, -0.0, t)})
    row = check(RoundTrip(), packed_dir, reference)["reference"]
    assert row.state == "fail" and row.found == f"1 with other bits, e.g. {name}"


def test_a_changed_value_does_not_hide_among_signs_of_zeros(run_dir, packed_dir, copied, rewrite):
    def change(weight):
        weight = torch.where(weight == 0, -0.0, weight)
        weight[tuple((weight != 0).nonzero()[9])] *= -1
        return weight

    reference = rewrite(copied(run_dir), {f"{UP}.weight": change})
    row = check(RoundTrip(), packed_dir, reference)["reference"]
    assert row.state == "fail" and row.found == f"1 with other bits, e.g. {UP}.weight"


def test_the_round_trip_passes_on_negative_zeros_without_a_place(run_dir, copied, rewrite):
    path = rewrite(copied(run_dir), {f"{UP}.weight": lambda t: torch.where(t == 0, -0.0, t)})
    assert check(RoundTrip(), path)["pack and unpack"].state == "ok"


def test_equal_nans_are_equal_bits(run_dir, packed_dir, copied, rewrite):
    change = {"model.norm.weight": spoil(float("nan"), 3)}
    rows = check(
        RoundTrip(), rewrite(copied(packed_dir), change), rewrite(copied(run_dir, "reference"), change)
    )
    assert rows["reference"].state == "ok"


def test_a_servable_layer_that_cannot_be_packed_fails_with_its_name(run_dir, copied, rewrite):
    rows = check(RoundTrip(), rewrite(copied(run_dir), {f"{UP}.weight": spoil(1.0, slice(0, 1))}))
    assert rows["round_trip"].state == "fail" and f"{UP} is not 2:4" in rows["round_trip"].found


def test_a_damaged_bitmask_fails_with_the_layers_name(unsealed, rewrite):
    rows = check(RoundTrip(), rewrite(unsealed, {f"{UP}.bitmask": lambda t: t ^ 4}))
    assert rows["round_trip"].state == "fail" and f"{UP}: the bitmask" in rows["round_trip"].found


def test_a_checkpoint_without_servable_layers_and_a_quantized_one_are_skipped(
    make_run, copied, edit_json, tmp_path
):
    run = make_run(tmp_path / "run", levels=["3:8"] * 8)
    row = check(RoundTrip(), run)["pack and unpack"]
    assert (row.state, row.found) == ("skip", "no layer runs on 2:4 kernels")
    edit_json(run / "config.json", lambda data: data.update(quantization_config={"quant_method": "fp8"}))
    row = check(RoundTrip(), run)["pack and unpack"]
    assert row.state == "skip" and "is quantized" in row.found


# quality


@pytest.fixture
def text(make_samples):
    return make_samples(4, 24, 3)


def record(path, edit_json, text, value, key="mixed", dtype="float32"):
    change = {
        "test": {"fingerprint": text.fingerprint}, "perplexity": {key: value}, "model": {"dtype": dtype},
    }  # fmt: skip
    edit_json(path / "run.json", lambda data: data.update(change))


def test_quality_measures_perplexity_and_no_divergence_from_the_reference(
    run_dir, packed_dir, llama_dir, text
):
    rows = check(Quality(), packed_dir, run_dir, text=text, original=str(llama_dir))
    assert states(rows) == {"perplexity": "ok", "reference": "ok", "original": "ok"}
    model, original = load(run_dir, "float32"), load(llama_dir, "float32")
    value, before, kl = perplexity(model, text), perplexity(original, text), mean_kl(original, model, text)
    assert rows["perplexity"].details == {
        "perplexity": value, "tokens": text.tokens, "fingerprint": text.fingerprint,
    }  # fmt: skip
    assert rows["reference"].details == {"kl": 0.0, "perplexity": value}
    assert rows["original"].details == {"kl": kl, "perplexity": before} and kl > 0.01
    assert f"{before:.4f} -> {value:.4f}" in rows["original"].found
    assert states(check(Quality(), packed_dir, text=text)) == {"perplexity": "ok"}


@pytest.mark.parametrize("name", ["model.norm.weight", f"{DOWN}.weight"])
def test_any_change_of_the_logits_fails_against_the_reference(
    name, run_dir, packed_dir, copied, rewrite, text
):
    reference = rewrite(copied(run_dir), {name: lambda t: t * 1.01})
    rows = check(Quality(), packed_dir, reference, text=text)
    assert states(rows) == {"perplexity": "ok", "reference": "fail"}
    assert 0 < rows["reference"].details["kl"] < 0.1


def test_the_cost_of_pruning_may_be_bounded(packed_dir, llama_dir, text):
    kl = check(Quality(), packed_dir, text=text, original=str(llama_dir))["original"].details["kl"]
    for bound, state in ((kl, "ok"), (0.999 * kl, "fail"), (0.0, "fail")):
        row = check(Quality(max_kl=bound), packed_dir, text=text, original=str(llama_dir))["original"]
        assert row.state == state and row.expected == f"KL at most {bound:g}"


@pytest.mark.parametrize("bound", [-1.0, float("nan")])
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(RecipeError, match="max_kl"):
        Quality(max_kl=bound)


@pytest.mark.parametrize("key", ["mixed", "result"])
@pytest.mark.parametrize(("factor", "state"), [(1, "ok"), (1.0009, "ok"), (1.0012, "fail"), (0.9988, "fail")])
def test_the_perplexity_of_the_run_is_held_against_ours(key, factor, state, run_dir, copied, edit_json, text):
    value, path = perplexity(load(run_dir, "float32"), text), copied(run_dir)
    record(path, edit_json, text, value * factor, key)
    row = check(Quality(), path, text=text)["perplexity"]
    assert row.state == state and row.expected == f"{value * factor:.4f} (run.json, same text)"


@pytest.mark.parametrize(("run_in", "measured_in"), [("auto", "bfloat16"), ("bfloat16", "bfloat16")])
def test_the_perplexity_of_a_run_in_another_dtype_is_shown_and_not_held_against_ours(
    run_in, measured_in, run_dir, copied, edit_json, text
):
    path = copied(run_dir)
    record(path, edit_json, text, 99.0, dtype=run_in)
    row = check(Quality(), path, text=text)["perplexity"]
    assert row.state == "ok" and row.expected == f"finite; 99.0000 in {measured_in} (run.json)"
    assert check(Quality(dtype=measured_in), path, text=text)["perplexity"].state == "fail"


def test_the_perplexity_of_another_text_says_nothing(run_dir, copied, edit_json, text, make_samples):
    path = copied(run_dir)
    record(path, edit_json, make_samples(4, 24, 4), 1.0)
    assert check(Quality(), path, text=text)["perplexity"].expected == "finite"
    for content in ("[]", "{", '{"test": 3}', '{"test": {}, "perplexity": null}'):
        (path / "run.json").write_text(content)
        assert check(Quality(), path, text=text)["perplexity"].expected == "finite"
    for quality in ({"mixed": None}, None, "3", 3, {"mixed": "3"}):
        found = {"test": {"fingerprint": text.fingerprint}, "perplexity": quality}
        (path / "run.json").write_text(json.dumps(found))
        assert check(Quality(), path, text=text)["perplexity"].expected == "finite"


def test_a_model_that_computes_no_number_fails(run_dir, copied, rewrite, text):
    path = rewrite(copied(run_dir), {"model.norm.weight": spoil(float("nan"), 3)})
    rows = check(Quality(), path, text=text)
    assert states(rows) == {"quality": "fail"} and "not a number" in rows["quality"].found


def test_a_perplexity_without_bounds_fails_and_its_json_is_json(run_dir, copied, rewrite, llama_dir, text):
    path = rewrite(copied(run_dir), {"lm_head.weight": lambda t: t * 1e5})
    subject = Subject(Checkpoint.open(path), text=text, original=str(llama_dir))
    (result,) = run_checks(subject, [Quality()])
    assert states({row.item: row for row in result.findings}) == {"perplexity": "fail", "original": "fail"}
    assert (
        json.loads(json.dumps(result.to_dict(), allow_nan=False))["findings"][0]["details"]["perplexity"]
        is None
    )


# mean_kl


def test_the_divergence_is_the_mean_over_all_positions(llama, make_samples):
    import copy

    text = CalibrationSet((*make_samples(3, 24, 1).samples, *make_samples(2, 10, 2).samples), "two lengths")
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.lm_head.weight += 0.05
        other.model.norm.weight *= 1.1
        total = 0.0
        for sample in text.samples:
            p, q = (m(sample[None]).logits[0].double().log_softmax(-1) for m in (llama, other))
            total += float((p.exp() * (p - q)).sum())
    seen = []
    found = mean_kl(llama, other, text, batch_tokens=48, progress=lambda *step: seen.append(step))
    assert math.isclose(found, total / text.tokens, rel_tol=1e-4) and found > 1e-3
    assert found != pytest.approx(mean_kl(other, llama, text), rel=1e-3)
    assert seen == [(2, 5), (3, 5), (5, 5)]
    assert mean_kl(llama, llama, text) == 0.0


def test_a_divergence_that_is_no_number_is_an_error(llama, qwen2, data):
    with torch.no_grad():
        qwen2.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericsError, match="KL divergence is not a number"):
        mean_kl(llama, qwen2, data)


# all checks


def test_what_lacks_its_inputs_is_skipped_and_says_which_option_gives_them(packed_dir):
    results = run_checks(Subject(Checkpoint.open(packed_dir)), [Quality(), Served()])
    assert all(result.passed for result in results)
    assert [[(row.state, row.found) for row in result.findings] for result in results] == [
        [("skip", "not checked: give --data TEXT")], [("skip", "not checked: give --vllm ENV")],
    ]  # fmt: skip


@dataclass(frozen=True)
class Raises(Check):
    name = "raises"
    bug: bool = False

    def run(self, subject, progress):
        raise ZeroDivisionError if self.bug else FormatError("this is wrong", hint="mend it")


@dataclass(frozen=True)
class Passes(Check):
    name = "passes"

    def run(self, subject, progress):
        return [Finding("all", "ok", "well", details={"n": 1})]


def test_a_check_that_fails_does_not_stop_the_others(packed_dir):
    results = run_checks(Subject(Checkpoint.open(packed_dir)), [Raises(), Passes(), Raises()])
    assert [(r.check, r.passed) for r in results] == [("raises", False), ("passes", True), ("raises", False)]
    (row,) = results[0].findings
    assert (row.item, row.state) == ("raises", "fail") and row.found == "this is wrong\n  -> mend it"
    assert results[1].to_dict() == {
        "check": "passes", "passed": True, "seconds": round(results[1].seconds, 3),
        "findings": [{"item": "all", "state": "ok", "found": "well", "expected": "", "details": {"n": 1}}],
    }  # fmt: skip


def test_a_check_that_breaks_fails_and_the_others_go_on(packed_dir):
    broken, sound = run_checks(Subject(Checkpoint.open(packed_dir)), [Raises(bug=True), Structure()])
    assert not broken.passed and "the check broke: ZeroDivisionError" in broken.findings[0].found
    assert sound.passed


def test_an_interrupt_stops_all_checks(packed_dir):
    def interrupt(step, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_checks(Subject(Checkpoint.open(packed_dir)), [Structure(), Passes()], interrupt)


def test_the_sharded_packed_form_passes_every_check_that_needs_no_server(run_dir, llama_dir, text, tmp_path):
    export_checkpoint(run_dir, Sparse24(shard_bytes=25_000), tmp_path / "out")
    subject = Subject(Checkpoint.open(tmp_path / "out"), Checkpoint.open(run_dir), str(llama_dir), text)
    results = run_checks(subject, [Structure(), RoundTrip(), Quality()])
    assert {row.state for result in results for row in result.findings} == {"ok"}
    json.dumps([result.to_dict() for result in results], allow_nan=False)
