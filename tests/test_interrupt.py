"""A run that is stopped from outside."""

import os
import signal
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("step", ["sensitivity", "search"])
def test_a_stopped_run_leaves_nothing_behind_but_its_cache(stop, code, step, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("while True:\n    x = x + 1\n" * 300)
    run = subprocess.Popen(
        [sys.executable, "-m", "msp_plugin", "prune", "demo:qwen2", "-s", "0.75", "-m", "wanda", "--data",
         str(text), "--samples", "8", "--length", "64", "--test-samples", "0", "--no-baseline",
         "--set", "allocator.tokens=128", "--set", "allocator.holdout=64", "--cache", str(tmp_path / "cache"), "--out",
         str(tmp_path / "out")],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job may ignore it
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    before = {"sensitivity": "sensitivity", "search": "level database"}[step]
    for line in run.stderr:
        if line.startswith(before):
            break
    run.send_signal(stop)
    run.communicate(timeout=60)
    assert run.returncode == code
    assert {p.name for p in tmp_path.iterdir()} <= {"text.txt", "cache"}
    assert not list(tmp_path.rglob("*.partial"))
