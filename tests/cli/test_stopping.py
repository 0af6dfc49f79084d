"""A run that is stopped from outside."""

import atexit
import contextlib
import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from msp_plugin.cli.stopping import Stopped, stopping
from msp_plugin.errors import VerificationError


@pytest.fixture(autouse=True)
def interruptible():
    """A shell's background job ignores SIGINT from the start, and the tests in it would."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "code", "step"), [(signal.SIGINT, 130, "sensitivity"), (signal.SIGTERM, 143, "search")]
)  # every command, step and signal: integration/signals.py
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
    said = run.communicate(timeout=60)[1]
    assert run.returncode == code
    assert "Traceback" not in said
    assert {p.name for p in tmp_path.iterdir()} <= {"text.txt", "cache"}
    assert not list(tmp_path.rglob("*.partial"))


def test_a_stop_that_is_swallowed_comes_again():
    with pytest.raises(Stopped) as stop, stopping():
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        time.sleep(10)
    assert stop.value.code == 143


def test_a_stop_that_is_lost_in_a_destructor_comes_again_without_a_traceback(monkeypatch):
    class Destroyed:
        def __init__(self, act):
            self.act = act

        def __del__(self):
            self.act()

    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: reported.append(lost.exc_type))
    with pytest.raises(Stopped) as stop, stopping():
        Destroyed(lambda: 1 / 0)  # any other error is reported as ever
        Destroyed(lambda: signal.raise_signal(signal.SIGTERM))
        time.sleep(10)
    assert stop.value.code == 143 and reported == [ZeroDivisionError]
    Destroyed(lambda: 1 / 0)
    assert len(reported) == 2


def test_a_second_signal_does_not_stop_the_tidying_up():
    tidied = []
    with pytest.raises(Stopped) as stop, stopping():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            time.sleep(1.2)
            tidied.append(True)
    assert stop.value.code == 130 and tidied


def test_the_handlers_are_put_back_and_an_ignored_signal_stays_ignored():
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    first = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        before = [signal.getsignal(name) for name in names]
        with stopping():
            signal.raise_signal(signal.SIGINT)
        assert [signal.getsignal(name) for name in names] == before
    finally:
        signal.signal(signal.SIGINT, first)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    "made", [VerificationError("cannot read a level"), TypeError("no shape"), OSError(28, "full")]
)
def test_what_compiled_code_makes_of_a_stop_is_a_stop(made, msp, monkeypatch):
    def load(*arguments, **options):
        try:
            signal.raise_signal(signal.SIGTERM)
        except Stopped:
            raise made from None

    monkeypatch.setattr("msp_plugin.checkpoint.source.load_tokenizer", load)
    ran = msp("sensitivity", "demo:qwen2", "--data", "demo:calibration", code=143)
    assert ran.err.startswith("stopped; nothing half-written is left") and "error" not in ran.err


def test_an_error_without_a_stop_is_an_error(msp, monkeypatch):
    def load(*arguments, **options):
        raise VerificationError("cannot read a level")

    monkeypatch.setattr("msp_plugin.checkpoint.source.load_tokenizer", load)
    assert (
        "error: cannot read a level"
        in msp("sensitivity", "demo:qwen2", "--data", "demo:calibration", code=1).err
    )


def test_a_command_ends_without_a_search_for_garbage(msp, monkeypatch):
    registered = []
    monkeypatch.setattr(atexit, "register", registered.append)
    msp("--version")
    assert gc.freeze in registered
