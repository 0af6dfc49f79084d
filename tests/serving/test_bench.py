"""``msp bench``: speed and memory of both forms of a packed checkpoint, printed and stored."""

import json

import pytest

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.errors import ModelError, RecipeError
from msp_plugin.report.text import short
from msp_plugin.serving.bench import BenchOptions, bench
from msp_plugin.serving.cpu import build


@pytest.mark.skipif(build.load_operator() is not None, reason="no kernels here")
def test_the_command_prints_and_stores_both_forms_speed_and_bytes(msp, packed_dir, tmp_path):
    file = tmp_path / "bench.json"
    few = ("--prompt", "8", "--tokens", "2", "--repeats", "1")
    printed = json.loads(msp("bench", packed_dir, *few, "--out", file, "--json").out)
    assert printed == json.loads(file.read_text()) and printed["schema"] == "msp_plugin/bench"
    checkpoint = Checkpoint.open(packed_dir)
    assert sum(printed["kernels"].values()) == len(checkpoint.packed)
    dense = sum(checkpoint.dense_info(name).bytes for name in checkpoint.dense_names)
    assert dense <= printed["other"]["bytes"] <= dense + 1024  # and rotary frequencies
    assert printed["own"]["bytes"] < printed["other"]["bytes"]
    for form in ("own", "other"):
        assert printed[form]["prefill"] > 0 and printed[form]["decode"] > 0
    assert printed["ratios"]["decode"] == printed["own"]["decode"] / printed["other"]["decode"]
    table = msp("bench", packed_dir, *few).out
    assert "decode, tokens/s" in table and "layers on" in table


def test_a_dense_checkpoint_has_nothing_to_compare(run_dir):
    with pytest.raises(ModelError, match="is not packed") as error:
        bench(run_dir)
    assert "--against" in error.value.hint


def test_a_smaller_model_is_held_against_the_one_that_it_was_cut_from(msp, llama_dir, tmp_path):
    prune = ("--levels", "mixed", "--quantum", "16", "--allocator", "uniform", "--method", "l2")
    text = ("--data", "demo:train", "--test-samples", "0", "--samples", "4", "--length", "16")
    msp("prune", llama_dir, "-s", "0.5", *prune, *text, "--out", tmp_path / "run")
    small = tmp_path / "small"
    msp("export", tmp_path / "run", "--to", "small", "--out", small)
    few = ("--prompt", "8", "--tokens", "2", "--repeats", "1", "--against", llama_dir)
    printed = json.loads(msp("bench", small, *few, "--out", small / "bench.json", "--json").out)
    assert printed["kernels"] == {} and printed["against"] == str(llama_dir)
    assert printed["own"]["bytes"] < printed["other"]["bytes"] and printed["own"]["decode"] > 0
    msp("report", small, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for step, form, name in (("decode", "own", "this model"), ("prefill", "other", llama_dir.name)):
        assert f"{step}, {name}, batch 1" in page and short(printed[form][step]) in page
    msp("export", small, "--to", "dense", "--out", tmp_path / "copy")
    assert not (tmp_path / "copy" / "bench.json").exists()  # it is of another model
    (small / "bench.json").write_text('{"schema": "msp_plugin/bench", "version": 1}')
    assert "it is left out" in msp("report", small, "--out", tmp_path / "again.html").err


def test_a_model_with_a_state_in_the_place_of_a_cache_is_measured(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=64)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    options = BenchOptions(prompt=8, tokens=2, repeats=1)
    record = bench(tmp_path / "mamba", options, against=tmp_path / "mamba")
    assert record.own.decode > 0 and record.own.bytes == record.other.bytes


@pytest.mark.parametrize("name", ["batch", "prompt", "tokens", "repeats"])
def test_a_count_below_one_is_refused_before_anything_is_loaded(name):
    with pytest.raises(RecipeError, match=f"{name} is 0"):
        BenchOptions(**{name: 0})


def test_no_threads_are_refused_as_a_wrong_option(msp):
    assert "'--threads'" in msp("bench", "no_such", "--threads", "0", code=2).err


def test_more_tokens_than_the_model_takes_are_refused(packed_dir):
    with pytest.raises(RecipeError, match="the model takes 128 at most"):
        bench(packed_dir, BenchOptions(prompt=128, tokens=1))
