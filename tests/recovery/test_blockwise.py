"""Blockwise recovery on tiny models."""

import copy
import dataclasses
import math

import pytest
import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import NO_TEXT
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.load import load_model
from msp_plugin.models.offload import offloaded_module
from msp_plugin.passes.losses import mean_kl
from msp_plugin.recovery.blockwise import Blockwise
from msp_plugin.recovery.step import RecoveryText
from msp_plugin.recovery.window_training import Fit, Schedule, Trained, fit, state_of, trained_parameters
from msp_plugin.recovery.windows import windows

QUICK = Blockwise(epochs=2, rates=(0.02, 0.06))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_comes_nearer_to_the_dense_model_and_keeps_every_zero(
    model, dtype, prune_half, make_inputs, make_samples
):
    original = copy.deepcopy(model).to(dtype)
    sparse = model.to(dtype)
    masks = prune_half(sparse)
    inputs, text = make_inputs(sparse, masks, original), make_samples(6, 24, seed=2)
    before = mean_kl(original, sparse, text)
    result = QUICK.recover(inputs)
    after = mean_kl(original, sparse, text)
    assert after < 0.9 * before
    assert masks.check(sparse, "the test") == {}
    assert {p.dtype for p in sparse.parameters()} == {dtype}
    assert all(p.requires_grad for p in sparse.parameters())
    assert result.tokens > 0
    assert [tokens for tokens, _ in result.curve] == sorted(tokens for tokens, _ in result.curve)
    assert result.curve[-1][1] == pytest.approx(mean_kl(original, sparse, inputs.holdout))
    assert result.curve[-1][1] < result.curve[0][1]


def test_embeddings_head_and_the_original_are_left_alone(llama, prune_half, make_inputs, bits):
    original = copy.deepcopy(llama)
    masks, dense, before = prune_half(llama), bits(original), bits(llama)
    QUICK.recover(make_inputs(llama, masks, original))
    assert bits(original) == dense
    after = bits(llama)
    changed = {name for name in before if before[name] != after[name]}
    inside = {name for name in before if name.startswith("model.layers.")}
    assert changed == inside  # norms too


def test_a_model_that_lost_nothing_is_left_as_it_is(llama, prune_half, make_inputs, bits):
    masks = prune_half(llama)
    before = bits(llama)
    Blockwise(epochs=1).recover(make_inputs(llama, masks, copy.deepcopy(llama)))
    assert bits(llama) == before


def test_no_window_gets_worse_on_the_hold_out_samples(llama, prune_half, make_inputs, bits):
    original = copy.deepcopy(llama)
    masks, before = prune_half(llama), bits(llama)
    Blockwise(epochs=1, rates=(1e4,)).recover(make_inputs(llama, masks, original))
    assert bits(llama) == before  # such a rate only destroys


def test_decay_shrinks_surviving_matrices_and_neither_norms_nor_zeros(llama, prune_half, make_samples):
    masks = prune_half(llama)
    (window,) = windows(llama, make_samples(1, 20).samples[0], 2)
    trained = trained_parameters(llama, window, masks)
    before = {t.name: t.master.clone() for t in trained}
    errors = iter((3.5, 2.0, 1.0))
    for each in trained:
        each.parameter.requires_grad_(True)

    def flat(batch):  # a loss without slope
        return 1 + 0 * sum(each.parameter.sum() for each in trained)

    schedule = Schedule(steps=7, rate=0.1, decay=0.5)
    found = fit(trained, flat, 3, lambda: next(errors), Fit(3.0, state_of(trained)), schedule, 0)
    for each, values in zip(trained, found.state, strict=True):
        start = before[each.name]
        size = float(start[start != 0].square().mean().sqrt())
        shrunk = math.prod(1 - schedule.at(step) * size * 0.5 for step in range(7))
        expected = start * (shrunk if values.dim() > 1 else 1)
        torch.testing.assert_close(values, expected)
    assert found.error == 1.0 and masks.check(llama, "the test") == {}


def test_a_router_and_the_scales_of_a_quantization_are_left_alone(llama, prune_half, make_samples):
    (window,) = windows(llama, make_samples(1, 20).samples[0], 2)
    masks = prune_half(llama)
    expected = [each.name for each in trained_parameters(llama, window, masks)]
    mlp = llama.model.layers[0].mlp
    mlp.router = torch.nn.Linear(4, 4)
    mlp.up_proj.weight_scale = torch.nn.Parameter(torch.ones(4))
    mlp.up_proj.input_zero_point = torch.nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False)
    assert [each.name for each in trained_parameters(llama, window, masks)] == expected


