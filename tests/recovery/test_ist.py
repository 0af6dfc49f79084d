"""Importance-aware sparse tuning, its update by hand, and which blocks a step trains."""

import dataclasses
import json
import math

import pytest
import torch

pytest.importorskip("peft")

from msp_plugin.recovery import importance
from msp_plugin.recovery.ist import ImportanceSchedule, starting_scores
from msp_plugin.recovery.masked_lora import MaskedLoRA


def test_the_scores_follow_the_rewards_of_damped_blocks():
    schedule = ImportanceSchedule([0.0, 0.5, -0.5, 1.0], seed=3)
    sets, losses = [], [1.0, 0.2, 2.0]

    def loss(blocks):
        sets.append(blocks)
        return losses[len(sets) - 1]

    schedule.update(10, loss)
    expected = [0.0, 0.5, -0.5, 1.0]
    p = [1 / (1 + math.exp(-s)) for s in expected]
    rewards = [math.exp(-value) for value in losses]
    mean = sum(rewards) / 3
    for blocks, reward in zip(sets, rewards, strict=True):
        assert len(set(blocks)) == 2
        for i in blocks:
            expected[i] += 10 * (reward - mean) * p[i] * (1 - p[i])
    assert schedule.scores.tolist() == pytest.approx(expected)


def test_unimportant_blocks_are_drawn_rarely():
    schedule = ImportanceSchedule([3.0, 3.0, -3.0, 3.0, 3.0, 3.0, 3.0, 3.0], seed=0)
    drawn = [schedule.drawn(step) for step in range(300)]
    assert all(len(set(blocks)) == 2 for blocks in drawn)
    assert sum(2 in blocks for blocks in drawn) > 200 > sum(5 in blocks for blocks in drawn)
    assert drawn == [ImportanceSchedule(schedule.scores.tolist(), 0).drawn(step) for step in range(300)]


def test_a_block_that_costs_much_starts_important():
    blocks = {0: ("a", "b"), 1: ("c",), 2: ("d",)}
    scores = starting_scores(blocks, {"a": 1.0, "b": 2.0, "c": 0.0, "d": 6.0})
    spread = math.sqrt((0 + 9 + 9) / 3)
    assert scores == pytest.approx({0: 0.0, 1: 3 / spread, 2: -3 / spread})
    assert starting_scores(blocks, {}) == {0: 0.0, 1: 0.0, 2: 0.0}


def test_a_step_trains_the_drawn_block_alone(case, weights_of):
    method = MaskedLoRA(
        rank=4, learning_rate=1e-2, layers="ist", tokens=96, step_tokens=96, warmup=0.0, norms=False
    )
    inputs = case.inputs(holdout=case.data)
    before = weights_of(inputs.model, inputs.masks)
    method.recover(inputs)
    (drawn,) = ImportanceSchedule([0.0, 0.0], seed=0).drawn(0)
    for name, weight in weights_of(inputs.model, inputs.masks).items():
        assert torch.equal(weight, before[name]) is (f"layers.{drawn}." not in name)


def test_gradients_of_blocks_that_are_not_drawn_do_not_count_when_gradients_are_clipped(
    case, weights_of, monkeypatch
):
    """Several ranks compute the gradients of all blocks."""
    method = MaskedLoRA(
        rank=4, learning_rate=1e-2, layers="ist", tokens=4 * 96, step_tokens=96, evaluations=1
    )
    found = []
    for name in ("drawn", "all"):
        inputs = case.inputs(name)
        method.recover(inputs)
        lines = map(json.loads, (inputs.folder / "log.jsonl").read_text().splitlines())
        norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
        found.append((norms, weights_of(inputs.model, inputs.masks)))
        monkeypatch.setattr(importance, "_require_grad", lambda layers, flag: None)
    assert found[0][0] == found[1][0] and len(found[0][0]) == 4
    assert all(torch.equal(weight, found[1][1][layer]) for layer, weight in found[0][1].items())


def test_the_sensitivities_of_the_run_decide_at_first(case, weights_of):
    method = MaskedLoRA(rank=4, learning_rate=1e-2, layers="ist", ist_start="sensitivity", tokens=6 * 96,
                        step_tokens=96, warmup=0.0, norms=False)  # fmt: skip
    inputs = case.inputs(holdout=case.data)
    given = {n: 5.0 if "layers.1." in n else 0.1 for n in inputs.masks}
    scores = starting_scores(
        {0: [n for n in given if ".0." in n], 1: [n for n in given if ".1." in n]}, given
    )
    steps = [ImportanceSchedule([scores[0], scores[1]], seed=0).drawn(step)[0] for step in range(6)]
    assert steps.count(1) > steps.count(0)
    result = method.recover(dataclasses.replace(inputs, sensitivities=given))
    assert result.curve[-1][1] < result.curve[0][1]
