"""The loss of a candidate, against whole models."""

import copy
import logging
import math

import pytest
import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.store import LayerErrors
from msp_plugin.errors import NumericsError
from msp_plugin.passes.losses import mean_kl, perplexity
from msp_plugin.passes.prefix import Prefix
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.candidate_weights import CandidateWeights
from msp_plugin.search.dense_reference import PlainHeadReference, make_reference
from tests.helpers import models
from tests.helpers.losses import MENU, kl_by_hand, loss_of, pruned_copy

A, B = (1,) * 8, (2, 0, 1, 2, 0, 1, 2, 0)


@pytest.mark.parametrize("name", ["llama", "qwen2", "granite", "gemma2", "phi"])
@pytest.mark.parametrize("batch_tokens", [pytest.param(1, marks=pytest.mark.slow), 4096])
def test_kl_is_that_of_two_whole_models(mixed, measured, name, batch_tokens):
    model = getattr(models, name)()
    database, problem = held = measured(model)
    units = len(problem.table)
    dense = copy.deepcopy(model)
    with loss_of(model, held, mixed, batch_tokens=batch_tokens) as loss:
        for choice in [(0,) * units, tuple((2, 1, 0, 1)[u % 4] for u in range(units)), (2,) * units]:
            expected = kl_by_hand(
                dense, pruned_copy(dense, database, problem.table, MENU, choice), mixed.samples
            )
            assert loss(choice) == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert expected > 1e-3
        assert loss((0,) * units) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("upcast", [False, True], ids=["bfloat16 logits", "float32 logits"])
def test_kl_in_bfloat16_is_that_of_two_whole_models(llama, mixed, measured, upcast):
    llama.bfloat16()
    if upcast:  # as models did that compute their logits .float()

        def float_logits(module, args, output):
            output.logits = output.logits.float()

        llama.register_forward_hook(float_logits)
    database, problem = held = measured(llama)
    dense = copy.deepcopy(llama)
    with loss_of(llama, held, mixed, batch_tokens=1) as loss:
        for choice in (A, B):
            expected = kl_by_hand(
                dense, pruned_copy(dense, database, problem.table, MENU, choice), mixed.samples
            )
            # by hand the logits of all tokens are rounded, here those of the likely ones
            assert loss(choice) == pytest.approx(expected, rel=1e-4)
        assert loss((0,) * 8) == pytest.approx(0.0, abs=1e-6)


def test_the_perplexity_objective_is_the_logarithm_of_the_perplexity(llama, mixed, measured):
    database, problem = held = measured(llama)
    choice = (2, 1, 0, 1, 0, 2, 1, 0)
    candidate = pruned_copy(llama, database, problem.table, MENU, choice)
    with loss_of(llama, held, mixed, "perplexity") as loss:
        assert loss(choice) == pytest.approx(math.log(perplexity(candidate, mixed)), rel=1e-6)
        assert loss(choice) != loss((0,) * 8)


@pytest.mark.parametrize("objective", ["kl", "perplexity"])
def test_some_samples_give_the_mean_over_their_own_tokens(llama, mixed, measured, objective):
    database, problem = held = measured(llama)
    candidate = pruned_copy(llama, database, problem.table, MENU, B)
    some = [1, 4, 6]  # of 9, 20 and 20 tokens
    part = CalibrationSet(tuple(mixed.samples[i] for i in some), "part")
    dense = copy.deepcopy(llama)
    with loss_of(llama, held, mixed, objective) as loss:
        found = loss(B, some)
        assert loss.forward_tokens == 49 and loss.lengths == (9, 9, 9, 20, 20, 20, 20)
        assert loss(B, [6, 1, 4]) == pytest.approx(found, rel=1e-6)
        assert found != pytest.approx(loss(B), rel=1e-4)
    expected = (
        kl_by_hand(dense, candidate, part.samples)
        if objective == "kl"
        else math.log(perplexity(candidate, part))
    )
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_candidates_loss_does_not_depend_on_those_before_it(llama, data, measured):
    with loss_of(llama, measured(llama), data) as loss:
        first = loss(A)
        other = loss(B)
        assert loss(A) == first and loss(B) == other and first != other
        assert loss.forward_tokens == loss.block_tokens == 4 * data.tokens


