"""``--offload``: commands on models whose weights stay on disk."""

import errno
import gc
import importlib.util
import json
import types
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from msp_plugin.errors import ModelError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.models.load import load_model
from msp_plugin.runs import steps
from msp_plugin.runtime import disk as writing
from tests.helpers import models
from tests.helpers.commands import SEARCH

SMALL = ["--samples", "6", "--length", "32", "--dtype", "float32"]


@pytest.fixture(scope="module")
def half(tmp_path_factory, tokenizer):
    """A tiny model in bfloat16, so that float32 weights cannot be read from the checkpoint as they are."""
    path = tmp_path_factory.mktemp("models") / "half"
    models.qwen2().bfloat16().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_pruned_model_is_that_of_a_run_in_memory(msp, half, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("msp_plugin.hosts.builtin.SHARD_BYTES", 100_000)
    # A search of offloaded weights: tests/search/test_offloaded.py.
    what = ["prune", half, "-s", "0.75", "--method", "wanda", "--allocator", "knapsack", "--no-baseline",
            "--set", "allocator.surrogate=output"]  # fmt: skip
    found = []
    for name, offload in (("memory", []), ("disk", ["--offload"])):
        out = tmp_path / name
        more = [*SMALL, "--test-samples", "4", "--data", text_file, "--out", out, "--fresh", *offload]
        msp(*what, *more)
        record = json.loads((out / "run.json").read_text())
        found.append(
            (
                {file.name: file.read_bytes() for file in out.glob("*.safetensors")},
                (out / "allocation.json").read_bytes(),
                record["perplexity"],
            )
        )
    assert found[0] == found[1] and len(found[0][0]) > 1
    tensors = load_model(tmp_path / "disk").state_dict()
    assert all(not tensor.is_meta and tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_no_weight_of_a_layer_is_in_memory_after_loading(half, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("MSP_CACHE", str(tmp_path / "cache"))
    model = load_model(half, dtype, offload=True)
    for layer in prunable_layers(model).layers:
        assert model.get_submodule(layer.name).weight.is_meta
    del model
    gc.collect()
    assert list((tmp_path / "cache" / "offload").iterdir()) == []


def test_sensitivities_are_those_in_memory(msp, half, text_file):
    arguments = ["sensitivity", half, *SMALL, "--data", text_file, "--set", "estimator.samples=2", "--json"]
    assert msp(*arguments).out == msp(*arguments, "--offload").out


def test_weights_that_are_not_finite_have_no_sensitivity(msp, llama, tokenizer, text_file, tmp_path):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    llama.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    asked = ["--estimator", "heavy_tail", "--data", text_file, *SMALL]
    said = msp("sensitivity", tmp_path / "nan", *asked, code=1).err
    assert "model.layers.1.mlp.up_proj" in said and "not finite" in said


@pytest.mark.slow
@pytest.mark.parametrize(("prune", "allocators"), [(["--no-prune"], "uniform"), ([], "uniform,search")])
def test_a_comparison_is_that_in_memory(prune, allocators, msp, half, text_file, tmp_path):
    search = [option.replace("allocator.", "search.") for option in SEARCH] if "search" in allocators else []
    small = [*search, "--test-samples", "4", *SMALL, "--samples", "16", *prune]
    found = []
    for name, offload in (("memory", []), ("disk", ["--offload"])):
        msp("compare", half, "--methods", "wanda", "--allocators", allocators, "--data", text_file, *small,
            "--cache", tmp_path / f"{name} cache", "--out", tmp_path / name, *offload)  # fmt: skip
        record = json.loads((tmp_path / name / "compare.json").read_text())
        for row in record["rows"]:
            del row["seconds"], row["total_seconds"]
        found.append(record)
    assert found[0] == found[1] and not any(row["error"] for row in found[0]["rows"])
    assert all((row["kl"] == row["database"]["kl"]) == bool(prune) for row in found[0]["rows"])
    gc.collect()
    assert not list(tmp_path.glob("cache/offload/*"))


def test_a_packed_checkpoint_is_refused(msp, packed_dir, text_file, tmp_path):
    ran = msp(
        "allocate", packed_dir, "-s", "0.5", "--method", "magnitude", "--data", text_file, *SMALL, "--out",
        tmp_path / "a.json", "--offload", code=2,
    )  # fmt: skip
    assert "is packed, and only dense checkpoints can stay on disk" in ran.err and "--to dense" in ran.err


@pytest.mark.slow
def test_a_quantized_model_is_measured_with_the_weights_that_are_saved(msp, half, text_file, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "quant_stage:\n  quant_modifiers:\n    QuantizationModifier:\n"
        "      {targets: [Linear], scheme: W8A8, ignore: [lm_head]}\n"
    )
    found = {}
    for name, offload in (("memory", []), ("disk", ["--offload"])):
        out = tmp_path / name
        msp("run", tmp_path / "recipe.yaml", "--model", half, "--data", text_file, "--samples", "6", "--length", "64",
            "--test-samples", "4", "--out", out, *offload)  # fmt: skip
        found[name] = json.loads((out / "run.json").read_text())["perplexity"]
    assert found["memory"] == found["disk"] and found["disk"]["result"] != found["disk"]["dense"]


def test_changed_weights_go_to_the_cache_that_is_asked_for(msp, half, text_file, tmp_path, monkeypatch):
    seen = []
    real = steps.perplexity

    def look(*arguments, **options):
        seen.append(sorted(path.name for path in (tmp_path / "mine" / "pruned").glob("**/*.safetensors")))
        return real(*arguments, **options)

    monkeypatch.setattr(steps, "perplexity", look)
    msp("prune", half, "-s", "0.5", "--method", "magnitude", "--allocator", "uniform", "--data", text_file, *SMALL,
        "--test-samples", "4", "--out", tmp_path / "out", "--cache", tmp_path / "mine", "--offload")  # fmt: skip
    assert not seen[0] and seen[-1], "pruned weights are on disk"
    assert not (tmp_path / "cache" / "pruned").exists()


def test_a_disk_without_room_for_the_pruned_weights_is_found_before_any_work(
    msp, half, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    monkeypatch.setattr(steps, "perplexity", lambda *a, **b: pytest.fail("work was done"))
    ran = msp("prune", half, "-s", "0.5", "--method", "magnitude", "--data", text_file, *SMALL, "--out",
              tmp_path / "out", "--offload", code=2)  # fmt: skip
    assert "the pruned weights of an offloaded model need 0." in ran.err and "MSP_CACHE" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_cache_without_room_for_the_pruned_weights_in_memory_too(
    msp, half, text_file, tmp_path, monkeypatch
):
    def usage(path):
        return types.SimpleNamespace(free=1000 if "small" in str(path) else 10**12)

    (tmp_path / "small").mkdir()
    monkeypatch.setattr(writing.shutil, "disk_usage", usage)
    monkeypatch.setattr(steps, "perplexity", lambda *a, **b: pytest.fail("work was done"))
    ran = msp("prune", half, "-s", "0.5", "--method", "magnitude", "--data", text_file, *SMALL, "--out",
              tmp_path / "out", "--cache", tmp_path / "small", code=2)  # fmt: skip
    assert "until the run ends, the pruned weights need 0." in ran.err and "MSP_CACHE" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free some space"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "free some space"),
        (MemoryError(), "out of memory:"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory:"),
        (KeyboardInterrupt(), ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failed_load_says_what_was_short_and_leaves_nothing(
    error, said, msp, half, text_file, tmp_path, monkeypatch
):
    def fail(*arguments, offload_folder, **options):
        Path(offload_folder, "weight.dat").write_text("half of it")
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.setenv("MSP_CACHE", str(tmp_path / "cache"))
    if said:
        ran = msp(
            "sensitivity", half, "--data", text_file, *SMALL, "--offload", code=2 if "space" in said else 1
        )
        assert said in ran.err and "config.json" not in ran.err
    else:
        with pytest.raises(KeyboardInterrupt):
            load_model(half, offload=True)
    assert list((tmp_path / "cache" / "offload").iterdir()) == []


def test_weights_that_are_not_in_safetensors_are_refused(msp, half, copied, text_file):
    half = copied(half)
    state = load_model(half).state_dict()
    (half / "model.safetensors").unlink()
    torch.save(state, half / "pytorch_model.bin")
    ran = msp("sensitivity", half, "--data", text_file, *SMALL, "--offload", code=2)
    assert "has no safetensors files" in ran.err and "save_pretrained" in ran.err


def test_offloading_without_accelerate_is_refused_before_anything_is_loaded(half, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **b: pytest.fail("it was loaded"))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: find_spec(name) if name != "accelerate" else None
    )
    with pytest.raises(ModelError, match="accelerate") as refused:
        load_model(half, offload=True, cache=str(tmp_path / "cache"))
    assert "pip install accelerate" in refused.value.hint and not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_the_default_comparison_has_only_what_runs_with_weights_on_disk(msp, half, text_file, tmp_path):
    msp("compare", half, "--methods", "magnitude", "--data", text_file, *SMALL, "--test-samples", "2", "--no-prune",
        "--target", "down_proj",
        "--set", "search.rounds=1", "--set", "search.tokens=32", "--set", "search.holdout=32", "--set",
        "fisher.samples=2", "--out", tmp_path / "compared", "--offload")  # fmt: skip
    rows = json.loads((tmp_path / "compared" / "compare.json").read_text())["rows"]
    assert {row["allocator"]: row["error"] for row in rows} == dict.fromkeys(
        ["uniform", "owl", "alphapruning", "dlp", "lsa", "knapsack", "search"]
    )
