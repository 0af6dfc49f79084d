"""Training that FSDP shares out among ranks: it gives what one process does, goes on after a kill, and keeps zeros."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from msp_plugin.errors import HostError
from msp_plugin.recovery import sharding
from msp_plugin.recovery.masked_lora import MaskedLoRA

HELPER = Path(__file__).parent.parent / "helpers" / "fsdp_on_cpu.py"
#: What accelerate's launcher tells its processes.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
METHODS = {
    "masked_lora": ["masked_lora.rank=4"],
    "full": ["full.norms=true", "full.gradient_checkpointing=true"],
    "spp": ["spp.layers=ist", "spp.groups=8"],  # sixteen steps, after ten of which the importance is measured
}


@pytest.fixture
def recover(run_dir, llama_dir, corpus, tmp_path, monkeypatch):
    """Start a recovery in processes of its own; return the process, and a function that gives its last stage and its log."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def start(method, name, *, ranks, dtype="float32", tokens=3000):
        program = (
            ["-m", "torch.distributed.run", "--nproc-per-node", "2", HELPER]
            if ranks > 1
            else ["-m", "msp_plugin"]
        )
        options = [
            *METHODS[method],
            f"{method}.tokens={tokens}",
            f"{method}.step_tokens=192",
            f"{method}.evaluations=4",
        ]
        out, cache = tmp_path / name, tmp_path / f"{name}-cache"
        command = [
            sys.executable, *program, "recover", run_dir, "--original", llama_dir, "--data", corpus, "--samples", "16",
            "--length", "24", "--test-samples", "4", "--dtype", dtype, "--method", method,
            *(part for option in options for part in ("--set", option)), "--out", out,
        ]  # fmt: skip
        environment = {**os.environ, "MSP_CACHE": str(cache), **(FSDP if ranks > 1 else {})}
        process = subprocess.Popen([*map(str, command)], env=environment, stderr=subprocess.PIPE, text=True)

        def stage():
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            return json.loads((out / "run.json").read_text())["stages"][-1], errors

        return process, stage

    return start


def assert_same(found, expected):
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    assert found["sparsity"] == expected["sparsity"]
    assert found["recovery"]["tokens"] == expected["recovery"]["tokens"]
    curves = [[loss for _, loss in stage["recovery"]["curve"]] for stage in (found, expected)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < curves[0][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "dtype"),
    [("masked_lora", "float32"), ("masked_lora", "bfloat16"), ("full", "float32"), ("spp", "float32")],
)
def test_weights_that_fsdp_shares_out_are_trained_as_one_process_trains_them(method, dtype, recover):
    one, two = (recover(method, f"{ranks}", ranks=ranks, dtype=dtype)[1]()[0] for ranks in (1, 2))
    if dtype == "float32":
        assert_same(two, one)
    else:  # gradients are summed in another order and round to other weights
        assert two["kl"] == pytest.approx(one["kl"], rel=0.05)
        assert two["sparsity"] == one["sparsity"] and two["recovery"]["tokens"] == one["recovery"]["tokens"]


def kill_at_the_first_checkpoint(process, cache):
    deadline = time.monotonic() + 200
    while not list(cache.rglob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spp", "full"])
def test_a_killed_training_by_fsdp_goes_on_and_ends_as_one_that_was_not(method, recover, tmp_path):
    expected, _ = recover(method, "undisturbed", ranks=2, tokens=8000)[1]()
    process, _ = recover(method, "killed", ranks=2, tokens=8000)
    kill_at_the_first_checkpoint(process, tmp_path / "killed-cache")
    assert not (tmp_path / "killed").exists()
    found, log = recover(method, "killed", ranks=2, tokens=8000)[1]()
    assert_same(found, expected)
    assert "continues from a checkpoint" in log


@pytest.mark.slow
def test_a_training_killed_without_fsdp_begins_anew_with_it(recover, tmp_path):
    process, _ = recover("masked_lora", "killed", ranks=1, tokens=8000)
    kill_at_the_first_checkpoint(process, tmp_path / "killed-cache")
    expected, _ = recover("masked_lora", "whole", ranks=1, tokens=8000)[1]()
    found, log = recover("masked_lora", "killed", ranks=2, tokens=8000)[1]()
    assert_same(found, expected)
    assert "continues from a checkpoint" not in log


def test_an_fsdp_that_is_not_supported_is_refused(case, monkeypatch, caplog):
    inputs = case.inputs()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    MaskedLoRA().check(inputs.model, inputs.masks)  # on a CPU accelerate does not share weights out
    assert "weights are not shared out" in caplog.text
    monkeypatch.setattr(sharding, "gpus", lambda: 2)
    with pytest.raises(HostError, match="configured for FSDP 1") as caught:
        MaskedLoRA().check(inputs.model, inputs.masks)
    assert "fsdp_version" in caught.value.hint
    monkeypatch.setenv("FSDP_VERSION", "2")
    MaskedLoRA().check(inputs.model, inputs.masks)
    for variable, value, found in [
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "by size"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "checkpointing of activations"),
        ("LOCAL_WORLD_SIZE", "3", "3 processes share 2 GPUs"),
    ]:
        with monkeypatch.context() as patch, pytest.raises(HostError, match=found):
            patch.setenv(variable, value)
            MaskedLoRA(gradient_checkpointing=True).check(inputs.model, inputs.masks)
