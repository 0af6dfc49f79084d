import copy
import logging
import math
from contextlib import contextmanager

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.build import build_database
from msp_plugin.database.store import LayerErrors, LevelDatabase
from msp_plugin.errors import ModelError, NumericsError, VerificationError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.passes.losses import mean_kl, perplexity
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.levels import parse_menu
from msp_plugin.pruning.magnitude import Magnitude
from msp_plugin.search import batches
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.candidate_weights import CandidateWeights
from msp_plugin.search.dense_reference import make_reference

MENU = parse_menu(["dense", "2:4", "1:4"])
SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15,
}  # fmt: skip
A, B = (1,) * 8, (2, 0, 1, 2, 0, 1, 2, 0)


def granite():
    """The logits are the head's output, scaled."""
    torch.manual_seed(3)
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=2.5)).eval()


def gemma2():
    """The logits are the head's output, capped by a tanh."""
    torch.manual_seed(4)
    config = Gemma2Config(
        **SIZES, head_dim=16, final_logit_softcapping=0.5, attn_implementation="eager", sliding_window=64
    )
    return Gemma2ForCausalLM(config).eval()


def phi():
    """The head has a bias."""
    torch.manual_seed(5)
    model = PhiForCausalLM(PhiConfig(**SIZES, resid_pdrop=0.0, embd_pdrop=0.0)).eval()
    with torch.no_grad():
        model.lm_head.bias.normal_(0.0, 2.0)
    return model


@pytest.fixture
def measured(tmp_path):
    """A problem at one half and a magnitude database for any model."""

    def make(model, data=None):
        problem = AllocationProblem(prunable_layers(model), MENU, 1 / 2)
        database = LevelDatabase(tmp_path / "cache", {"test": "candidates"}, MENU)
        build_database(database, model, problem.table, Magnitude(), data)
        return database, problem

    return make


@contextmanager
def loss_of(model, measured, data, *args, **options):
    """Yield a prepared loss, while the candidates' weights are exchanged."""
    with CandidateWeights(model, *measured) as weights:
        yield CandidateLoss(weights, data, *args, **options).prepare()


@pytest.fixture
def mixed(make_samples):
    """Samples of two lengths."""
    return CalibrationSet(make_samples(3, 9).samples + make_samples(4, 20, seed=1).samples, "mixed")


def pruned_copy(model, database, problem, choice):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for unit, k in zip(problem.table, choice, strict=True):
            for layer in unit.layers if not MENU[k].is_dense else ():
                other.get_submodule(layer.name).weight.copy_(database.weight(layer.name, MENU[k].name))
    return other


def kl_by_hand(dense, candidate, samples):
    total = count = 0.0
    with torch.no_grad():
        for sample in samples:
            p = dense(sample[None]).logits[0].double().softmax(-1)
            q = candidate(sample[None]).logits[0].double().softmax(-1)
            total += float((p * (p.log() - q.log())).sum())
            count += len(sample)
    return total / count


def places(model):
    """Where the storage of each parameter lies, and the parameter itself."""
    return {name: (id(p), p.data_ptr(), p.shape) for name, p in model.named_parameters()}


def build(request, name):
    makers = {"granite": granite, "gemma2": gemma2, "phi": phi}
    return makers[name]() if name in makers else request.getfixturevalue(name)


@pytest.mark.parametrize("name", ["llama", "qwen2", "granite", "gemma2", "phi"])
@pytest.mark.parametrize("batch_tokens", [pytest.param(1, marks=pytest.mark.slow), 4096])
def test_kl_is_that_of_two_whole_models(request, mixed, measured, name, batch_tokens):
    model = build(request, name)
    database, problem = held = measured(model)
    units = len(problem.table)
    dense = copy.deepcopy(model)
    with loss_of(model, held, mixed, batch_tokens=batch_tokens) as loss:
        for choice in [(0,) * units, tuple((2, 1, 0, 1)[u % 4] for u in range(units)), (2,) * units]:
            expected = kl_by_hand(dense, pruned_copy(dense, database, problem, choice), mixed.samples)
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
            expected = kl_by_hand(dense, pruned_copy(dense, database, problem, choice), mixed.samples)
            # by hand the logits of all tokens are rounded, here those of the likely ones
            assert loss(choice) == pytest.approx(expected, rel=1e-4)
        assert loss((0,) * 8) == pytest.approx(0.0, abs=1e-6)


