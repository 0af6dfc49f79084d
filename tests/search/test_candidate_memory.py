"""Candidates where memory is short."""

from contextlib import contextmanager

import pytest
import torch

from msp_plugin.errors import ModelError
from msp_plugin.search import batches
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.candidate_weights import CandidateWeights
from tests.helpers.losses import loss_of

A, B = (1,) * 8, (2, 0, 1, 2, 0, 1, 2, 0)
#: What torch raises where memory does not suffice: on a GPU, on the CPU, from cuBLAS; and Python itself.
NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore lines"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: 9 bytes"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@contextmanager
def memory_for(model, rows, error, seen=None):
    """Let a model's head fail for batches of more rows."""

    def hook(module, args):
        if seen is not None:
            seen.append(len(args[0]))
        if args[0].dim() == 3 and len(args[0]) > rows:
            raise error

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("reuse", [True, False])
def test_batches_are_halved_until_one_fits_when_the_loss_is_prepared(
    llama, make_samples, measured, error, reuse, caplog, monkeypatch
):
    monkeypatch.setattr(batches, "SHARES", 1)
    data, held = make_samples(7, 20), measured(llama)
    with loss_of(llama, held, data, reuse=reuse) as loss:
        loss.set_incumbent(A)
        expected = [loss(A), loss(B), *loss.quality()]
    seen = []
    with memory_for(llama, 2, error, seen), loss_of(llama, held, data, reuse=reuse) as loss:
        first, seen[:] = max(seen), []
        loss.set_incumbent(A)
        found = [loss(A), loss(B), *loss.quality()]
        assert loss.forward_tokens == 2 * data.tokens
    assert found == pytest.approx(expected, rel=1e-5) and first == 7
    assert max(seen) <= 2
    assert [r.message for r in caplog.records].count(caplog.messages[0]) == len(caplog.messages) == 1
    assert "7 samples of 20 tokens do not fit into memory at once, 2 do" in caplog.text


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_a_sample_that_does_not_fit_is_an_error_that_says_what_to_do(llama, make_samples, measured, error):
    held = measured(llama)
    refused = pytest.raises(ModelError, match="one sample of 20 tokens")
    with memory_for(llama, 0, error), refused as found, loss_of(llama, held, make_samples(3, 20)):
        pass
    assert "a smaller length" in found.value.hint and len(str(found.value).splitlines()) == 2
    with loss_of(llama, held, make_samples(3, 20)) as loss:
        loss(A)
        with memory_for(llama, 0, error), pytest.raises(ModelError, match="one sample of 20 tokens"):
            loss.move_gradients(A, [0, 1], 1, 0)


@pytest.mark.parametrize("where", ["weights", "pass"])
def test_what_is_held_for_later_goes_before_a_candidate_fails(
    llama, data, measured, where, caplog, monkeypatch
):
    database, problem = held = measured(llama)
    with loss_of(llama, held, data) as loss:
        expected = [loss(A), loss(B), loss(A)]
    failing, read = [], database.weight

    def full() -> None:
        if failing and weights.bytes_held:  # as long as anything is held
            raise NO_MEMORY[0]

    def weight(layer, level):
        if where == "weights":
            full()
        return read(layer, level)

    monkeypatch.setattr(database, "weight", weight)
    with CandidateWeights(llama, database, problem) as weights:
        loss = CandidateLoss(weights, data).prepare()
        loss.set_incumbent(A)
        found = [loss(A)]
        failing.append(True)
        handle = llama.model.layers[0].register_forward_pre_hook(
            lambda *at: full() if where == "pass" else None
        )
        found += [loss(B), loss(A)]
        handle.remove()
        assert found == expected and not weights.bytes_held
        saved = loss.forward_tokens - loss.block_tokens
        loss.set_incumbent(B)
        assert [loss(B), loss(B)] == [expected[1]] * 2 and loss.forward_tokens - loss.block_tokens == saved
    assert caplog.text.count("memory is short") == 1


def test_weights_that_do_not_fit_are_an_error_that_says_what_to_do(llama, data, measured, monkeypatch):
    database, problem = measured(llama)

    def weight(layer, level):
        raise NO_MEMORY[0]

    with CandidateWeights(llama, database, problem) as weights:
        loss = CandidateLoss(weights, data).prepare()
        monkeypatch.setattr(database, "weight", weight)
        with pytest.raises(ModelError, match="a candidate's weights do not fit into memory") as error:
            loss(A)
        assert "offloaded weights" in error.value.hint


def test_any_other_error_of_a_model_comes_through(llama, make_samples, measured, monkeypatch):
    monkeypatch.setattr(batches, "SHARES", 1)
    held = measured(llama)
    refused = pytest.raises(RuntimeError, match="^mine$")
    with memory_for(llama, 1, RuntimeError("mine")), refused, loss_of(llama, held, make_samples(3, 20)):
        pass
