"""``msp export`` and ``msp verify`` in one process."""

import json
import sys

import pytest
import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.manifest import Manifest

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The cat sat on the mat, and the dog sat on the log.\n" * 200)
    return path


def states(printed):
    """The states of all findings by check and item, from --json."""
    return {r["check"]: {f["item"]: f["state"] for f in r["findings"]} for r in json.loads(printed.out)}


def explained(printed, *words):
    assert printed.err.startswith("error: ") and "Traceback" not in printed.err and printed.out == ""
    for word in words:
        assert word in printed.err
    return True


# msp export


@pytest.mark.parametrize("to", ["sparse24", "bitmask", "dense", "recipe"])
def test_export_json_is_what_the_directory_holds(to, msp, run_dir, tmp_path):
    out = tmp_path / "out"
    record = json.loads(msp("export", run_dir, "--to", to, "--out", out, "--json").out)
    manifest = Manifest.read(out)
    assert manifest.differences(out) == []
    assert record == {
        "path": str(out), "format": to, "files": manifest.files, "packed": manifest.packed,
        "kept_dense": manifest.kept_dense, "packed_bytes": manifest.packed_bytes,
        "dense_bytes": manifest.dense_bytes, "negative_zeros": {}, "structure": {},
        "quantization_errors": {}, "rounded_to_zero": {},
    }  # fmt: skip
    assert len(record["packed"]) == {"sparse24": 9, "bitmask": 11}.get(to, 0)


def test_an_export_in_int8_says_by_how_much_each_layer_changed(msp, run_dir, tmp_path):
    printed = msp("export", run_dir, "--to", "bitmask", "--set", "values=int8", "--out", tmp_path / "out")
    manifest = Manifest.read(tmp_path / "out")
    assert printed.out.count("\nint8: ") == len(manifest.packed) == 14
    assert f"int8: {UP}: changed by {manifest.quantization_errors[UP]:.4f} of its norm" in printed.out


def test_export_says_what_was_packed_and_why_the_rest_was_not(msp, run_dir, copied, rewrite, tmp_path):
    path = rewrite(copied(run_dir), {f"{UP}.weight": lambda t: torch.where(t == 0, -0.0, t)})
    printed = msp("export", path, "--to", "sparse24", "--out", tmp_path / "out")
    manifest = Manifest.read(tmp_path / "out")
    assert (
        f"9 layers packed: {manifest.packed_bytes:,} bytes, 0.5625 of {manifest.dense_bytes:,} dense"
        in printed.out
    )
    assert "dense: model.layers.0.self_attn.o_proj: level 3:8 does not run on 2:4 kernels" in printed.out
    assert printed.out.count("\ndense: ") == 5 and "6,144 negative zeros became positive" in printed.out
    total = sum(p.stat().st_size for p in (tmp_path / "out").iterdir() if p.name in manifest.files)
    assert f"(4 files, {total:,} bytes)" in printed.out
    assert f"export sparse24: {len(manifest.tensors)}" in printed.err


def test_options_of_the_exporter_reach_it(msp, run_dir, tmp_path):
    msp("export", run_dir, "--to", "dense", "--out", tmp_path / "out", "--set", "shard_bytes=50000")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("to", "options", "words"),
    [
        ("sparse42", (), ["no exporter called 'sparse42'", "did you mean 'sparse24'"]),
        ("sparse24", ("--set", "shard_byte=3"), ["has no option 'shard_byte'", "did you mean 'shard_bytes'"]),
        ("sparse24", ("--set", "shard_bytes=many"), ["option shard_bytes = 'many'"]),
        ("sparse24", ("--set", "shard_bytes=0"), ["shard_bytes = 0"]),
        ("sparse24", ("--set", "shard_bytes"), ["is not ROLE.OPTION=VALUE"]),
        ("recipe", ("--set", "shard_bytes=5"), ["has no option 'shard_bytes'"]),
    ],
)  # fmt: skip
def test_bad_options_of_export_are_explained_and_nothing_is_written(
    to, options, words, msp, run_dir, tmp_path
):
    printed = msp("export", run_dir, "--to", to, "--out", tmp_path / "out", *options, code=2)
    assert explained(printed, *words) and not (tmp_path / "out").exists()


def test_a_directory_that_is_no_checkpoint_is_bad_input(msp, tmp_path):
    printed = msp("export", tmp_path / "nothing", "--to", "dense", "--out", tmp_path / "out", code=2)
    assert explained(printed, "has no config.json", "`msp prune` or `msp export`")


def test_an_output_with_something_in_it_is_bad_input(msp, run_dir, packed_dir):
    before = {p.name: p.stat().st_mtime_ns for p in packed_dir.iterdir()}
    assert explained(msp("export", run_dir, "--to", "dense", "--out", packed_dir, code=2), "is not empty")
    assert before == {p.name: p.stat().st_mtime_ns for p in packed_dir.iterdir()}


