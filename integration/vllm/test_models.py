"""Whole models inside vLLM: packed against dense, what is missing or damaged, two processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from tiny_models import DENSE_LAYER, flip_a_bit, save_adapter, save_models, without

from msp_plugin.serving.vllm.config import NAME


def run(jobs, directory, seconds):
    """Serve models in a process of their own; return answers, and the report's lines under ``report``."""
    asked, answered = directory / "jobs.json", directory / "results.json"
    asked.write_text(json.dumps(jobs))
    command = [sys.executable, tiny_models.__file__, str(asked), str(answered)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    results = json.loads(answered.read_text())
    for name, result in results.items():
        file = Path(f"{answered}.{name}")
        result["report"] = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )
    return results


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    save_models(directory)
    save_adapter(directory / "adapter")
    packed = directory / "llama-packed"
    without(packed, directory / "no-bitmask", f"{LAYER}.bitmask")
    without(packed, directory / "no-dense", f"{DENSE_LAYER}.weight")
    without(packed, directory / "no-dense-no-manifest", f"{DENSE_LAYER}.weight", keep_manifest=False)
    without(packed, directory / "no-norm", NORM, keep_manifest=False)
    without(directory / "llama", directory / "no-norm-dense", NORM)
    without(directory / "qwen2-packed", directory / "no-bias", BIAS, keep_manifest=False)
    shutil.copytree(packed, directory / "flipped")
    flip_a_bit(directory / "flipped" / "model.safetensors")
    without(
        directory / "llama-bitmask", directory / "no-offsets", f"{LAYER}.row_offsets", keep_manifest=False
    )
    without(directory / "llama", directory / "no-weight", f"{LAYER}.weight")
    return directory


LAYER = "model.layers.1.mlp.up_proj"
NORM = "model.layers.1.input_layernorm.weight"
BIAS = "model.layers.0.self_attn.k_proj.bias"


@pytest.fixture(scope="module")
def answers(models, tmp_path_factory):
    """Serve every model once."""
    lora = {"options": {"enable_lora": True, "max_lora_rank": 8}, "adapter": str(models / "adapter")}
    at_load = {"options": {"quantization": NAME}}
    jobs = {
        "llama": {},
        "llama-packed": {"reload": True},
        "llama-bitmask": {"reload": True},
        "llama-at-load": {"model": "llama", "reload": True, **at_load},
        "llama-lora": {"model": "llama", **lora},
        "llama-packed-lora": {"model": "llama-packed", **lora},
        "qwen2": {},
        "qwen2-packed": {},
        "qwen2-bitmask": {},
        "phi3": {},
        "phi3-packed": {},
        "phi3-bitmask": {},
        "no-bitmask": {},
        "no-dense": {},
        "no-dense-no-manifest": {},
        "no-weight": {**at_load},
        "no-norm": {},
        "no-norm-dense": {**at_load},
        "no-bias": {},
        "flipped": {},
        "made-up": {"model": "llama-packed", "options": {"load_format": "dummy"}},
        "made-up-bitmask": {"model": "llama-bitmask", "options": {"load_format": "dummy"}},
        "no-offsets": {},
    }
    for name, job in jobs.items():
        job["model"] = str(models / job.get("model", name))
        job["options"] = {"distributed_executor_backend": "uni", **job.get("options", {})}
    return run(jobs, tmp_path_factory.mktemp("answers"), 1800)


def answer(result):
    assert "error" not in result, result["error"]
    return result["tokens"], result["logprobs"]