def test_the_perplexity_objective_is_the_logarithm_of_the_perplexity(llama, mixed, measured):
    database, problem = held = measured(llama)
    choice = (2, 1, 0, 1, 0, 2, 1, 0)
    candidate = pruned_copy(llama, database, problem, choice)
    with loss_of(llama, held, mixed, "perplexity") as loss:
        assert loss(choice) == pytest.approx(math.log(perplexity(candidate, mixed)), rel=1e-6)
        assert loss(choice) != loss((0,) * 8)


@pytest.mark.parametrize("objective", ["kl", "perplexity"])
def test_some_samples_give_the_mean_over_their_own_tokens(llama, mixed, measured, objective):
    database, problem = held = measured(llama)
    candidate = pruned_copy(llama, database, problem, B)
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


@pytest.mark.parametrize("objective", ["kl", "perplexity"])
def test_the_dense_weights_are_back_in_their_place_when_the_block_ends(
    model, data, measured, bits, count_hooks, objective
):
    held = measured(model)
    before, where, hooks = bits(model), places(model), count_hooks(model)
    with loss_of(model, held, data, objective) as loss:
        loss((1, 2) * 4)
        assert bits(model) != before
    assert bits(model) == before and places(model) == where and count_hooks(model) == hooks


@pytest.mark.parametrize("cause", [ValueError, KeyboardInterrupt])
def test_the_dense_weights_are_back_when_the_block_fails(llama, data, measured, bits, count_hooks, cause):
    held = measured(llama)
    before, where, hooks = bits(llama), places(llama), count_hooks(llama)
    with pytest.raises(cause), loss_of(llama, held, data) as loss:
        loss.set_incumbent(A)
        loss(A)
        loss((1, 2) * 4)
        raise cause
    assert bits(llama) == before and places(llama) == where and count_hooks(llama) == hooks


def test_the_dense_weights_are_back_when_a_file_is_missing_half_way(tmp_path, llama, data, measured, bits):
    _, problem = measured(llama)
    fresh = LevelDatabase(tmp_path / "cache", {"test": "candidates"}, MENU)
    before, where = bits(llama), places(llama)
    with pytest.raises(VerificationError, match="v_proj"), loss_of(llama, (fresh, problem), data) as loss:
        fresh.file("model.layers.0.self_attn.v_proj").unlink()
        loss(A)
    assert bits(llama) == before and places(llama) == where


def test_the_dense_weights_are_back_when_the_model_fails_half_way(llama, data, measured, bits, count_hooks):
    held = measured(llama)
    before, where, hooks = bits(llama), places(llama), count_hooks(llama)

    def fail(module, args, output):
        raise LookupError

    with pytest.raises(LookupError), loss_of(llama, held, data) as loss:
        handle = llama.model.layers[1].register_forward_hook(fail)
        try:
            loss(A)
        finally:
            handle.remove()
    assert bits(llama) == before and places(llama) == where and count_hooks(llama) == hooks


