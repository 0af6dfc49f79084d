import itertools
import types
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.build import build_database
from msp_plugin.database.store import LevelDatabase
from msp_plugin.models.layers import prunable_layers
from msp_plugin.passes.by_block import runs_by_block
from msp_plugin.passes.prefix import Prefix, last_outputs, tail_is_exact
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.levels import parse_menu
from msp_plugin.pruning.magnitude import Magnitude
from msp_plugin.search import batches
from msp_plugin.search.candidate_loss import CandidateLoss
from msp_plugin.search.candidate_weights import CandidateWeights

MENU = parse_menu(["dense", "2:4", "1:4"])
BLOCKS, HIDDEN = 5, 32
SIZES = {
    "vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
KEPT = tuple((1, 0, 2, 1)[u % 4] for u in range(4 * BLOCKS))


def make_model(name):
    torch.manual_seed(1)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)).eval()


def make_data():
    """Seven samples of two lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = (12, 12, 12, 12, 7, 7, 12)
    return CalibrationSet(tuple(torch.randint(0, 64, (n,), generator=generator) for n in lengths), "random")


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def setting(request, tmp_path_factory):
    model = make_model(request.param)
    return (model, *measured(model, tmp_path_factory.mktemp(request.param)), make_data())


def measured(model, path):
    problem = AllocationProblem(prunable_layers(model), MENU, 1 / 2)
    database = LevelDatabase(path, {"test": "prefix"}, MENU)
    build_database(database, model, problem.table, Magnitude(), None)
    return database, problem


@contextmanager
def loss_of(setting, **options):
    model, database, problem, data = setting
    with CandidateWeights(model, database, problem) as weights:
        yield CandidateLoss(weights, data, **options).prepare()


def changed(choice, block):
    """The choice with another level in the last unit of a block and in every later block."""
    return tuple((k + 1) % 3 if u >= 4 * block + 3 else k for u, k in enumerate(choice))


def bytes_for(held, data):
    """Memory for the inputs of so many blocks."""
    return held * data.tokens * HIDDEN * 4


def own_forwards(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("objective", ["kl", "perplexity"])
def test_reuse_changes_no_bit_wherever_a_candidate_differs_first(setting, objective):
    candidates = [KEPT] + [changed(KEPT, block) for block in range(BLOCKS)] + [KEPT]
    with loss_of(setting, objective=objective, reuse=False) as loss:
        expected = [loss(choice) for choice in candidates]
        assert loss.block_tokens == loss.forward_tokens
    with loss_of(setting, objective=objective) as loss:
        loss.set_incumbent(KEPT)
        assert [loss(choice) for choice in candidates] == expected
        tokens = setting[3].tokens
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
        with loss_of(setting, batch_tokens=4096) as loss:
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
    with loss_of(setting, reuse=False) as loss:
        expected = [loss(choice) for choice in [second, *others, KEPT]]
    with loss_of(setting) as loss:
        loss.set_incumbent(KEPT)
        loss(KEPT)
        loss.set_incumbent(second)
        before = loss.block_tokens
        found = [loss(second)]
        assert loss.block_tokens - before == pytest.approx(setting[3].tokens * 3 / BLOCKS, abs=1)
        found += [loss(choice) for choice in others]
        loss.set_incumbent(KEPT)
        assert [*found, loss(KEPT)] == expected


@pytest.mark.parametrize("setting", ["llama"], indirect=True)
@pytest.mark.parametrize("fits, held", [(0, ()), (1, (3,)), (2, (2, 4)), (3, (2, 4)), (4, (1, 2, 3, 4))])
def test_a_memory_bound_keeps_every_second_block_or_none(setting, fits, held):
    data = setting[3]
    candidates = [KEPT] + [changed(KEPT, block) for block in range(BLOCKS)]
    with loss_of(setting, reuse=False) as loss:
        expected = [loss(choice) for choice in candidates]
    for extra in (0, bytes_for(1, data) - data.tokens):
        with loss_of(setting, activation_bytes=bytes_for(fits, data) + extra) as loss:
            loss.set_incumbent(KEPT)
            assert [loss(choice) for choice in candidates] == expected
            skipped = sum(
                max([start for start in held if start <= block], default=0) for block in range(BLOCKS)
            )
            assert loss.forward_tokens - loss.block_tokens == skipped * data.tokens // BLOCKS


def test_held_activations_stay_within_the_bound_when_batches_overlap(setting):
    model, data = setting[0], setting[3]
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


def test_a_loss_is_never_that_of_an_older_choice(setting):
    data = setting[3]
    choices = [
        KEPT,
        (0,) * 20,
        *(changed(KEPT, block) for block in range(BLOCKS)),
        changed(changed(KEPT, 1), 3),
    ]
    known = {}
    with loss_of(setting, reuse=False) as fresh:

        def expected(choice, samples):
            key = (choice, None if samples is None else tuple(samples))
            if key not in known:
                known[key] = fresh(choice, samples)
            return known[key]

        @settings(max_examples=12)
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

    with loss_of(setting) as loss:
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
        with loss_of(setting) as loss:
            loss.set_incumbent(KEPT)
            first = loss(changed(KEPT, 3)), loss(KEPT), loss(changed(KEPT, 3))
            assert vars(block)["forward"] is own and first[0] == first[2]
    finally:
        del block.forward


def test_a_failure_while_recording_leaves_nothing_wrong_behind(setting):
    model = setting[0]
    with loss_of(setting, reuse=False) as loss:
        expected = loss(changed(KEPT, 4))

    def fail(*args):
        raise StopError

    with loss_of(setting) as loss:
        loss.set_incumbent(KEPT)
        handle = model.model.layers[2].mlp.register_forward_hook(fail)
        with pytest.raises(StopError):
            loss(KEPT)
        handle.remove()
        assert loss(changed(KEPT, 4)) == expected


class Block(torch.nn.Module):
    """A block with the calling convention that ``kind`` names."""

    def __init__(self, kind, shared):
        super().__init__()
        self.kind, self.shared = kind, shared
        self.proj = torch.nn.Linear(16, 16, bias=False)

    def forward(self, *args, **kwargs):
        x = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        seen = x
        if self.kind in ("pair", "previous"):
            seen = x + 0.5 * args[1]
        elif self.kind == "leaves something":
            seen = x + self.shared.pop("left", 0.0)
            self.shared["left"] = 0.3 * x
        out = x + torch.tanh(self.proj(seen))
        if self.kind == "in place":
            return x.add_(torch.tanh(self.proj(seen)))
        if self.kind == "tuple":
            return (out,)
        return (out, seen) if self.kind == "pair" else out


class Toy(torch.nn.Module):
    """A model of six blocks."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.shared = kind, {}
        self.config = types.SimpleNamespace(num_hidden_layers=6)
        self.embed = torch.nn.Embedding(64, 16)
        self.layers = torch.nn.ModuleList(Block(kind, self.shared) for _ in range(6))
        self.head = torch.nn.Linear(16, 64, bias=False)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids, use_cache=False):
        x = self.embed(ids)
        other = torch.zeros_like(x)
        if self.kind == "leaves something":
            self.shared.clear()
        for block in self.layers:
            if self.kind == "tuple":
                x = block(x)[0]
            elif self.kind == "keyword":
                x = block(hidden_states=x)
            elif self.kind == "odd keyword":
                x = block(x=x)
            elif self.kind == "pair":
                x, other = block(x, other)
            elif self.kind == "previous":
                x, other = block(x, other), x
            else:
                x = block(x)
        return types.SimpleNamespace(logits=self.head(x))


