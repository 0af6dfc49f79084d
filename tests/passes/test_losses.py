import copy
import math

import pytest
import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import NumericsError
from msp_plugin.passes import losses as evaluation
from msp_plugin.passes.losses import (
    likely_tokens,
    mean_kl,
    perplexity,
    summed_cross_entropy,
    summed_exponentials,
    summed_kl,
)


@pytest.fixture
def mixed(make_samples):
    """Samples of two lengths."""
    return CalibrationSet(make_samples(3, 9).samples + make_samples(4, 20, seed=1).samples, "mixed")


@pytest.fixture
def other(model):
    """The model with other weights in its second block."""
    changed = copy.deepcopy(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in changed.model.layers[1].parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return changed


def perplexity_by_hand(model, data):
    losses = []
    with torch.no_grad():
        for sample in data.samples:
            logits = model(sample[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, sample[1:], reduction="none"))
    return float(torch.cat(losses).mean().exp())


def kl_by_hand(dense, candidate, data):
    total = count = 0.0
    with torch.no_grad():
        for sample in data.samples:
            p = dense(sample[None]).logits[0].double().softmax(-1)
            q = candidate(sample[None]).logits[0].double().softmax(-1)
            total += float((p * (p.log() - q.log())).sum())
            count += len(sample)
    return total / count


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_perplexity_is_that_of_every_next_token(model, mixed, batch_tokens):
    seen = []
    found = perplexity(model, mixed, batch_tokens=batch_tokens, progress=lambda *at: seen.append(at))
    assert found == pytest.approx(perplexity_by_hand(model, mixed), rel=1e-5)
    assert seen[-1] == (7, 7)


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_the_kl_of_two_models_is_the_mean_over_all_positions(model, other, mixed, batch_tokens):
    seen = []
    found = mean_kl(model, other, mixed, batch_tokens=batch_tokens, progress=lambda *at: seen.append(at))
    assert found == pytest.approx(kl_by_hand(model, other, mixed), rel=1e-4) and found > 1e-3
    assert seen[-1] == (7, 7)
    assert found != pytest.approx(mean_kl(other, model, mixed), rel=1e-3)


def test_a_model_has_no_kl_from_itself(model, mixed):
    assert mean_kl(model, model, mixed) == 0.0


def test_logits_compared_in_pieces_give_the_same(llama, data, monkeypatch):
    torch.manual_seed(0)
    a, b, targets = torch.randn(23, 128), torch.randn(23, 128), torch.randint(0, 128, (23,))
    whole = summed_kl(a, b), summed_cross_entropy(a, targets), perplexity(llama, data)
    monkeypatch.setattr(evaluation, "_LOGITS", 128 * 5)
    pieces = summed_kl(a, b), summed_cross_entropy(a, targets), perplexity(llama, data)
    assert pieces == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr(evaluation, "_LOGITS", 1)
    assert summed_kl(a, b) == pytest.approx(whole[0], rel=1e-6)


def test_a_perplexity_beyond_floats_is_infinite(llama, data):
    with torch.no_grad():
        llama.lm_head.weight *= 1e6
    assert perplexity(llama, data) == math.inf


@pytest.mark.parametrize("measure", [perplexity, lambda model, data: mean_kl(model, model, data)])
def test_a_loss_that_is_no_number_is_an_error(llama, data, measure):
    with torch.no_grad():
        llama.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="not a number") as error:
        measure(llama, data)
    assert "float32" in error.value.hint


@pytest.mark.parametrize("change", [0.002, 0.05, 0.5])
def test_a_small_kl_in_16_bits_is_no_noise_of_rounding(change):
    """The KL from the head's input and the likely tokens' logits, against that of all logits, both rounded."""
    generator = torch.Generator().manual_seed(0)
    rows = (0.1 * torch.randn(4096, 64, generator=generator)).bfloat16()
    dense = 8 * torch.randn(256, 64, generator=generator)
    moved = (dense + 8 * change * torch.randn(256, 64, generator=generator)).bfloat16()
    dense = dense.bfloat16()
    before, after = dense @ rows.T, moved @ rows.T
    likely, shares, expected = likely_tokens(before, rows)
    grown = summed_exponentials(after) - summed_exponentials(before)
    grown -= (shares * (after.gather(-1, likely).float() - before.gather(-1, likely).float())).sum(-1)
    kl = grown - ((moved.float() - dense.float()) * expected).sum(-1)
    assert float(kl.sum()) == pytest.approx(summed_kl(before, after), rel=0.03)