def test_a_stopped_recovery_goes_on_to_the_same_bytes(llama, prune_half, make_inputs, bits):
    original = copy.deepcopy(llama)
    masks = prune_half(llama)
    stopped, whole = copy.deepcopy(llama), copy.deepcopy(llama)

    def stop(step, done, total, note=""):
        if done == total // 2:  # after two windows
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        QUICK.recover(make_inputs(stopped, masks, original, "stopped", progress=stop))
    trained = []
    again = copy.deepcopy(llama)
    inputs = make_inputs(
        again,
        masks,
        original,
        "stopped",
        progress=lambda step, done, total, note="": trained.append((done, total, note)),
    )
    files = {f.name: f.stat().st_mtime_ns for f in inputs.folder.iterdir()}
    result = QUICK.recover(inputs)
    assert {name: (inputs.folder / name).stat().st_mtime_ns for name in files} == files
    expected = QUICK.recover(make_inputs(whole, masks, original, "whole"))
    assert bits(again) == bits(whole)
    assert result == expected and sum(", then" in note for *_, note in trained) == 4
    done = [at for at, *_ in trained]
    assert done == sorted(done) and done.count(trained[0][1]) == 1 and {*done} >= {*range(done[2], done[-1])}


def test_a_damaged_state_is_trained_anew(llama, prune_half, make_inputs, bits):
    original = copy.deepcopy(llama)
    masks = prune_half(llama)
    models = [copy.deepcopy(llama) for _ in range(2)]
    inputs = make_inputs(models[0], masks, original)
    QUICK.recover(inputs)
    for file in inputs.folder.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    QUICK.recover(dataclasses.replace(inputs, model=models[1]))
    assert bits(models[0]) == bits(models[1])


def test_a_hidden_state_that_is_not_finite_is_named(llama, prune_half, make_inputs):
    original = copy.deepcopy(llama)
    masks = prune_half(llama)
    with torch.no_grad():
        original.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="model.layers.1"):
        QUICK.recover(make_inputs(llama, masks, original))


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"blocks": -1},
        {"rates": ()},
        {"rates": (0.0,)},
        {"rates": (float("nan"),)},
        {"decay": -1.0},
        {"decay": float("inf")},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(RecipeError, match="blockwise"):
        Blockwise(**options)


def test_an_original_on_disk_serves_as_one_in_memory(pair, prune_half, make_inputs, bits):
    here, away = pair
    sparse, method = copy.deepcopy(here), Blockwise(epochs=1, rates=(0.06,))
    masks = prune_half(sparse)
    other = copy.deepcopy(sparse)
    method.recover(make_inputs(sparse, masks, away, "away"))
    method.recover(make_inputs(other, masks, here, "here"))
    assert bits(sparse) == bits(other)


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_sparse_model_on_disk_is_recovered_as_in_memory(
    tied, llama, qwen2, prune_half, make_inputs, tmp_path
):
    here = qwen2 if tied else llama
    sparse = copy.deepcopy(here)
    masks = prune_half(sparse)
    sparse.save_pretrained(tmp_path / "sparse")
    away = load_model(tmp_path / "sparse", offload=True, cache=str(tmp_path))
    assert fingerprint(away) == fingerprint(sparse)
    results = [
        QUICK.recover(make_inputs(model, masks, here, folder))
        for model, folder in ((sparse, "here"), (away, "away"))
    ]
    assert results[0] == results[1] and fingerprint(away) == fingerprint(sparse)
    assert offloaded_module(away) is not None and masks.check(away, "the test") == {}
    assert all(parameter.is_meta for parameter in away.parameters())


@pytest.mark.parametrize("lengths", [[120, 4, 4], [4, 4, 120], [120, 4]])
def test_a_sample_that_holds_most_of_the_tokens_leaves_text_to_learn_from_and_to_judge_by(lengths):
    samples = CalibrationSet(tuple(torch.arange(n) % 60 for n in lengths), "some")
    text = RecoveryText.of(samples, NO_TEXT)
    assert text.data and text.holdout
    assert [*text.data.samples, *text.holdout.samples] == list(samples.samples)


@pytest.mark.parametrize("slope", [1e-8, 1e-3, 1e3], ids=["too small", "fits", "too large"])
def test_a_float16_parameter_is_trained_by_gradients_that_float16_cannot_hold(slope):
    parameter = torch.nn.Parameter(torch.ones(8, dtype=torch.float16))
    trained = [Trained("w", parameter, None, parameter.detach().float().clone())]

    def loss(batch):
        return slope * parameter.float().sum()

    start, schedule = Fit(1.0, state_of(trained)), Schedule(steps=4, rate=0.1, decay=0.0)
    found = fit(trained, loss, 4, lambda: 0.5, start, schedule, 0, scale=4096.0)
    assert found.finite and found.steps == 4
    assert bool((found.state[0] < 0.95).all()) and bool(found.state[0].isfinite().all())


def test_a_token_whose_dense_state_is_zero_counts_little(llama, prune_half, make_inputs):
    """As that of padding is where the embedding of its token is zero."""
    with torch.no_grad():
        llama.get_input_embeddings().weight[3] = 0
    original = copy.deepcopy(llama)
    masks = prune_half(llama)
    inputs = make_inputs(llama, masks, original)
    for sample in inputs.data.samples:
        sample[:4] = 3
    result = QUICK.recover(inputs)
    assert result.curve[-1][1] < result.curve[0][1]
