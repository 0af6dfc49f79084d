"""The structure check: files, tensors, levels and zeros; each kind of damage fails in a row that names it."""

import pytest
import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import Dense, export_checkpoint
from msp_plugin.verify.structure import Structure

UP = "model.layers.1.mlp.up_proj"  # 2:8, packed
DOWN = "model.layers.1.mlp.down_proj"  # 3:8, dense


def test_structure_passes_on_a_run_a_packed_and_a_dense_export(check, states, run_dir, packed_dir, tmp_path):
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
def test_a_zero_filled_in_breaks_the_pattern_and_the_count(
    check, states, revive, layer, run_dir, copied, rewrite
):
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


def test_a_packed_layer_of_a_freer_pattern_than_planned_is_found(check, run_dir, unsealed, rewrite):
    """Two in every four are 2:4, but not 2:8."""
    from msp_plugin.formats.sparse24 import pack

    weight = torch.zeros(128, 64, dtype=torch.bfloat16)
    weight[:, ::2] = 1
    rows = check(Structure(), rewrite(unsealed, pack(weight).tensors(UP)))
    assert rows[UP].state == "fail" and rows[UP].found == "keeps 4 of 8 in some group"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [DOWN, "model.layers.1.self_attn.q_proj"])
def test_weights_that_are_not_finite_are_found_in_pruned_and_dense_layers(
    check, value, layer, run_dir, copied, rewrite
):
    def change(weight):
        row, column = (weight != 0).nonzero()[7]
        weight[row, column] = value
        return weight

    rows = check(Structure(), rewrite(copied(run_dir), {f"{layer}.weight": change}))
    assert rows[layer].state == "fail" and "not finite" in rows[layer].found
    assert rows["zeros"].state == "ok"


def test_a_nan_in_a_packed_layer_is_found(check, spoil, unsealed, rewrite):
    rows = check(Structure(), rewrite(unsealed, {f"{UP}.compressed": spoil(float("nan"))}))
    assert rows[UP].state == "fail" and "not finite" in rows[UP].found


def test_a_damaged_bitmask_is_a_row_of_its_layer_and_the_other_layers_are_looked_at(check, unsealed, rewrite):
    rows = check(Structure(), rewrite(unsealed, {f"{UP}.bitmask": lambda t: t ^ 4}))
    assert "the bitmask does not store two of four" in rows[UP].found and rows[UP].state == "fail"
    assert rows["layers"].found == "13 of 14 layers hold their level"


def test_ten_layers_that_fail_are_named_and_all_are_counted(check, revive, run_dir, copied, rewrite):
    names = [
        name for name, level in Checkpoint.open(run_dir).allocation.by_layer.items() if not level.is_dense
    ]
    assert len(names) == 11
    rows = check(Structure(), rewrite(copied(run_dir), {f"{name}.weight": revive for name in names}))
    assert rows["layers"].found == "3 of 14 layers hold their level"
    assert [item for item in rows if item.startswith("model.")] == names[:10]


@pytest.mark.parametrize("change", [-1, 1, 5])
def test_a_run_json_that_counted_other_zeros_is_found(check, states, change, run_dir, copied, edit_json):
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
    check, run_dir, copied, rewrite, edit_json
):
    path = rewrite(copied(run_dir), {f"{DOWN}.weight": lambda t: t * (torch.arange(64)[:, None] > 0)})
    more = Checkpoint.open(run_dir).allocation.budget.zeros + 128 * 3 // 8
    assert check(Structure(), path)["zeros"].state == "fail"
    edit_json(path / "run.json", lambda data: data["sparsity"].update(zeros=more))
    assert check(Structure(), path)["zeros"].state == "ok"
    (path / "run.json").unlink()
    row = check(Structure(), path)["zeros"]
    assert row.state == "ok" and "allocation.json, at least" in row.expected


def test_fewer_zeros_than_planned_are_wrong_without_a_run_json_too(check, revive, run_dir, copied, rewrite):
    path = copied(run_dir)
    (path / "run.json").unlink()
    rows = check(Structure(), rewrite(path, {f"{DOWN}.weight": revive}))
    assert rows["zeros"].state == "fail"


@pytest.mark.parametrize("content", ["{}", "[]", '{"sparsity": {"zeros": "many"}}', '{"schema": 3}'])
def test_a_run_json_of_another_program_is_passed_over(check, content, run_dir, copied):
    path = copied(run_dir)
    (path / "run.json").write_text(content)
    row = check(Structure(), path)["zeros"]
    assert row.state == "ok" and "allocation.json" in row.expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"schema": "msp_plugin/run", "version": 2, "sparsi', "cannot read"),
        ('{"schema": "msp_plugin/run", "version": 99}', "has version 99, this package reads 1 and 2"),
        ('{"schema": "msp_plugin/run", "version": 2, "sparsity": 3}', "is damaged: sparsity"),
    ],
)
def test_a_damaged_run_json_and_a_newer_one_fail(check, content, words, run_dir, copied):
    path = copied(run_dir)
    (path / "run.json").write_text(content)
    row = check(Structure(), path)["structure"]
    assert row.state == "fail" and words in row.found and "->" in row.found


