"""The loss of training, against the same loss written in one line with autograd's gradients."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from msp_plugin.errors import ModelError
from msp_plugin.recovery import objective as module
from msp_plugin.recovery.objective import ChunkedLoss, objective


def by_hand(logits, dense, targets, weight, temperature):
    p, q = (dense / temperature).log_softmax(-1), (logits / temperature).log_softmax(-1)
    kl = kl_div(q, p, reduction="sum", log_target=True) / len(logits) * temperature**2
    return weight * kl + (1 - weight) * cross_entropy(logits, targets)


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.0, 1.0), (0.7, 2.0)])
@pytest.mark.parametrize("with_head", [True, False], ids=["head", "logits"])
def test_loss_and_gradient_in_pieces_are_those_of_the_whole(monkeypatch, weight, temperature, with_head):
    monkeypatch.setattr(module, "LOGITS", 4 * 11)  # pieces of four tokens
    monkeypatch.setattr(module, "ROWS", 1)
    torch.manual_seed(0)
    head, dense_head = torch.nn.Linear(6, 11), torch.nn.Linear(6, 11, bias=False)
    outputs = torch.randn(9, 6 if with_head else 11, requires_grad=True)
    dense = torch.randn(9, 6 if with_head else 11)
    targets = torch.tensor([3, 1, -100, 0, 10, 10, 2, -100, 5])
    heads = (head, dense_head) if with_head else (None, None)
    found = ChunkedLoss.apply(outputs, heads[0], dense, heads[1], targets, weight, temperature)
    logits, reference = (head(outputs), dense_head(dense)) if with_head else (outputs, dense)
    expected = by_hand(logits, reference, targets, weight, temperature)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(2 * loss, outputs)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_loss_of_a_model_is_that_of_its_logits(llama, make_samples, weight):
    dense, model = copy.deepcopy(llama), llama
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    ids = torch.stack(make_samples(3, 10).samples)
    with torch.no_grad():
        logits, reference = model(ids).logits, dense(ids).logits
    if weight:
        q, p = logits.log_softmax(-1), reference.log_softmax(-1)
        expected = kl_div(q, p, reduction="sum", log_target=True) / ids.numel()
    else:
        expected = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    head = model.lm_head
    with objective(model, dense if weight else None, ids[0], weight=weight, temperature=1.0) as loss:
        assert model.lm_head is not head
        torch.testing.assert_close(loss.loss(model, {"input_ids": ids}).detach(), expected)
    assert model.lm_head is head
    torch.testing.assert_close(model(ids).logits, logits)


@pytest.mark.parametrize("room", [module.KNOWN_BYTES, 0])
def test_the_dense_model_reads_a_batch_that_comes_again_once(llama, make_samples, monkeypatch, room):
    monkeypatch.setattr(module, "KNOWN_BYTES", room)
    dense, passes = copy.deepcopy(llama), []
    dense.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    batches = [{"input_ids": ids[None]} for ids in make_samples(2, 10).samples]
    with (
        objective(llama, dense, batches[0]["input_ids"][0], weight=1.0, temperature=1.0) as loss,
        torch.no_grad(),
    ):
        passes.clear()  # the head was tried
        plain = [float(loss.loss(llama, batch)) for batch in batches]
        kept = [float(loss.loss(llama, batch, again=True)) for batch in batches * 2]
    assert kept == plain * 2 and len(passes) == (4 if room else 6)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_padding_does_not_count(llama, make_samples, weight):
    dense = copy.deepcopy(llama)
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    short, long = make_samples(1, 6).samples[0], make_samples(1, 10, seed=1).samples[0]
    batch = {"input_ids": torch.stack([torch.cat([short, torch.zeros(4, dtype=torch.int64)]), long])}
    batch["attention_mask"] = torch.tensor([[1] * 6 + [0] * 4, [1] * 10])
    with objective(llama, dense, long, weight=weight, temperature=1.0) as loss, torch.no_grad():
        both = loss.loss(llama, batch)
        parts = [float(loss.loss(llama, {"input_ids": ids[None]})) for ids in (short, long)]
    counts = [6, 10] if weight else [5, 9]
    expected = sum(c * p for c, p in zip(counts, parts, strict=True)) / sum(counts)
    assert float(both) == pytest.approx(expected, rel=1e-5)


def test_another_vocabulary_is_refused(llama, make_samples):
    other = copy.deepcopy(llama)
    other.resize_token_embeddings(160)
    with (
        pytest.raises(ModelError, match="128 tokens, the dense one 160"),
        objective(llama, other, make_samples(1, 8).samples[0], weight=1.0, temperature=1.0),
    ):
        pass
    assert isinstance(llama.lm_head, torch.nn.Linear)
