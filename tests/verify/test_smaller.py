"""The checks of a smaller model: each passes where it should, and each finds what only it can find."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import Dense, export_checkpoint
from msp_plugin.checkpoint.load import load
from msp_plugin.checkpoint.manifest import Manifest, describe_files
from msp_plugin.checkpoint.smaller import Small, Uniform
from msp_plugin.errors import RecipeError
from msp_plugin.records.run import RunRecord, StageRecord
from msp_plugin.verify.base import Subject, run_checks
from msp_plugin.verify.logits import Logits
from msp_plugin.verify.quality import Quality
from msp_plugin.verify.round_trip import RoundTrip
from msp_plugin.verify.structure import Structure

NORM, GATE = "model.norm.weight", "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def pair(tmp_path):
    """A model with a silent head in each block and a silent block, and its smaller form."""

    def pair(exporter):
        torch.manual_seed(5)
        sizes = {
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "head_dim": 8,
        }
        config = MistralConfig(
            **sizes, num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=64, sliding_window=None,
            initializer_range=0.2,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for block in model.model.layers:
                block.self_attn.o_proj.weight[:, 16:32] = 0
            model.model.layers[1].self_attn.o_proj.weight.zero_()
            model.model.layers[1].mlp.down_proj.weight.zero_()
        model.save_pretrained(tmp_path / "whole")
        export_checkpoint(tmp_path / "whole", exporter, tmp_path / "small")
        return tmp_path / "small", tmp_path / "whole"

    return pair


def rewritten(path, change):
    """Change the tensors of an export and its checksums, as a faulty exporter would."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    manifest = Manifest.read(path)
    files = {**manifest.files, **describe_files([path / "model.safetensors"])}
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    data = json.loads((path / "export.json").read_text())
    (path / "export.json").write_text(json.dumps({**data, "files": files, "tensors": shapes}))


@pytest.mark.parametrize("exporter", [Small(), Uniform()])
def test_both_forms_pass_every_check(exporter, pair, check, states, make_samples):
    path, whole = pair(exporter)
    assert states(check(Structure(), path)) == {
        "files": "ok", "tensors": "ok", "widths": "ok", "layers": "skip",
    }  # fmt: skip
    rows = check(RoundTrip(), path, whole)
    assert rows["reference"].state == "ok" and "bit for bit" in rows["reference"].found
    assert rows["left out"].state == "ok" and rows["left out"].found == "29 KV heads and channels"
    rows = check(Logits(), path, whole)
    assert states(rows) == {"logits": "ok", "greedy tokens": "ok"}
    assert rows["logits"].details["difference"] < 1e-5
    rows = check(Quality(), path, whole, text=make_samples(2, 16))
    assert rows["reference"].state == "ok" and abs(rows["reference"].details["kl"]) < 1e-6


def test_a_changed_bit_is_found_by_the_slices(pair, check):
    path, whole = pair(Small())
    rewritten(path, lambda tensors: tensors[GATE].view(torch.int32)[0, 0].bitwise_xor_(1))
    rows = check(RoundTrip(), path, whole)
    assert rows["reference"].state == "fail" and GATE in rows["reference"].found


def test_a_missing_tensor_is_found_by_widths_and_slices(pair, check):
    path, whole = pair(Small())
    rewritten(path, lambda tensors: tensors.pop(NORM))
    assert check(Structure(), path)["widths"].state == "fail"
    assert "1 missing" in check(RoundTrip(), path, whole)["reference"].found


def test_a_head_that_was_heard_is_found_in_the_reference(pair, check, rewrite):
    path, whole = pair(Small())

    def heard(weight):
        weight[3, 17] = 0.5
        return weight

    rewrite(whole, {"model.layers.2.self_attn.o_proj.weight": heard})
    row = check(RoundTrip(), path, whole)["left out"]
    assert row.state == "fail" and "model.layers.2.self_attn" in row.expected
    assert check(Logits(), path, whole)["logits"].state == "fail"


def test_other_logits_are_found(pair, check):
    path, whole = pair(Uniform())
    rewritten(path, lambda tensors: tensors[NORM].mul_(1.001))
    rows = check(Logits(tolerance=1e-3), path, whole)
    assert rows["logits"].state == "ok" or rows["logits"].details["difference"] > 1e-3
    assert check(Logits(), path, whole)["logits"].state == "fail"


def test_logits_that_are_no_numbers_fail_and_their_json_is_json(pair, rewrite):
    path, whole = pair(Small())
    rewrite(path, {NORM: lambda t: t * torch.nan})
    subject = Subject(Checkpoint.open(path), Checkpoint.open(whole))
    (result,) = run_checks(subject, [Logits()])
    assert not result.passed
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(text)["findings"][0]["details"] == {"difference": None}


def test_a_reference_of_another_shape_is_named(pair, check, llama_dir):
    path, _ = pair(Small())
    row = check(RoundTrip(), path, llama_dir)["round_trip"]
    assert row.state == "fail" and "another model" in row.found


def test_logits_of_another_form_are_left_to_its_bits(check, packed_dir, run_dir):
    assert check(Logits(), packed_dir, run_dir)["logits"].state == "skip"


@pytest.mark.parametrize("options", [{"samples": 0}, {"tokens": 0}, {"tolerance": 0.0}])
def test_options_that_check_nothing_are_refused(options):
    with pytest.raises(RecipeError, match="logits: "):
        Logits(**options)


def test_tensors_that_are_stored_twice_or_ignored_pass_and_others_do_not(
    qwen2, check, copied, rewrite, tmp_path
):
    qwen2.config.tie_word_embeddings = True
    qwen2.tie_weights()
    with torch.no_grad():
        qwen2.model.layers[0].self_attn.o_proj.weight.zero_()
    qwen2.save_pretrained(tmp_path / "zeros")
    head = load_file(tmp_path / "zeros" / "model.safetensors")["model.embed_tokens.weight"]
    extra = {"lm_head.weight": head, "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    rewrite(tmp_path / "zeros", extra)
    export_checkpoint(tmp_path / "zeros", Small(), tmp_path / "small")
    assert check(Structure(), tmp_path / "small")["widths"].state == "ok"
    for name, change in {
        "lm_head.weight": lambda t: t[:5],
        "model.layers.0.self_attn.o_proj.weight": head,
    }.items():
        wrong = rewrite(copied(tmp_path / "small", name), {name: change})
        row = check(Structure(), wrong)["widths"]
        assert row.state == "fail" and name in row.found


def test_a_smaller_model_without_export_json_keeps_its_checks_and_its_card(pair, check, states, tmp_path):
    small, whole = pair(Small())
    load(small).save_pretrained(tmp_path / "saved")  # as a recovery writes it
    rows = check(Structure(), tmp_path / "saved")
    assert rows["files"].state == "skip" and rows["widths"].state == "ok"
    assert states(check(Logits(), tmp_path / "saved", whole)) == {"logits": "ok", "greedy tokens": "ok"}
    row = check(RoundTrip(), tmp_path / "saved", whole)["round_trip"]
    assert row.state == "fail" and "no export.json" in row.found
    export_checkpoint(tmp_path / "saved", Dense(), tmp_path / "dense")
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "msp_plugin.load" in card and "AutoModelForCausalLM" not in card and "`config.json` says" in card


def test_a_smaller_model_that_was_recovered_is_not_held_to_the_same_logits(pair, check):
    path, whole = pair(Small())
    RunRecord(stages=(StageRecord(name="recover"),)).write(path / "run.json")
    row = check(Logits(), path, whole)["logits"]
    assert row.state == "skip" and "compare with quality" in row.found