@pytest.mark.parametrize("form", ["packed", "bitmask"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_a_packed_model_answers_as_the_dense_one_bit_for_bit(answers, name, form):
    assert answer(answers[f"{name}-{form}"]) == answer(answers[name])


def test_the_answers_are_worth_comparing(answers):
    for name in ("llama", "qwen2", "phi3"):
        assert len({token for tokens in answers[name]["tokens"] for token in tokens}) > 8


def test_a_dense_model_is_served_with_the_methods_name(answers):
    assert answer(answers["llama-at-load"]) == answer(answers["llama"])
    found = {line["layer"]: line["reason"] for line in answers["llama-at-load"]["report"]}
    assert found.pop(DENSE_LAYER) == "packing does not pay"
    assert set(found.values()) == {"MSP_CPU_KERNEL says so"} and len(found) == 7


@pytest.mark.parametrize("name", ["llama-packed", "llama-bitmask", "llama-at-load"])
def test_a_model_answers_the_same_after_its_weights_were_loaded_again(answers, name):
    assert answer(answers[name]["again"]) == answer(answers["llama"])


@pytest.mark.parametrize(
    ("name", "method"), [("llama-packed", NAME), ("llama-bitmask", "bitmask"), ("llama-at-load", NAME)]
)
def test_one_line_is_logged_when_all_layers_are_ready_and_one_when_they_were_loaded_again(
    answers, name, method
):
    assert [line.partition(";")[0] for line in answers[name]["log"]] == [f"{method}: 8 on dense"] * 2


def test_an_adapter_gives_the_same_answers_on_a_packed_model(answers):
    assert answer(answers["llama-packed-lora"]) == answer(answers["llama-lora"])
    assert answers["llama-lora"]["tokens"] != answers["llama"]["tokens"]


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_a_served_model_reports_every_linear_once(answers, name):
    layers = [line["layer"] for line in answers[f"{name}-packed"]["report"]]
    leaves = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert sorted(layers) == sorted(f"model.layers.{i}.{leaf}" for i in range(2) for leaf in leaves)
    assert len(answers[f"{name}-packed"]["log"]) == 1


def test_a_model_without_the_method_is_not_touched(answers):
    for name in ("llama", "qwen2", "phi3"):
        assert answers[name]["report"] == answers[name]["log"] == []


def test_a_missing_tensor_of_a_packed_layer_is_named_before_anything_is_loaded(answers):
    assert f"there is no {LAYER}.bitmask" in answers["no-bitmask"]["error"]
    assert f"there is no {LAYER}.row_offsets" in answers["no-offsets"]["error"]


def test_a_missing_dense_tensor_is_named_by_the_exports_manifest(answers):
    assert f"{DENSE_LAYER}.weight" in answers["no-dense"]["error"]


def test_a_missing_dense_linear_is_named_without_a_manifest_too(answers):
    assert f"{DENSE_LAYER}.weight" in answers["no-dense-no-manifest"]["error"]


def test_a_missing_tensor_of_a_dense_checkpoint_is_named(answers):
    assert f"{LAYER}.weight is not in the checkpoint" in answers["no-weight"]["error"]


@pytest.mark.parametrize("name", ["no-norm", "no-norm-dense"])
def test_a_missing_norm_is_named_as_for_an_unquantized_model(answers, name):
    assert NORM in answers[name]["error"]


def test_the_missing_bias_of_one_shard_is_named(answers):
    assert f"{BIAS} is not in the checkpoint" in answers["no-bias"]["error"]


def test_a_file_with_a_flipped_bit_is_refused(answers):
    assert "model.safetensors has other bytes than were written" in answers["flipped"]["error"]


@pytest.mark.parametrize("name", ["made-up", "made-up-bitmask"])
def test_a_packed_model_runs_with_weights_that_vllm_makes_up(answers, name):
    assert "error" not in answers[name], answers[name]["error"]


@pytest.mark.parametrize("form", ["packed", "bitmask"])
def test_two_tensor_parallel_processes_give_the_same_tokens(answers, models, form, tmp_path):
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    jobs = {"two": {"model": str(models / f"llama-{form}"), "options": options}}
    found = run(jobs, tmp_path, 600)["two"]
    assert answer(found)[0] == answers["llama"]["tokens"]
    assert sorted(line["rank"] for line in found["report"]) == [0] * 8 + [1] * 8
