"""Activations before the first block that a candidate changes are reused."""

import itertools
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msp_plugin.passes.prefix import Prefix
from msp_plugin.search import batches
from msp_plugin.search.candidate_loss import CandidateLoss
from tests.helpers import models
from tests.helpers.losses import loss_of, magnitude_levels, own_forwards, two_lengths

BLOCKS, HIDDEN = 5, 32
SIZES = {
    "vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
KEPT = tuple((1, 0, 2, 1)[u % 4] for u in range(4 * BLOCKS))


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def setting(request, tmp_path_factory):
    model = models.MODELS[request.param](**SIZES)
    return model, magnitude_levels(model, tmp_path_factory.mktemp(request.param)), two_lengths()


def changed(choice, block):
    """The choice with another level in the last unit of a block and in every later block."""
    return tuple((k + 1) % 3 if u >= 4 * block + 3 else k for u, k in enumerate(choice))


def bytes_for(held, data):
    """Memory for the inputs of so many blocks."""
    return held * data.tokens * HIDDEN * 4


@pytest.mark.parametrize("objective", ["kl", "perplexity"])
def test_reuse_changes_no_bit_wherever_a_candidate_differs_first(setting, objective):
    candidates = [KEPT] + [changed(KEPT, block) for block in range(BLOCKS)] + [KEPT]
    with loss_of(*setting, objective=objective, reuse=False) as loss:
        expected = [loss(choice) for choice in candidates]
        assert loss.block_tokens == loss.forward_tokens
    with loss_of(*setting, objective=objective) as loss:
        loss.set_incumbent(KEPT)
        assert [loss(choice) for choice in candidates] == expected
        tokens = setting[2].tokens
        skipped = [0, 0, 1, 2, 3, 4, 4]  # the kept one runs whole at first, then its last block alone
        assert loss.forward_tokens == 7 * tokens
        assert loss.block_tokens == 7 * tokens - sum(skipped) * tokens // BLOCKS


def test_blocks_that_are_skipped_do_not_run(setting, monkeypatch):
    monkeypatch.setattr(batches, "SHARES", 1)  # one batch, so that each block runs once
    model = setting[0]
    ran = []
    handles = [
        block.mlp.register_forward_hook(lambda *args, b=b: ran.append(b))
        for b, block in enumerate(model.model.layers)
    ]
    try:
        with loss_of(*setting, batch_tokens=4096) as loss:
            loss.set_incumbent(KEPT)
            for choice, expected in [
                (changed(KEPT, 2), range(BLOCKS)), (KEPT, range(BLOCKS)), (changed(KEPT, 2), range(2, BLOCKS)),
                (changed(KEPT, 4), range(4, BLOCKS)), (changed(KEPT, 0), range(BLOCKS)),
            ]:  # fmt: skip
                ran.clear()
                loss(choice, [0, 1, 2])
                assert ran == list(expected)
            ran.clear()
            loss(changed(KEPT, 3), [1, 3])  # sample 3 was never kept
            assert ran == list(range(BLOCKS))
    finally:
        for handle in handles:
            handle.remove()


def test_what_the_next_kept_choice_shares_stays_and_no_more(setting):
    second = changed(KEPT, 2)
    others = [changed(second, block) for block in range(BLOCKS)]
    with loss_of(*setting, reuse=False) as loss:
        expected = [loss(choice) for choice in [second, *others, KEPT]]
    with loss_of(*setting) as loss:
        loss.set_incumbent(KEPT)
        loss(KEPT)
        loss.set_incumbent(second)
        before = loss.block_tokens
        found = [loss(second)]
        assert loss.block_tokens - before == pytest.approx(setting[2].tokens * 3 / BLOCKS, abs=1)
        found += [loss(choice) for choice in others]
        loss.set_incumbent(KEPT)
        assert [*found, loss(KEPT)] == expected


@pytest.mark.parametrize("setting", ["llama"], indirect=True)
@pytest.mark.parametrize("fits, held", [(0, ()), (1, (3,)), (3, (2, 4)), (4, (1, 2, 3, 4))])
def test_a_memory_bound_keeps_every_second_block_or_none(setting, fits, held):
    data = setting[2]
    candidates = [KEPT] + [changed(KEPT, block) for block in range(BLOCKS)]
    with loss_of(*setting, reuse=False) as loss:
        expected = [loss(choice) for choice in candidates]
    for extra in (0, bytes_for(1, data) - data.tokens) if fits == 3 else (0,):
        with loss_of(*setting, activation_bytes=bytes_for(fits, data) + extra) as loss:
            loss.set_incumbent(KEPT)
            assert [loss(choice) for choice in candidates] == expected
            skipped = sum(
                max([start for start in held if start <= block], default=0) for block in range(BLOCKS)
            )
            assert loss.forward_tokens - loss.block_tokens == skipped * data.tokens // BLOCKS


def test_held_activations_stay_within_the_bound_when_batches_overlap(setting):
    model, data = setting[0], setting[2]
    limit = bytes_for(2, data)
    prefix = Prefix(model, limit // data.tokens)
    for samples in ([0, 1, 2], [0, 3, 6], [1, 3, 6], [2], [4, 5], *([i] for i in range(7))):
        with prefix.use(samples, 0, record=True), torch.no_grad():
            model(torch.stack([data.samples[i] for i in samples]), use_cache=False)
        assert 0 < prefix.bytes_held <= limit
    assert prefix.bytes_held == limit  # of every sample the inputs of two blocks
    assert prefix.release() and prefix.bytes_held == 0 and not prefix.release()


def sequences():
    """Steps (keep or measure, choice, samples) on few choices, so that they meet often."""
    samples = st.one_of(st.none(), st.sets(st.integers(0, 6), min_size=1).map(sorted))
    return st.lists(st.tuples(st.booleans(), st.integers(0, 7), samples), min_size=3, max_size=12)


@pytest.mark.slow
def test_a_loss_is_never_that_of_an_older_choice(setting):
    data = setting[2]
    choices = [
        KEPT,
        (0,) * 20,
        *(changed(KEPT, block) for block in range(BLOCKS)),
        changed(changed(KEPT, 1), 3),
    ]
    known = {}
    with loss_of(*setting, reuse=False) as fresh:

        def expected(choice, samples):
            key = (choice, None if samples is None else tuple(samples))
            if key not in known:
                known[key] = fresh(choice, samples)
            return known[key]

        @settings(max_examples=5)
        @given(sequences(), st.sampled_from([1, 2, 4]), st.sampled_from([1, 24, 4096]))
        def check(steps, fits, batch_tokens):
            loss = CandidateLoss(
                fresh.weights, data, batch_tokens=batch_tokens, activation_bytes=bytes_for(fits, data)
            ).prepare()
            for keeps, number, samples in steps:
                if keeps:
                    loss.set_incumbent(choices[number])
                found = loss(choices[number], samples)
                assert found == pytest.approx(expected(choices[number], samples), rel=2e-5, abs=1e-6)

        check()
    values = {round(value, 6) for (_, samples), value in known.items() if samples is None}
    assert len(values) > 3  # a stale loss would be seen


class StopError(Exception):
    pass


def test_hooks_and_replaced_forwards_are_gone_afterwards_and_after_a_failure(setting, count_hooks):
    model = setting[0]
    hooks = count_hooks(model)
    assert own_forwards(model) == []

    def fail(*args):
        raise StopError

    with loss_of(*setting) as loss:
        assert (count_hooks(model), own_forwards(model)) == (hooks, [])
        loss.set_incumbent(KEPT)
        for choice in (KEPT, changed(KEPT, 3)):  # while it records, and while it skips
            handle = model.model.layers[4].mlp.register_forward_hook(fail)
            with pytest.raises(StopError):
                loss(choice)
            handle.remove()
            assert (count_hooks(model), own_forwards(model)) == (hooks, [])
            loss(choice)
            assert (count_hooks(model), own_forwards(model)) == (hooks, [])


def test_a_forward_that_a_block_had_of_its_own_is_put_back(setting):
    model = setting[0]
    block = model.model.layers[0]
    own = block.forward = types.MethodType(type(block).forward, block)  # as accelerate's hooks leave it
    try:
        with loss_of(*setting) as loss:
            loss.set_incumbent(KEPT)
            first = loss(changed(KEPT, 3)), loss(KEPT), loss(changed(KEPT, 3))
            assert vars(block)["forward"] is own and first[0] == first[2]
    finally:
        del block.forward


def test_a_failure_while_recording_leaves_nothing_wrong_behind(setting):
    model = setting[0]
    with loss_of(*setting, reuse=False) as loss:
        expected = loss(changed(KEPT, 4))

    def fail(*args):
        raise StopError

    with loss_of(*setting) as loss:
        loss.set_incumbent(KEPT)
        handle = model.model.layers[2].mlp.register_forward_hook(fail)
        with pytest.raises(StopError):
            loss(KEPT)
        handle.remove()
        assert loss(changed(KEPT, 4)) == expected


def test_every_start_counts_the_blocks_before_it(setting):
    model, data = setting[0], setting[2]
    prefix = Prefix(model, BLOCKS * HIDDEN * 4)
    ids = torch.stack(data.samples[:2])
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        with prefix.use([0, 1], 0, record=True):
            model(ids, use_cache=False)
        for first, skipped in itertools.pairwise(range(BLOCKS + 1)):
            before = prefix.saved_tokens
            with prefix.use([0, 1], first, record=False):
                assert torch.equal(model(ids, use_cache=False).logits, whole)
            assert prefix.saved_tokens - before == pytest.approx(24 * first / BLOCKS, abs=1)
            assert skipped == first + 1
        before = prefix.saved_tokens
        with prefix.use([1, 0], 4, record=False):  # another batch
            assert torch.equal(model(ids.flip(0), use_cache=False).logits, whole.flip(0))
        assert prefix.saved_tokens == before
        prefix.forget(2)
        before = prefix.saved_tokens
        with prefix.use([0, 1], 4, record=False):
            assert torch.equal(model(ids, use_cache=False).logits, whole)
        assert prefix.saved_tokens - before == pytest.approx(24 * 2 / BLOCKS, abs=1)