def test_an_export_that_cannot_be_made_fails_and_leaves_nothing(
    msp, packed_dir, run_dir, copied, rewrite, tmp_path
):
    out = tmp_path / "out"
    printed = msp("export", packed_dir, "--to", "sparse24", "--out", out, "--json", code=1)
    assert explained(printed, "is packed already")
    path = rewrite(copied(run_dir), {f"{UP}.weight": lambda t: t + 1})
    printed = msp("export", path, "--to", "sparse24", "--out", out, code=1)
    assert f"error: {UP} is not 2:4" in printed.err and "Traceback" not in printed.err
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_export_needs_no_llm_compressor(msp, run_dir, tmp_path, monkeypatch):
    for name in ("llmcompressor", "compressed_tensors", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)  # whoever imports it gets an ImportError
    printed = msp("export", run_dir, "--to", "sparse24", "--out", tmp_path / "out").out
    assert "9 layers packed" in printed and len(Checkpoint.open(tmp_path / "out").packed) == 9


def test_a_smaller_model_is_exported_and_verified(msp, llama, tmp_path):
    with torch.no_grad():
        llama.model.layers[0].self_attn.o_proj.weight.zero_()
        llama.model.layers[1].mlp.down_proj.weight[:, 10:] = 0
    llama.save_pretrained(tmp_path / "zeros")
    forms = msp("export", tmp_path / "zeros", "--forms").out
    assert "small: " in forms and "bytes" in forms.partition("small: ")[2].splitlines()[0]
    refused = " ".join(forms.partition("uniform: ")[2].split())
    assert "is not equally wide in all blocks" in refused and "-> write it with" in refused
    printed = msp("export", tmp_path / "zeros", "--to", "small", "--out", tmp_path / "small")
    assert "1 of 4 attentions and MLPs dropped, 1 narrower" in printed.out
    checks = ("--check", "structure", "--check", "round_trip", "--check", "logits")
    found = states(msp("verify", tmp_path / "small", "--reference", tmp_path / "zeros", "--json", *checks))
    assert found["structure"]["widths"] == "ok"
    assert found["round_trip"]["reference"] == found["round_trip"]["left out"] == "ok"
    assert found["logits"] == {"logits": "ok", "greedy tokens": "ok"}


def test_forms_as_json_say_bytes_or_a_reason(msp, run_dir):
    forms = json.loads(msp("export", run_dir, "--forms", "--json").out)
    assert sorted(forms) == ["bitmask", "dense", "recipe", "small", "sparse24", "uniform"]
    assert "nothing can be left out" in forms["small"]["refused"] and forms["small"]["bytes"] is None
    assert forms["small"]["hint"] and forms["sparse24"]["hint"] is forms["sparse24"]["refused"] is None
    assert forms["sparse24"]["bytes"] < forms["dense"]["bytes"]


def test_an_export_without_a_form_is_refused(msp, run_dir, tmp_path):
    assert explained(
        msp("export", run_dir, "--out", tmp_path / "out", code=2), "give --to and --out, or --forms"
    )


# msp verify


def test_verify_passes_and_its_json_holds_every_check(msp, packed_dir, run_dir, llama_dir, text_file):
    printed = msp(
        "verify", packed_dir, "--reference", run_dir, "--original", llama_dir, "--data", text_file,
        "--samples", "4", "--length", "32", "--json",
    )  # fmt: skip
    assert states(printed) == {
        "structure": dict.fromkeys(["files", "tensors", "layers", "zeros"], "ok"),
        "round_trip": {"pack and unpack": "ok", "reference": "ok", "tokenizer": "ok"},
        "logits": {"logits": "skip"},
        "quality": {"perplexity": "skip", "reference": "ok", "original": "skip"},
        "served": {"served": "skip"},
    }  # fmt: skip
    checks = ["structure", "round_trip", "logits", "quality", "served"]
    assert [r["check"] for r in json.loads(printed.out)] == checks
    assert "perplexity: " not in printed.err  # no progress of ours


def test_verify_without_anything_to_hold_against_says_what_was_not_checked(msp, packed_dir):
    printed = msp("verify", packed_dir)
    assert "passed (not checked: logits, quality, served)" in printed.out
    for words in (
        "data (test text)",
        "vllm (an environment",
        "give a reference",
        "14 of 14 layers hold their level",
    ):
        assert words in " ".join(printed.out.replace("│", " ").split())


def test_a_failed_check_is_exit_code_1_in_both_outputs(msp, packed_dir, copied, rewrite):
    path = rewrite(copied(packed_dir), {"model.norm.weight": lambda t: t + 1})
    printed = msp("verify", path, "--json", code=1)
    found = states(printed)
    assert found["structure"]["files"] == "fail" and found["round_trip"]["pack and unpack"] == "ok"
    assert {r["check"]: r["passed"] for r in json.loads(printed.out)} == {
        "structure": False, "round_trip": True, "logits": True, "quality": True, "served": True,
    }  # fmt: skip
    printed = msp("verify", path, code=1)
    assert "failed: structure" in printed.out and "FAIL" in printed.out


