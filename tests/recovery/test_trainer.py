"""The Trainer's course: its steps, its precision and noise, what decays, and where a stopped training goes on."""

import dataclasses
import re

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, OPTConfig, OPTForCausalLM

pytest.importorskip("peft")

from msp_plugin.recovery.full import Full
from msp_plugin.recovery.masked_lora import MaskedLoRA
from msp_plugin.recovery.trainer import last_checkpoint
from msp_plugin.recovery.training_text import Steps, shuffled

SLOW = pytest.mark.slow
#: Eight steps of four samples.
SHORT = {"tokens": 8 * 96, "step_tokens": 96, "evaluations": 2, "warmup": 0.0}
FULL = Full(learning_rate=1e-3, **SHORT)
MASKED_LORA = MaskedLoRA(rank=4, learning_rate=1e-2, **SHORT)


def bytes_of(model):
    return {name: p.detach().view(torch.uint8).numpy().tobytes() for name, p in model.named_parameters()}


@SLOW
def test_accumulated_passes_train_like_one_pass(case, weights_of):
    whole, parts = case.inputs("whole", batch_tokens=96), case.inputs("parts", batch_tokens=24)
    curves = [MASKED_LORA.recover(inputs).curve for inputs in (whole, parts)]
    assert [loss for _, loss in curves[0]] == [pytest.approx(loss, rel=1e-4) for _, loss in curves[1]]


def test_gradient_checkpointing_runs_blocks_twice_and_gives_the_same(case):
    method, runs, curves = dataclasses.replace(MASKED_LORA, tokens=2 * 96), [], []
    for checkpointing in (False, True):
        inputs = case.inputs(f"checkpointing {checkpointing}")
        inputs.model.model.layers[0].mlp.register_forward_pre_hook(
            lambda mlp, *_: runs.append(mlp) if torch.is_grad_enabled() else None
        )
        curves.append(dataclasses.replace(method, gradient_checkpointing=checkpointing).recover(inputs).curve)
    assert [loss for _, loss in curves[1]] == [pytest.approx(loss, rel=1e-5) for _, loss in curves[0]]
    first = runs.index(runs[-1])
    assert len(runs) - first == 2 * first > 0


def opt(**dropout):
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=128, max_position_embeddings=64, word_embed_proj_dim=32, **sizes, **dropout)
    return OPTForCausalLM(config)


def falcon(**dropout):
    config = FalconConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **dropout
    )
    return FalconForCausalLM(config)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize(
    ("made", "names"),
    [
        (opt, ("dropout", "attention_dropout", "activation_dropout", "layerdrop")),
        (falcon, ("hidden_dropout", "attention_dropout")),
    ],
)
def test_a_model_is_trained_without_its_dropout(case, made, names, gradient_checkpointing):
    method = dataclasses.replace(FULL, gradient_checkpointing=gradient_checkpointing)
    trained = []
    for dropout in (0.0, 0.4):
        torch.manual_seed(0)
        case.dense = made(**dict.fromkeys(names, dropout)).eval()
        inputs = case.inputs(f"dropout {dropout}")
        result = method.recover(inputs)
        trained.append((result, bytes_of(inputs.model)))
    assert trained[0] == trained[1]
    assert {getattr(inputs.model.config, name) for name in names} == {0.4}


def test_the_precision_of_accelerates_launcher_changes_nothing(case, monkeypatch):
    method = dataclasses.replace(MASKED_LORA, tokens=2 * 96)
    plain, launched = case.inputs("plain"), case.inputs("launched")
    expected = method.recover(plain)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert method.recover(launched) == expected
    assert bytes_of(launched.model) == bytes_of(plain.model)


def test_norms_do_not_decay_whatever_their_names(case):
    """transformers' Trainer knows Falcon's input_layernorm by its name, and not its ln_f."""
    torch.manual_seed(0)
    case.dense = falcon().eval()
    inputs = case.inputs()
    method = dataclasses.replace(FULL, tokens=96, evaluations=1, weight_decay=5.0)
    method.recover(inputs)
    norm = inputs.model.transformer.ln_f.weight  # starts with ones; a step of AdamW is as long as the rate
    assert 0 < (norm - 1).abs().max() < 1.1e-3


class KilledError(Exception):
    """Stands for a kill between two steps."""


