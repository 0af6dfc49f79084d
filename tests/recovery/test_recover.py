"""Whole recoveries, through the command and from Python, on tiny runs."""

import gc
import json
import math
import platform
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import msp_plugin
from msp_plugin import Text
from msp_plugin.checkpoint.load import load
from msp_plugin.errors import ModelError, MSPError, OutputError, RecipeError, VerificationError
from msp_plugin.records.run import RunRecord
from msp_plugin.runs import recover as module
from msp_plugin.runs.prune import prune
from msp_plugin.runs.recover import recover

SMALL = ["--samples", "12", "--length", "24", "--test-samples", "4"]
QUICK = ["--set", "blockwise.epochs=1", "--set", "blockwise.rates=[0.06]"]


@pytest.fixture
def text(corpus):
    return Text(str(corpus), samples=12, length=24, test_samples=4)


def weights(path):
    return load_file(path / "model.safetensors")


def test_a_run_is_recovered_with_every_zero_and_all_its_files(msp, run_dir, llama_dir, corpus, tmp_path):
    out, run = tmp_path / "out", tmp_path / "run"
    shutil.copytree(run_dir, run)
    (run / "recipe.yaml").write_text("a: recipe\n")
    printed = msp(
        "recover", run, "--original", llama_dir, "--data", corpus, "--out", out, *SMALL, *QUICK, "--json"
    )
    record = json.loads(printed.out)
    assert record == json.loads((out / "run.json").read_text())
    before, after = weights(run), weights(out)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert weight.dtype == after[name].dtype == torch.bfloat16
        if "proj" in name:
            assert torch.equal(weight == 0, after[name] == 0), name
    for name in ("allocation.json", "recipe.yaml"):
        assert (out / name).read_bytes() == (run / name).read_bytes()
    assert (out / "tokenizer.json").exists()
    stages = {stage["name"]: stage for stage in record["stages"]}
    assert list(stages) == ["dense", "prune", "recover"]
    assert stages["recover"]["kl"] < stages["prune"]["kl"]
    assert record["kl"] == {"mixed": stages["prune"]["kl"], "recovered": stages["recover"]["kl"]}
    assert record["perplexity"]["recovered"] == stages["recover"]["perplexity"]
    work = stages["recover"]["recovery"]
    assert work["method"] == {"name": "blockwise", "blocks": 0, "epochs": 1, "rates": [0.06], "decay": 0.0}
    assert work["data"]["samples"] + work["holdout"]["samples"] == 12 and work["tokens"] > 0
    assert work["data"]["fingerprint"] != work["holdout"]["fingerprint"]
    assert work["curve"][0][0] == 0 and len(work["curve"]) >= 3
    assert RunRecord.beside(out).result_perplexity == record["perplexity"]["recovered"]
    assert record["model"]["dtype"] == "bfloat16" and record["python"] == platform.python_version()
    assert not list((tmp_path / "cache" / "recovery").iterdir())


def test_a_recovered_run_is_verified_exported_and_reported(msp, run_dir, llama_dir, corpus, tmp_path):
    out, packed, page = tmp_path / "out", tmp_path / "packed", tmp_path / "report.html"
    msp("recover", run_dir, "--original", llama_dir, "--data", corpus, "--out", out, *SMALL, *QUICK)
    record = RunRecord.beside(out)
    msp("verify", out)
    msp("export", out, "--to", "sparse24", "--out", packed)
    msp("verify", packed, "--original", out)
    card = (packed / "README.md").read_text()
    dense, before, after = (record.perplexity[name] for name in ("dense", "mixed", "recovered"))
    assert f"- `blockwise`: test perplexity {after:.3f}, before it {before:.3f}" in card
    assert f"every zero stayed; the dense model has {dense:.3f}." in card
    msp("report", out, "--out", page)
    text = page.read_text()
    share = (math.log(before) - math.log(after)) / (math.log(before) - math.log(dense))
    assert f"{100 * share:.1f} %" in text.replace("−", "-")
    for words in ("recover, blockwise", "Hold-out loss against tokens", "Weights rounded to zero"):
        assert words in text