def test_one_model_serves_the_losses_of_two_texts(llama, data, mixed, measured):
    held = measured(llama)
    with loss_of(llama, held, data) as alone:
        expected = alone(A), alone(B)
    with CandidateWeights(llama, *held) as weights:
        first = CandidateLoss(weights, data).prepare()
        found = [first(A)]
        second = CandidateLoss(weights, mixed, "perplexity").prepare()
        before = second(A)
        found.append(first(B))
        assert tuple(found) == expected and second(A) == before


@pytest.mark.parametrize("exact", [True, False])
def test_a_loss_takes_over_the_dense_reference_of_another_and_if_activations_may_be_reused(
    llama, data, measured, monkeypatch, exact
):
    monkeypatch.setattr(Prefix, "is_exact", lambda self, ids: exact)
    with CandidateWeights(llama, *measured(llama)) as weights:
        first = CandidateLoss(weights, data).prepare()
        monkeypatch.setattr(PlainHeadReference, "measure_dense", None)  # none is measured again
        second = CandidateLoss(weights, data).prepare(first.reference)
        for loss in (first, second):
            loss.set_incumbent(A)
            assert loss(A) == first(A) == second(A)
            assert (loss.block_tokens < loss.forward_tokens) == exact


@pytest.mark.parametrize("objective", ["kl", "perplexity"])
def test_a_candidate_whose_loss_is_no_number_is_infinitely_bad_and_logged(
    llama, data, measured, caplog, objective
):
    database, problem = measured(llama)
    layer = problem.table[3].layers[0]
    broken = {name: database.weight(layer.name, name).clone() for name in ("2:4", "1:4")}
    broken["1:4"][0, 0] = float("nan")
    database.write(layer, broken, {name: LayerErrors(0.0, 0.0) for name in ("dense", *broken)})
    with loss_of(llama, (database, problem), data, objective) as loss:
        assert loss((0, 0, 0, 2, 0, 0, 0, 0)) == math.inf
        records = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert len(records) == 1 and "dense dense dense 1:4 dense" in records[0].getMessage()
        assert math.isfinite(loss((0, 0, 0, 1, 0, 0, 0, 0)))
        assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


def test_a_dense_model_whose_logits_are_not_finite_is_an_error(llama, data, measured, bits):
    held = measured(llama)
    with torch.no_grad():
        llama.lm_head.weight[0, 0] = float("nan")
    before = bits(llama)
    with pytest.raises(NumericsError, match="not finite") as error, loss_of(llama, held, data):
        pass
    assert "float32" in error.value.hint and bits(llama) == before


@pytest.mark.parametrize("name", ["llama", "qwen2", "granite"])
def test_quality_is_the_kl_and_the_perplexity_of_what_the_model_holds(mixed, measured, name):
    model = getattr(models, name)()
    database, problem = held = measured(model)
    dense, pruned = copy.deepcopy(model), pruned_copy(model, database, problem.table, MENU, B)
    with loss_of(model, held, mixed) as loss:
        value = loss(B)
        kl, found = loss.quality()
        assert kl == pytest.approx(value, rel=1e-6) == pytest.approx(mean_kl(dense, pruned, mixed), rel=1e-4)
        assert found == pytest.approx(perplexity(pruned, mixed), rel=1e-6)
        assert loss.forward_tokens == mixed.tokens  # the search's budget is not charged for it


def test_what_scales_or_caps_logits_is_run_again_instead_of_holding_them(make_samples):
    for model in (models.gemma2(), models.granite()):
        reference = make_reference(model, make_samples(3, 16).samples)
        reference.measure_dense([0, 1, 2])
        assert [tuple(reference.outputs[i].shape) for i in range(3)] == [(16, model.config.hidden_size)] * 3
