"""What a recovery has done is kept until it is written, and what it cannot do is known before the work."""

import json

import pytest

from msp_plugin import Text
from msp_plugin.recovery.step import RecoveryStep
from msp_plugin.runs.recover import recover

SMALL = ["--samples", "12", "--length", "24", "--test-samples", "4"]


@pytest.fixture
def text(corpus):
    return Text(str(corpus), samples=12, length=24, test_samples=4)


def test_a_training_that_cannot_be_written_is_not_trained_again_and_leaves_its_log(
    run_dir, llama_dir, text, tmp_path, monkeypatch
):
    pytest.importorskip("peft")
    method = {"name": "masked_lora", "tokens": 192, "step_tokens": 96, "evaluations": 2, "rank": 4}
    out, cache = tmp_path / "out", tmp_path / "cache"

    def once():
        return recover(run_dir, text, out, original=llama_dir, method=method, cache=str(cache))

    with monkeypatch.context() as patch:
        patch.setattr(RecoveryStep, "measure", measure_until("recovered"))
        with pytest.raises(KeyboardInterrupt):
            once()
    (state,) = (cache / "recovery").iterdir()
    losses = logged_losses(state)
    monkeypatch.setattr("torch.optim.AdamW.step", lambda *_: pytest.fail("trained again"))
    once()
    assert logged_losses(out) == losses and len(losses) == 3
    assert not list((cache / "recovery").iterdir())


def logged_losses(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]


def measure_until(name):
    """Return RecoveryStep.measure, but the measurement of a name is stopped as by Ctrl-C."""
    measure = RecoveryStep.measure

    def stopped(self, what, model, original):
        if what == name:
            raise KeyboardInterrupt
        return measure(self, what, model, original)

    return stopped


def test_lora_is_refused_for_n_m_before_the_search(msp, llama_dir, corpus, tmp_path):
    failed = msp(
        "prune",
        llama_dir,
        "-s",
        "0.5",
        "--data",
        corpus,
        "--recover",
        "lora",
        "--out",
        tmp_path / "out",
        *SMALL,
        code=2,
    )
    assert "would fill" in failed.err and "search:" not in failed.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.unsaved").exists()