def test_a_packed_run_gives_the_bytes_of_the_dense_one(msp, run_dir, packed_dir, llama_dir, corpus, tmp_path):
    for source in (run_dir, packed_dir):
        msp("recover", source, "--original", llama_dir, "--data", corpus, "--out", tmp_path / source.name,
            *SMALL, "--method", "weight_update")  # fmt: skip
    dense, packed = (weights(tmp_path / source.name) for source in (run_dir, packed_dir))
    assert dense.keys() == packed.keys()
    assert all(torch.equal(dense[name], packed[name]) for name in dense)
    assert "quantization_config" not in json.loads((tmp_path / packed_dir.name / "config.json").read_text())


def test_a_sparse_model_of_anyone_is_recovered_and_shown_beside_the_dense_one(
    msp, run_dir, llama_dir, corpus, tmp_path
):
    foreign = shutil.copytree(run_dir, tmp_path / "foreign")
    for name in ("allocation.json", "run.json"):
        (foreign / name).unlink()
    printed = msp(
        "recover",
        foreign,
        "--original",
        llama_dir,
        "--data",
        corpus,
        "--out",
        tmp_path / "out",
        *SMALL,
        *QUICK,
    )
    for word in ("dense", "result", "recovered", "The recovery takes back"):
        assert word in printed.out
    assert RunRecord.beside(tmp_path / "out").python == platform.python_version()
    assert not (tmp_path / "out" / "allocation.json").exists()
    assert set(RunRecord.beside(tmp_path / "out").perplexity) == {"dense", "result", "recovered"}


def test_prune_recovers_in_one_go_and_the_result_can_be_recovered_again(msp, llama_dir, corpus, tmp_path):
    out = tmp_path / "out"
    msp("prune", llama_dir, "-s", "0.5", "-m", "magnitude", "--allocator", "uniform", "--levels", "dense,2:4",
        "--data", corpus, "--out", out, *SMALL, "--recover", "blockwise", *QUICK)  # fmt: skip
    record = RunRecord.beside(out)
    assert [stage.name for stage in record.stages] == ["dense", "prune", "recover"]
    assert set(record.perplexity) == {"dense", "uniform", "mixed", "recovered"}
    assert record.kl["recovered"] < record.kl["mixed"]
    assert record.stages[-1].sparsity == 0.5
    model = load(out)
    assert all(
        int((model.get_submodule(name).weight == 0).sum()) > 0 for name in ("model.layers.0.mlp.up_proj",)
    )
    msp(
        "recover", out, "--original", llama_dir, "--data", corpus, "--out", tmp_path / "again", *SMALL, *QUICK
    )
    again = RunRecord.beside(tmp_path / "again")
    assert [stage.name for stage in again.stages] == ["dense", "prune", "recover", "recover"]
    assert again.kl["recovered"] < record.kl["recovered"]


def test_a_method_that_fills_zeros_in_leaves_no_file(with_recovery, run_dir, llama_dir, text, tmp_path):
    with_recovery(lambda inputs: inputs.model.get_submodule("model.layers.0.mlp.up_proj").weight.add_(1))
    with pytest.raises(
        VerificationError, match=r"recovery 'made', .* pruned weights of model.layers.0.mlp.up_proj"
    ):
        recover(
            run_dir, text, tmp_path / "out", original=llama_dir, method="made", cache=str(tmp_path / "cache")
        )
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_leaves_no_file(with_recovery, run_dir, llama_dir, text, tmp_path):
    def work(inputs):
        weight = inputs.model.get_submodule("model.layers.1.self_attn.o_proj").weight
        weight[weight != 0] = float("inf")

    with_recovery(work)
    with pytest.raises(VerificationError, match="o_proj holds weights that are not finite"):
        recover(
            run_dir, text, tmp_path / "out", original=llama_dir, method="made", cache=str(tmp_path / "cache")
        )


def test_weights_that_become_zero_are_counted_and_named(with_recovery, run_dir, text, tmp_path, caplog):
    layer = "model.layers.0.mlp.down_proj"

    def work(inputs):
        assert inputs.original is None and set(inputs.masks) == set(masks_of(inputs.model))
        weight = inputs.model.get_submodule(layer).weight
        first, second = weight.nonzero()[:2]
        weight[tuple(first)] = weight[tuple(second)] = 0

    with_recovery(work, needs_original=False)
    done = recover(run_dir, text, tmp_path / "out", method="made", cache=str(tmp_path / "cache"))
    assert done.record.stages[-1].recovery.rounded == {layer: 2}
    assert f"2 weights of 1 layers became zero by rounding, most in {layer}" in caplog.text
    assert done.record.stages[-1].recovery.notes == ("a note",)
    assert done.record.stages[-1].kl is None and done.record.perplexity["recovered"] > 1


