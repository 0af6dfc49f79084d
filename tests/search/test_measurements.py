"""What allocators get of what they ask for."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from msp_plugin.allocators.base import AllocationResult, Allocator
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import NO_TEXT, TextSplit
from msp_plugin.errors import ModelError, RecipeError
from msp_plugin.passes.losses import mean_kl
from tests.helpers.losses import pruned_copy
from tests.helpers.measuring import Asking, problem_of


def test_an_allocator_gets_what_it_asks_for_and_no_more(make_measurements):
    held, asking = make_measurements(), Asking()
    held.allocate(asking, problem_of(held), 3)
    inputs, loss, stop = asking.seen[0]
    assert set(inputs.sensitivities) == {"zeros", "fisher"}
    assert set(inputs.errors) == {"weight", "output", "fisher", "kl"}
    assert all(error.shape == (8, 3) for error in inputs.errors.values())
    assert inputs.loss.lengths == (24, 24) and inputs.holdout.lengths == (24,)
    pruned = pruned_copy(held.model, held.database, held.table, held.menu, inputs.problem.uniform())
    for value, samples in ((loss, held.text.search.samples[-2:]), (stop, held.text.holdout.samples[-1:])):
        assert value == pytest.approx(mean_kl(held.model, pruned, CalibrationSet(samples, "")), rel=1e-4)
    few = Asking(errors=("weight",), tokens=10, holdout=0)
    held.allocate(few, problem_of(held), 0)
    inputs = few.seen[0][0]
    assert list(inputs.errors) == ["weight"] and inputs.loss.lengths == (24,) and inputs.holdout is None


def test_an_allocator_that_asks_for_nothing_measures_nothing(make_measurements, tmp_path, bits):
    class Plain(Allocator):
        name = "plain"

        def allocate(self, inputs):
            assert (inputs.loss, inputs.holdout, inputs.estimate) == (None, None, None)
            assert inputs.errors == inputs.sensitivities == {}
            return AllocationResult(inputs.problem.uniform())

    held = make_measurements(text=TextSplit())
    _, record = held.allocate(Plain(), problem_of(held), 0)
    assert record.forward_tokens == 0 and not (tmp_path / "cache").exists()
    assert held.estimators["zeros"].calls == []


def test_the_record_counts_every_token_and_is_json(make_measurements):
    held, asking = make_measurements(), Asking()
    _, record = held.allocate(asking, problem_of(held), 0)
    assert record.forward_tokens == (1 + 8 * 2) * 48 + 48 + 24  # replace-one, search, hold-out
    record = record.to_dict()
    assert record["holdout"] == [[1, None]] and record["predictions"] == [[0.5, None]]
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_an_estimate_is_that_of_the_pruned_model(make_measurements, bits):
    held = make_measurements()
    before = bits(held.model)
    found = []

    class Remeasuring(Asking):
        def allocate(self, inputs):
            uniform, sparser = inputs.problem.uniform(), (2,) * 8
            for choice in (uniform, (0,) * 8, sparser):
                found.append((choice, inputs.estimate("zeros", choice), inputs.estimate("fisher", choice)))
            assert inputs.loss((0,) * 8) == pytest.approx(0.0, abs=1e-6)
            return AllocationResult(uniform)

    held.allocate(Remeasuring(errors=()), problem_of(held), 0)
    kept = problem_of(held).kept
    sizes = np.array([unit.weights for unit in held.table])
    for choice, zeros, fisher in found:
        assert zeros.tolist() == (sizes - kept[np.arange(8), list(choice)]).tolist()
        pruned = make_measurements(
            model=pruned_copy(held.model, held.database, held.table, held.menu, choice)
        )
        assert fisher == pytest.approx(np.array(pruned.sensitivity("fisher")), rel=1e-4)
    assert held.sensitivities["zeros"] == (0.0,) * 8 and bits(held.model) == before


def test_the_dense_weights_are_back_when_an_allocator_fails(make_measurements, bits, count_hooks):
    held = make_measurements()
    before, hooks = bits(held.model), count_hooks(held.model)

    class Failing(Asking):
        def allocate(self, inputs):
            inputs.loss.set_incumbent((1,) * 8)
            inputs.loss((1,) * 8)
            inputs.estimate("fisher", (2,) * 8)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        held.allocate(Failing(errors=()), problem_of(held), 0)
    assert bits(held.model) == before and count_hooks(held.model) == hooks


def test_an_unknown_error_or_sensitivity_is_refused_with_the_known_ones(make_measurements):
    with pytest.raises(RecipeError, match="there is no error 'fischer'") as error:
        make_measurements().error("fischer")
    assert "did you mean 'fisher'" in error.value.hint
    with pytest.raises(RecipeError, match="there is no error 'x'"):
        held = make_measurements()
        held.allocate(Asking(errors=("x",)), problem_of(held), 0)
    with pytest.raises(RecipeError, match="there is no estimator 'fischer'") as error:
        make_measurements().sensitivity("fischer")
    assert "did you mean 'fisher'" in error.value.hint


def test_text_that_is_missing_is_named_before_any_work(make_measurements, tmp_path):
    for search in (NO_TEXT, CalibrationSet((), "empty")):
        held = make_measurements(search=search)
        with pytest.raises(RecipeError, match="allocator 'asking' needs search text"):
            held.allocate(Asking(), problem_of(held), 0)
        with pytest.raises(RecipeError, match="needs search text"):
            held.replace_one(24)
    for calibration in (NO_TEXT, CalibrationSet((), "empty")):
        held = make_measurements(calibration=calibration)
        with pytest.raises(RecipeError, match="sensitivity 'fisher' needs calibration text"):
            held.sensitivity("fisher")
        assert held.sensitivity("zeros") == (0.0,) * 8
    assert not (tmp_path / "cache/database").exists()


def test_weights_that_no_hook_loads_are_refused_before_any_work(make_measurements):
    held = make_measurements()
    held.model.lm_head = torch.nn.Linear(64, 128, bias=False, device="meta")
    with pytest.raises(ModelError, match="offloaded"):
        held.allocate(Asking(), problem_of(held), 0)
    assert held.estimators["zeros"].calls == [] and held.sensitivities == {}


def test_steps_report_their_progress(make_measurements):
    seen = {}
    held = make_measurements(
        progress=lambda step, done, total, note="": seen.setdefault(step, []).append((done, total))
    )
    held.allocate(Asking(), problem_of(held), 0)
    assert {step: at[-1] for step, at in seen.items()} == {
        "sensitivity, zeros": (1, 1), "sensitivity, fisher": (4, 4), "level database": (14, 14),
        "Fisher-weighted error": (4, 4), "replace-one KL": (8, 8),
    }  # fmt: skip


def test_the_objective_is_the_allocators(make_measurements):
    @dataclass(frozen=True)
    class Perplexity(Asking):
        loss: str = "perplexity"

    held, asking = make_measurements(), Perplexity(errors=())
    held.allocate(asking, problem_of(held), 0)
    _, loss, holdout = asking.seen[0]
    kl = Asking(errors=())
    held.allocate(kl, problem_of(held), 0)
    assert loss > 3 > kl.seen[0][1] and holdout > 3 > kl.seen[0][2]  # of 128 tokens, one takes about log(128)