def killing(after):
    def progress(step, done, total, note=""):
        if step == "masked_lora" and done >= after:
            raise KilledError

    return progress


@pytest.mark.parametrize("layers", ["ist", pytest.param("all", marks=SLOW)])
def test_a_stopped_training_ends_with_the_bytes_of_an_undisturbed_one(case, layers):
    method = MaskedLoRA(
        rank=4, learning_rate=1e-2, layers=layers, tokens=8 * 96, step_tokens=96, evaluations=4
    )
    undisturbed = case.inputs("undisturbed")
    expected = method.recover(undisturbed)
    for after in (3 * 96, 7 * 96):  # after the first and the third of four checkpoints
        stopped = case.inputs("stopped", progress=killing(after))
        with pytest.raises(KilledError):
            method.recover(stopped)
    unfinished = case.folder / "stopped" / "trainer" / "8-steps-of-4" / "checkpoint-7"
    unfinished.mkdir()  # as a kill within the writing of a checkpoint leaves it
    (unfinished / "trainer_state.json").write_text('{"epoch": 0.')
    resumed = case.inputs("stopped")
    assert method.recover(resumed) == expected
    assert bytes_of(resumed.model) == bytes_of(undisturbed.model)
    logs = [(case.folder / name / "log.jsonl").read_text() for name in ("undisturbed", "stopped")]
    times = re.compile(r'"eval_(runtime|\w+_per_second)": [^,]+, ')
    assert times.sub("", logs[0]) == times.sub("", logs[1])
    finished = case.inputs("stopped")  # once more: nothing is left to train
    assert method.recover(finished) == expected
    assert bytes_of(finished.model) == bytes_of(undisturbed.model)


def test_a_stopped_training_goes_on_with_other_batches_and_begins_anew_with_other_steps(case):
    """Another number of ranks makes other batches, or other steps where it does not divide their samples."""
    method = dataclasses.replace(MASKED_LORA, evaluations=4)
    with pytest.raises(KilledError):
        method.recover(case.inputs("stopped", progress=killing(3 * 96)))
    other = dataclasses.replace(method, step_tokens=144)
    expected = other.recover(case.inputs("other"))
    assert other.recover(case.inputs("stopped")) == expected
    steps = []
    resumed = case.inputs("stopped", batch_tokens=24, progress=lambda name, done, *_: steps.append(done))
    losses = [loss for _, loss in method.recover(resumed).curve]
    assert steps == [96 * step for step in range(3, 9)]
    assert losses == [pytest.approx(loss, rel=1e-4) for _, loss in method.recover(case.inputs("whole")).curve]


@pytest.mark.parametrize(
    ("ranks", "name"), [(1, "3-steps-of-16"), (2, "3-steps-of-16"), (3, "3-steps-of-18")]
)
def test_steps_have_the_name_of_their_samples(make_samples, ranks, name):
    method = MaskedLoRA(tokens=10_000, step_tokens=4096)
    assert Steps.plan(method, make_samples(3, 256), 2048, ranks).name == name


@pytest.mark.parametrize(
    ("ranks", "step_tokens", "batch_tokens", "expected"),
    [
        (1, 4096, 2048, (3, 8, 2)),
        (2, 4096, 2048, (3, 8, 1)),
        (2, 4096, 512, (3, 2, 4)),
        (1, 100, 2048, (40, 1, 1)),  # one sample is longer than a step
        (1, 7 * 256, 1024, (6, 1, 7)),
    ],
)
def test_steps_share_text_out(make_samples, ranks, step_tokens, batch_tokens, expected):
    method = MaskedLoRA(tokens=10_000, step_tokens=step_tokens)
    steps = Steps.plan(method, make_samples(3, 256), batch_tokens, ranks)
    assert (steps.count, steps.batch, steps.accumulated) == expected
    assert (steps.count - 1) * steps.tokens < 10_000 <= steps.count * steps.tokens


def test_all_samples_come_before_one_comes_again():
    order = shuffled(5, 12, seed=3)
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert order == shuffled(5, 12, seed=3) != shuffled(5, 12, seed=4)


def test_a_folder_without_a_checkpoint_starts_anew(tmp_path):
    assert last_checkpoint(tmp_path / "missing") is None