def masks_of(model):
    return [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in name]


def change_tokenizer(path):
    file = path / "tokenizer.json"
    file.write_text(file.read_text().replace('"Ġ', '"Ƣ'))


BAD = {
    "dense run": (lambda run, dense: {"run": dense}, "the model is dense, there is nothing to keep"),
    "no original": (lambda run, dense: {"original": None}, "needs the dense model"),
    "a loss without targets": (
        lambda run, dense: {"original": None, "method": "full", "set": "full.kl_weight=0.5"},
        "needs the dense model",
    ),
    "the run as its own original": (lambda run, dense: {"original": run}, "has all the zeros of the model"),
    "another model": (lambda run, dense: {"original": "demo:qwen2"}, "is not the original of"),
    "another tokenizer": (lambda run, dense: change_tokenizer(dense), "another tokenizer"),
    "no text": (lambda run, dense: {"data": "nowhere.txt"}, "nowhere.txt"),
    "too little text": (lambda run, dense: {"samples": "2000"}, "needed: 2004"),
    "one sample": (lambda run, dense: {"samples": "1"}, "one to learn from and another to judge"),
    "unknown method": (lambda run, dense: {"method": "blokwise"}, "did you mean 'blockwise'?"),
    "unknown option": (lambda run, dense: {"set": "blockwise.epoch=2"}, "did you mean 'epochs'?"),
    "another method's option": (
        lambda run, dense: {"set": "weight_update.damping=2"},
        "no such role 'weight_update'",
    ),
    "wrong option": (lambda run, dense: {"set": "blockwise.epochs=many"}, "epochs = 'many'"),
    "run.json of a newer version": (
        lambda run, dense: (
            (run / "run.json").write_text('{"schema": "msp_plugin/run", "version": 99}') and None
        ),
        "run.json has version 99, this package reads 1 and 2 -> update msp_plugin",
    ),
    "damaged run.json": (
        lambda run, dense: (run / "run.json").write_text('{"schema": "msp_plugin/run",') and None,
        "run.json as JSON",
    ),
    "allocation of another model": (
        lambda run, dense: shutil.copyfile(run / "config.json", run / "allocation.json") and None,
        "allocation.json",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work(case, msp, run_dir, llama_dir, corpus, tmp_path):
    run, dense = shutil.copytree(run_dir, tmp_path / "run"), shutil.copytree(llama_dir, tmp_path / "dense")
    change, words = BAD[case]
    given = {"original": dense, "data": corpus, "samples": "12", "length": "24", "test-samples": "4"}
    given |= {"out": tmp_path / "out"} | (change(run, dense) or {})
    command = ["recover", given.pop("run", run)]
    printed = msp(*command, *(x for k, v in given.items() if v is not None for x in (f"--{k}", v)), code=2)
    assert words in " ".join(printed.err.split())
    assert "recovery:" not in printed.err
    assert not (tmp_path / "out").exists()


def test_an_original_of_other_shapes_names_the_parameter(run_dir, llama_dir, text, tmp_path):
    dense = shutil.copytree(llama_dir, tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = torch.ones(32, 64)
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] = torch.ones(64, 32)
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "head_dim": 8}))
    for layer in (0, 1):
        for name in ("k_proj", "v_proj"):
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = torch.ones(16, 64)
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        MSPError, match=r"is not the original of this model: model.layers.0.self_attn.\w+.weight is \("
    ):
        recover(run_dir, text, tmp_path / "out", original=dense, cache=str(tmp_path / "cache"))


def test_a_quantised_run_is_refused_with_advice(run_dir, llama_dir, text, edit_json, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "run")
    edit_json(
        run / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4})
    )
    with pytest.raises(MSPError, match=r"is quantized \(gptq, 4 bits\)\n.*quantize the result"):
        recover(run, text, tmp_path / "out", original=llama_dir)