def test_a_damaged_checkpoint_that_cannot_be_opened_is_exit_code_1(msp, packed_dir, copied):
    path = copied(packed_dir)
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-1])
    assert explained(msp("verify", path, "--json", code=1), "is not a complete safetensors file")


def test_only_the_checks_that_are_named_run_once_each_and_in_order(msp, packed_dir):
    asked = ("--check", "round_trip", "--check", "structure", "--check", "round_trip")
    for options, expected in ((asked, ["structure", "round_trip"]), (asked[:2], ["round_trip"])):
        printed = msp("verify", packed_dir, "--json", *options)
        assert [result["check"] for result in json.loads(printed.out)] == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--check", "structur"), ["no check called 'structur'", "did you mean 'structure'"]),
        (("--check", "quality"), ["check 'quality' needs data (test text)"]),
        (("--check", "structure", "--check", "served"), ["check 'served' needs vllm (an environment"]),
        (("--set", "quality.max_k=1"), ["has no option 'max_k'", "did you mean 'max_kl'"]),
        (("--set", "qualty.max_kl=1"), ["no such role 'qualty'", "did you mean 'quality'"]),
        (("--check", "structure", "--set", "quality.max_kl=1"), ["no such role 'quality'"]),
        (("--set", "quality.max_kl=-1"), ["max_kl = -1"]),
        (("--set", "quality.max_kl=little"), ["option max_kl = 'little'"]),
        (("--set", "served.prompts=99"), ["prompts = 99"]),
        (("--vllm", "/nowhere/venv"), ["no vllm executable in /nowhere/venv"]),
        (("--reference", "/nowhere/run"), ["/nowhere/run has no config.json"]),
        (("--data", "/nowhere/text.txt"), ["no data file at /nowhere/text.txt"]),
        (("--original", "demo:lama"), ["no demo model 'lama'"]),
        (("--original", "", "--data", "demo:test"), ["the argument after --original is blank"]),
        (("--data", " "), ["the argument after --data is blank"]),
        (("--reference=",), ["--reference is blank"]),
    ],
)  # fmt: skip
def test_bad_input_of_verify_is_explained_before_anything_is_checked(
    options, words, msp, packed_dir, monkeypatch
):
    from msp_plugin.verify import base

    monkeypatch.setattr(base, "run_checks", lambda *args: pytest.fail("a check was run"))
    assert explained(msp("verify", packed_dir, *options, "--json", code=2), *words)


def test_a_text_too_short_is_bad_input(msp, packed_dir, tmp_path):
    (tmp_path / "short.txt").write_text("cat")
    printed = msp("verify", packed_dir, "--data", tmp_path / "short.txt", "--length", "64", code=2)
    assert explained(printed, "short.txt")


def test_options_of_a_check_reach_it(msp, packed_dir, llama_dir, text_file):
    given = (
        "--original",
        llama_dir,
        "--data",
        text_file,
        "--samples",
        "2",
        "--length",
        "16",
        "--check",
        "quality",
    )
    assert states(msp("verify", packed_dir, "--json", *given))["quality"]["original"] == "skip"
    failed = msp("verify", packed_dir, "--json", *given, "--set", "quality.max_kl=0.000001", code=1)
    assert states(failed)["quality"] == {"perplexity": "skip", "original": "fail"}


def test_an_original_of_another_vocabulary_fails_and_is_explained(msp, packed_dir, text_file):
    given = ("--data", text_file, "--samples", "2", "--length", "16", "--check", "quality", "--json")
    printed = msp("verify", packed_dir, "--original", "demo:llama", *given, code=1)
    ((finding,),) = [result["findings"] for result in json.loads(printed.out)]
    assert "has a vocabulary of 2,048, the checkpoint one of 128" in finding["found"]


def test_the_table_survives_markup_in_what_it_shows(msp, run_dir, copied, edit_json):
    path = copied(run_dir, "copy[bold]")
    edit_json(
        path / "allocation.json", lambda data: data["units"][1]["layers"][0].update(name="model.[red]x[/red]")
    )
    printed = msp("verify", path, "--check", "structure", code=1)
    shown = printed.out.replace("\n", "").replace("│", "").replace(" ", "")
    assert "[red]x[/red]" in shown and f"Verificationof{path}" in shown


def test_the_results_of_an_export_survive_markup_too(msp, run_dir, tmp_path):
    printed = msp("export", run_dir, "--to", "dense", "--out", tmp_path / "out[bold]")
    assert f"Results: {tmp_path / 'out[bold]'} (" in printed.out


def test_sensitivities_of_a_packed_checkpoint_are_those_of_the_dense_one(msp, packed_dir, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat, and the dog sat on the log\n" * 200)
    model_dir = tmp_path / "dense"
    msp("export", packed_dir, "--to", "dense", "--out", model_dir)
    asked = ["--data", tmp_path / "text.txt", "--samples", "2", "--length", "24", "--json"]
    assert msp("sensitivity", packed_dir, *asked).out == msp("sensitivity", model_dir, *asked).out