def test_without_an_allocation_the_layers_are_skipped_and_said_to_be(check, states, run_dir, copied):
    path = copied(run_dir)
    (path / "allocation.json").unlink()
    rows = check(Structure(), path)
    assert states(rows) == {"files": "skip", "tensors": "skip", "layers": "skip"}
    assert "no allocation.json" in rows["layers"].found


def test_a_flipped_bit_is_found_by_the_checksum(check, states, packed_dir, copied, rewrite):
    rows = check(
        Structure(),
        rewrite(
            copied(packed_dir), {"model.norm.weight": lambda t: t.view(torch.int16).add(1).view(t.dtype)}
        ),
    )
    assert states(rows) == {"files": "fail", "tensors": "ok", "layers": "ok", "zeros": "ok"}
    assert rows["files"].found == "model.safetensors has other bytes than were written (SHA-256)"


def test_tensors_that_are_not_those_of_the_export_are_named(check, packed_dir, copied, rewrite):
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


def test_an_allocation_of_another_model_fails_and_is_explained(check, run_dir, copied, edit_json):
    path = copied(run_dir)
    edit_json(path / "allocation.json", lambda data: data["units"][1]["layers"][0].update(name="model.other"))
    rows = check(Structure(), path)
    assert rows["structure"].state == "fail" and "is for another model" in rows["structure"].found


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_quantized_weights_are_counted_too(check, states, revive, dtype, run_dir, copied, rewrite):
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


def test_quantizing_may_round_weights_to_zero_but_not_fill_zeros_in(
    check, revive, run_dir, copied, rewrite, edit_json
):
    path = quantized(copied(run_dir), edit_json)

    def round_one(weight):
        weight[tuple((weight != 0).nonzero()[0])] = 0
        return weight

    row = check(Structure(), rewrite(path, {f"{DOWN}.weight": round_one}))["zeros"]
    assert row.state == "ok" and row.expected.endswith("(run.json, at least)")
    rows = check(Structure(), rewrite(path, {f"{DOWN}.weight": lambda t: revive(revive(t))}))
    assert rows["zeros"].state == rows["layers"].state == "fail"


def test_quantized_weights_in_a_form_of_their_own_are_skipped(
    check, states, run_dir, copied, rewrite, edit_json
):
    path = quantized(copied(run_dir), edit_json)
    rewrite(path, {f"{UP}.weight": None, f"{UP}.weight_packed": torch.zeros(128, 8, dtype=torch.int32)})
    rows = check(Structure(), path)
    assert states(rows) == {"files": "skip", "tensors": "skip", "layers": "skip"}
    assert "not read here" in rows["layers"].found


def test_a_nan_among_eight_bit_floats_is_found(check, run_dir, copied, rewrite):
    path = rewrite(
        copied(run_dir),
        {f"{DOWN}.weight": lambda t: torch.where(t == t.max(), float("nan"), t).to(torch.float8_e4m3fn)},
    )
    assert "not finite" in check(Structure(), path)[DOWN].found


def test_levels_inside_2_4_and_shares_are_held_to_their_pattern(check, states, make_run, tmp_path, rewrite):
    levels = ("3:8 in 2:4", "7/10", "2:4", "5:16 in 2:4", "1/3", "dense", "3:8 in 2:4", "0.9")
    path = make_run(tmp_path / "run", levels=levels)
    assert states(check(Structure(), path))["layers"] == "ok"
    gate, q, down = (
        f"model.layers.{leaf}" for leaf in ("1.mlp.gate_proj", "1.self_attn.q_proj", "1.mlp.down_proj")
    )

    def three_of_four(weight):
        weight[5, 8:16] = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0])
        return weight

    def one_more(weight):
        weight[3, (weight[3] == 0).nonzero()[0]] = 1.0
        return weight

    rows = check(
        Structure(),
        rewrite(path, {f"{gate}.weight": three_of_four, f"{q}.weight": one_more, f"{down}.weight": one_more}),
    )
    assert (rows[gate].found, rows[gate].expected) == ("keeps 3 of 4 in some aligned four", "3:8 in 2:4")
    assert (rows[q].found, rows[q].expected) == ("keeps 43 of 64 in some row", "1/3")
    assert (rows[down].found, rows[down].expected) == ("keeps 13 of 128 in some row", "9/10")