def test_a_failed_candidate_leaves_no_trace_in_the_next_one(tmp_path, llama, data, measured):
    database, problem = measured(llama)
    with loss_of(llama, (database, problem), data) as loss:
        expected = loss(B)
    fresh = LevelDatabase(tmp_path / "cache", {"test": "candidates"}, MENU)
    with loss_of(llama, (fresh, problem), data) as loss:
        file = fresh.file("model.layers.1.self_attn.v_proj")
        away = file.rename(file.with_suffix(".away"))
        with pytest.raises(VerificationError):
            loss(A)
        away.rename(file)
        assert loss(B) == expected


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
def test_quality_is_the_kl_and_the_perplexity_of_what_the_model_holds(request, mixed, measured, name):
    model = build(request, name)
    database, problem = held = measured(model)
    dense, pruned = copy.deepcopy(model), pruned_copy(model, database, problem, B)
    with loss_of(model, held, mixed) as loss:
        value = loss(B)
        kl, found = loss.quality()
        assert kl == pytest.approx(value, rel=1e-6) == pytest.approx(mean_kl(dense, pruned, mixed), rel=1e-4)
        assert found == pytest.approx(perplexity(pruned, mixed), rel=1e-6)
        assert loss.forward_tokens == mixed.tokens  # the search's budget is not charged for it


def test_weights_from_elsewhere_are_measured_and_make_way_for_the_next_choice(llama, mixed, measured):
    held = measured(llama)
    problem = held[1]
    dense, where = copy.deepcopy(llama), places(llama)
    names = [layer.name for layer in problem.table.layers]
    other = {name: 0.9 * llama.get_submodule(name).weight.detach().double() for name in names}
    scaled = copy.deepcopy(llama)
    with torch.no_grad():
        for name, weight in other.items():
            scaled.get_submodule(name).weight.copy_(weight)
    with CandidateWeights(llama, *held) as weights:
        loss = CandidateLoss(weights, mixed).prepare()
        expected = loss(B)
        weights.put(other)
        assert llama.get_submodule(names[0]).weight.dtype == torch.float32
        kl, found = loss.quality()
        assert kl == pytest.approx(mean_kl(dense, scaled, mixed), rel=1e-4)
        assert found == pytest.approx(perplexity(scaled, mixed), rel=1e-6)
        assert loss(B) == expected
        weights.put(other)
        weights.set(None)
        assert places(llama) == where
        with pytest.raises(KeyError):
            weights.put({names[0]: other[names[0]]})
        assert loss(B) == expected
    assert places(llama) == where


def test_held_weights_are_read_once_and_make_way_when_they_grow_too_large(llama, data, measured, monkeypatch):
    database, problem = measured(llama)
    read, original = [], database.weight

    def counting(layer, level):
        read.append((layer, level))
        return original(layer, level)

    monkeypatch.setattr(database, "weight", counting)
    choices = [A, B, (2,) * 8, A, B]
    one, every = max(layer.weights for layer in problem.table.layers) * 4, problem.table.weights * 4 * 2
    found, reads = {}, {}
    for limit in (1, 3 * one, 1 << 30):
        read.clear()
        with CandidateWeights(llama, database, problem, held_bytes=limit) as weights:
            loss = CandidateLoss(weights, data).prepare()
            found[limit] = []
            for choice in choices:
                found[limit].append(loss(choice))
                assert weights.bytes_held <= max(limit, one)
            assert weights.bytes_held > min(limit, every) - one  # and no more makes way than must
        reads[limit] = len(read)
    assert found[1] == found[3 * one] == found[1 << 30]
    assert reads[1 << 30] == 2 * 14 == len(set(read)) and reads[1] > reads[1 << 30]
    assert all(level != "dense" for _, level in read)  # the model's own weight is at hand


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


def test_what_scales_or_caps_logits_is_run_again_instead_of_holding_them(make_samples):
    for model in (gemma2(), granite()):
        reference = make_reference(model, make_samples(3, 16).samples)
        reference.measure_dense([0, 1, 2])
        assert [tuple(reference.outputs[i].shape) for i in range(3)] == [(16, model.config.hidden_size)] * 3


def test_any_other_error_of_a_model_comes_through(llama, make_samples, measured, monkeypatch):
    monkeypatch.setattr(batches, "SHARES", 1)
    held = measured(llama)
    refused = pytest.raises(RuntimeError, match="^mine$")
    with memory_for(llama, 1, RuntimeError("mine")), refused, loss_of(llama, held, make_samples(3, 20)):
        pass
