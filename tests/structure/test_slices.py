"""Slices against plain indexing, and their record."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.errors import FormatError
from msp_plugin.structure.halves import find_halves
from msp_plugin.structure.slices import Slices, from_runs, runs


@given(st.sets(st.integers(0, 60)))
def test_runs_give_the_same_numbers_back(numbers):
    assert from_runs(runs(sorted(numbers))) == tuple(sorted(numbers))


def test_runs_are_short():
    assert runs([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8" and runs([]) == ""


@pytest.mark.parametrize("text", ["x", "3-1", "1,1", "5,2", "1,", "-3"])
def test_what_is_no_increasing_run_is_refused(text):
    with pytest.raises(ValueError):
        from_runs(text)


@pytest.fixture
def slices(tiny):
    halves = find_halves(tiny("llama with biases"))
    kept = {half.name: tuple(range(half.groups)) for half in halves}
    kept |= {
        "model.layers.1.self_attn": (1, 3),
        "model.layers.2.mlp": (0, 5, 6),
        "model.layers.3.self_attn": (),
    }
    return Slices(halves, kept, 4)


def test_tensors_are_cut_as_plain_indexing_cuts_them(slices, tiny):
    tensors = {name: t.detach() for name, t in tiny("llama with biases").named_parameters()}
    heads, kv = [*range(16, 32), *range(48, 64)], [*range(8, 16), *range(24, 32)]
    attention, mlp = "model.layers.1.self_attn", "model.layers.2.mlp"
    expected = dict(tensors)
    for bias in ("weight", "bias"):
        expected[f"{attention}.q_proj.{bias}"] = tensors[f"{attention}.q_proj.{bias}"][heads]
        for leaf in ("k_proj", "v_proj"):
            expected[f"{attention}.{leaf}.{bias}"] = tensors[f"{attention}.{leaf}.{bias}"][kv]
        for leaf in ("gate_proj", "up_proj"):
            expected[f"{mlp}.{leaf}.{bias}"] = tensors[f"{mlp}.{leaf}.{bias}"][[0, 5, 6]]
    expected[f"{attention}.o_proj.weight"] = tensors[f"{attention}.o_proj.weight"][:, heads]
    expected[f"{mlp}.down_proj.weight"] = tensors[f"{mlp}.down_proj.weight"][:, [0, 5, 6]]
    gone = [
        n for n in tensors if n.startswith(("model.layers.3.self_attn", "model.layers.3.input_layernorm"))
    ]
    assert len(gone) == 9
    for name, tensor in tensors.items():
        if name in gone:
            assert slices.name(name) is None
            continue
        assert slices.name(name) == name
        assert torch.equal(slices.cut(name, tensor), expected[name]), name
        assert slices.shape(name, tensor.shape) == tuple(expected[name].shape)


def test_the_widths_are_those_of_what_is_kept(slices):
    assert [(w.heads, w.kv_heads, w.channels) for w in slices.widths] == [
        (8, 4, 24),
        (4, 2, 24),
        (8, 4, 3),
        (0, 0, 24),
    ]


def test_blocks_without_halves_are_gone_and_the_others_move_up(slices):
    kept = {**slices.kept, "model.layers.0.self_attn": (), "model.layers.0.mlp": ()}
    moved = Slices(slices.halves, kept, 4, renumbered=True)
    assert moved.blocks == {1: 0, 2: 1, 3: 2}
    assert moved.name("model.layers.2.mlp.up_proj.bias") == "model.layers.1.mlp.up_proj.bias"
    assert moved.name("model.layers.0.mlp.up_proj.bias") is None
    assert moved.name("lm_head.weight") == "lm_head.weight"


def test_the_record_gives_the_same_slices_back(slices):
    record = slices.to_record()
    assert record["model.layers.1.self_attn"] == {
        "groups": 4, "kept": "1,3", "module": "model.layers.1.self_attn",
    }  # fmt: skip
    assert record["model.layers.3.self_attn"] == {"groups": 4, "kept": "", "module": ""}
    assert Slices.from_record(record, slices.halves, 4) == slices


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": 5}, "of another model: model.layers.1.mlp"),
        ({"kept": "0-24"}, "of another model: model.layers.1.mlp"),
        ({"kept": "3-x"}, "structure: ValueError"),
        ({"kept": 3}, "structure: AttributeError|structure: TypeError"),
    ],
)
def test_a_damaged_record_is_refused(change, words, slices):
    record = slices.to_record()
    record["model.layers.1.mlp"] |= change
    with pytest.raises(FormatError, match=words):
        Slices.from_record(record, slices.halves, 4)


def test_a_record_without_a_half_of_the_model_is_refused(slices):
    record = slices.to_record()
    del record["model.layers.0.mlp"]
    with pytest.raises(FormatError, match="of another model"):
        Slices.from_record(record, slices.halves, 4)
