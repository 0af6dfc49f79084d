"""``msp bench``: speed and memory of both forms of a packed checkpoint, printed and stored."""

import json

import pytest

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.errors import ModelError, RecipeError
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
    assert dense <= printed["dense"]["bytes"] <= dense + 1024  # and rotary frequencies
    assert printed["packed"]["bytes"] < printed["dense"]["bytes"]
    for form in ("packed", "dense"):
        assert printed[form]["prefill"] > 0 and printed[form]["decode"] > 0
    assert printed["ratios"]["decode"] == printed["packed"]["decode"] / printed["dense"]["decode"]
    table = msp("bench", packed_dir, *few).out
    assert "decode, tokens/s" in table and "layers on" in table


def test_a_dense_checkpoint_has_nothing_to_compare(run_dir):
    with pytest.raises(ModelError, match="is not packed"):
        bench(run_dir)


@pytest.mark.parametrize("name", ["batch", "prompt", "tokens", "repeats"])
def test_a_count_below_one_is_refused_before_anything_is_loaded(name):
    with pytest.raises(RecipeError, match=f"{name} is 0"):
        BenchOptions(**{name: 0})


def test_no_threads_are_refused_as_a_wrong_option(msp):
    assert "'--threads'" in msp("bench", "no_such", "--threads", "0", code=2).err


def test_more_tokens_than_the_model_takes_are_refused(packed_dir):
    with pytest.raises(RecipeError, match="the model takes 128 at most"):
        bench(packed_dir, BenchOptions(prompt=128, tokens=1))