def test_an_output_that_exists_and_a_full_disk_are_refused(run_dir, llama_dir, text, tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="is not empty"):
        recover(run_dir, text, run_dir, original=llama_dir)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="the recovered model takes 0.00 GiB"):
        recover(run_dir, text, tmp_path / "out", original=llama_dir)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["blockwise", "full"])
def test_a_disk_that_fills_meanwhile_is_named_and_the_same_command_goes_on(
    method, run_dir, llama_dir, corpus, tmp_path
):
    options = ["full.tokens=800", "full.step_tokens=96"] if method == "full" else QUICK[1::2]
    command = [sys.executable, "-m", "msp_plugin", "recover", run_dir, "--original", llama_dir, "--data", corpus, *SMALL,
               "--method", method, *(part for option in options for part in ("--set", option)), "--cache", tmp_path / "cache",
               "--out", tmp_path / "out"]  # fmt: skip

    def little_room():  # no file may have more, as where a disk is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, resource.RLIM_INFINITY))

    failed = subprocess.run(list(map(str, command)), capture_output=True, text=True, preexec_fn=little_room)
    assert failed.returncode and "cannot write" in failed.stderr and "Traceback" not in failed.stderr
    assert str(tmp_path / "cache" / "recovery") in failed.stderr and not (tmp_path / "out").exists()
    assert subprocess.run(list(map(str, command)), capture_output=True).returncode == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_failed_save_keeps_the_recovered_model(with_recovery, run_dir, text, tmp_path, monkeypatch):
    with_recovery(lambda inputs: None, needs_original=False)

    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "copy_processor", broken)
    with pytest.raises(OutputError, match="the pruned model is kept in") as failed:
        recover(run_dir, text, tmp_path / "out", method="made", cache=str(tmp_path / "cache"))
    kept = tmp_path / "out.unsaved"
    assert str(kept) in str(failed.value) and (kept / "run.json").exists()


def test_a_start_from_sensitivities_needs_a_run_that_measures_them(tmp_path, run_dir, text):
    method = {"name": "masked_lora", "layers": "ist", "ist_start": "sensitivity", "kl_weight": 0}
    for allocator, error, message in (
        ("uniform", RecipeError, "the run has measured none"), ("search", ModelError, "no_such"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            prune(
                tmp_path / "no_such",
                "no text",
                tmp_path / "out",
                recover=method,
                sparsity=0.5,
                allocator=allocator,
            )
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    (run / "allocation.json").unlink()
    with pytest.raises(RecipeError, match="the run has measured none"):
        recover(run, text, tmp_path / "out", method=method, cache=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "recovery").glob("*"))


def test_recover_is_a_public_name():
    assert msp_plugin.recover is recover


def test_models_on_disk_give_the_bytes_of_models_in_memory(msp, run_dir, llama_dir, corpus, tmp_path):
    records = []
    for name, offload in (("memory", []), ("disk", ["--offload"])):
        msp("recover", run_dir, "--original", llama_dir, "--data", corpus, "--out", tmp_path / name, *SMALL, *QUICK,
            "--fresh", *offload)  # fmt: skip
        records.append(json.loads((tmp_path / name / "run.json").read_text()))
    assert (tmp_path / "memory" / "model.safetensors").read_bytes() == (
        tmp_path / "disk" / "model.safetensors"
    ).read_bytes()
    assert records[0]["perplexity"] == records[1]["perplexity"] and records[0]["kl"] == records[1]["kl"]
    gc.collect()
    assert not list((tmp_path / "cache").glob("*/*"))


@pytest.mark.slow
def test_a_model_that_was_pruned_on_disk_is_recovered_there(msp, llama_dir, corpus, tmp_path):
    for name, offload in (("memory", []), ("disk", ["--offload"])):
        msp("prune", llama_dir, "-s", "0.5", "--levels", "2:4", "--allocator", "uniform", "-m", "wanda", "--data", corpus,
            *SMALL, "--recover", "blockwise", *QUICK, "--cache", tmp_path / name, "--out", tmp_path / f"out-{name}",
            *offload)  # fmt: skip
    files = [(tmp_path / f"out-{name}" / "model.safetensors").read_bytes() for name in ("memory", "disk")]
    assert files[0] == files[1]
