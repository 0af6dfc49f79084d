"""What a recovery has done is kept until it is written, and what it cannot do is known before the work."""

import json

import pytest
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from msp_plugin import Text
from msp_plugin.errors import ModelError
from msp_plugin.hosts.base import check_recovery
from msp_plugin.plugins.manager import Plugins
from msp_plugin.recovery.blockwise import Blockwise
from msp_plugin.recovery.lora import LoRA
from msp_plugin.recovery.step import RecoveryStep
from msp_plugin.recovery.weight_update import WeightUpdate
from msp_plugin.runs.recover import recover
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import resolve

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


def prune_for_lora(msp, model, corpus, out, *options, code=0):
    return msp(
        "prune", model, "--data", corpus, "--recover", "lora", "--out", out, *SMALL, *options, code=code
    )


@pytest.mark.parametrize(
    "options", [("-s", "0.5"), ("-m", "l2", "-s", "0.3", "--levels", "dense,1/2 wide 2:4")]
)
def test_lora_is_refused_for_masks_before_the_search(options, msp, llama_dir, corpus, tmp_path):
    failed = prune_for_lora(msp, llama_dir, corpus, tmp_path / "out", *options, code=2)
    assert "would fill" in failed.err and "search:" not in failed.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.unsaved").exists()


def test_masks_among_other_levels_are_warned_of_before_the_search(llama, caplog, make_samples):
    pytest.importorskip("peft")
    options, sample = {"sparsity": 0.3, "method": "l2"}, make_samples(1, 24).samples[0]
    options["levels"] = ["dense", "1/2 wide", "2:4"]
    check_recovery(LoRA(), llama, resolve(Options.parse(options), Plugins()), sample)
    assert "if the search chooses 2:4: lora would fill" in caplog.text
    caplog.clear()
    options["levels"] = ["dense", "1/2 wide", "dropped"]
    check_recovery(LoRA(), llama, resolve(Options.parse(options), Plugins()), sample)
    assert not caplog.records


@pytest.mark.parametrize("recovery", [Blockwise(), WeightUpdate()], ids=lambda recovery: recovery.name)
def test_blocks_that_share_keys_are_refused_before_the_search(recovery, make_samples):
    config = Gemma4TextConfig(
        vocab_size=128, vocab_size_per_layer_input=128, hidden_size=32, hidden_size_per_layer_input=16, head_dim=8,
        intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    plan = resolve(Options.parse({"sparsity": 0.5}), Plugins())
    with pytest.raises(ModelError, match=f"from block to block, so {recovery.name} cannot"):
        check_recovery(recovery, Gemma4ForCausalLM(config), plan, make_samples(1, 24).samples[0])