@pytest.mark.parametrize("kind, reused", [
    ("plain", True), ("keyword", True), ("tuple", False), ("pair", False), ("previous", False),
    ("odd keyword", False), ("in place", False), ("leaves something", False),
])  # fmt: skip
def test_a_model_of_another_calling_convention_is_measured_without_reuse(tmp_path, kind, reused):
    model = Toy(kind).eval()
    database, problem = measured(model, tmp_path)
    kept = (0, 1, 2, 0, 1, 2)
    moves = [tuple((k + 1) % 3 if u == b else k for u, k in enumerate(kept)) for b in range(6)]
    setting = (model, database, problem, make_data())
    with loss_of(setting, reuse=False) as loss:
        expected = [loss(choice) for choice in (kept, *moves)]
    with loss_of(setting) as loss:
        loss.set_incumbent(kept)
        found = [loss(choice) for choice in (kept, *moves)]
        assert found == pytest.approx(expected, rel=1e-5)
        assert (loss.block_tokens < loss.forward_tokens) is reused
    assert own_forwards(model) == []


class Remembering(Toy):
    """Each block adds what the one two before it left in the model, where it stays from call to call."""

    def forward(self, ids, use_cache=False):
        x = self.embed(ids)
        for number, block in enumerate(self.layers):
            x = block(x + 0.5 * self.shared[number - 2] if number > 1 else x)
        return types.SimpleNamespace(logits=self.head(x))


def test_what_a_block_leaves_in_the_model_is_not_taken_for_that_of_another_run(tmp_path):
    model = Remembering("plain").eval()
    for number, block in enumerate(model.layers):
        block.proj.register_forward_hook(lambda m, a, y, n=number: model.shared.__setitem__(n, y))
    database, problem = measured(model, tmp_path)
    setting = (model, database, problem, make_data())
    kept, moved = (0,) * 6, (0, 0, 0, 0, 2, 0)
    with loss_of(setting, reuse=False) as loss:
        expected = [loss(choice, [0]) for choice in (kept, (2,) * 6, moved)]
    with loss_of(setting) as loss:
        loss.set_incumbent(kept)
        assert [loss(choice, [0]) for choice in (kept, (2,) * 6, moved)] == expected
        assert loss.block_tokens == loss.forward_tokens


def test_every_start_counts_the_blocks_before_it(setting):
    model, data = setting[0], setting[3]
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


def test_several_streams_of_hidden_states_are_not_taken_for_samples():
    """Gemma 3n's blocks hand on [streams, B, T, D]; the last blocks also read keys of earlier ones."""
    config = AutoConfig.for_model(
        "gemma3n_text", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64, num_kv_shared_layers=0, layer_types=["full_attention"] * 2, laurel_rank=8,
        activation_sparsity_pattern=[0.0, 0.0], pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.arange(8)[None]
    with last_outputs(model) as outputs, torch.no_grad():
        model(ids)
    assert outputs[0].dim() == 4
    with torch.no_grad():
        assert not tail_is_exact(model, ids) and not Prefix(model, 1 << 30).is_exact(ids)
    assert not runs_by_block(model, ids[0])
