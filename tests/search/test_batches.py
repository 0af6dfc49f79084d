"""Batches of samples: their sizes, and the choice of a size that fits into memory."""

import random

import pytest
import torch

from msp_plugin.errors import ModelError
from msp_plugin.search.batches import SHARES, Batches


def lengths_of(groups, batches):
    return [{batches.lengths[i] for i in group} for group in groups]


@pytest.mark.parametrize("tokens", [1, 24, 100, 4096])
def test_batches_are_neighbours_of_one_length_in_order(tokens):
    batches = Batches([12] * 20 + [7] * 5 + [12] * 3, tokens)
    groups = list(batches.of(range(28)))
    assert [i for group in groups for i in group] == list(range(28))
    assert all(len(lengths) == 1 for lengths in lengths_of(groups, batches))
    assert all(len(group) == 1 or sum(batches.lengths[i] for i in group) <= tokens for group in groups)


def test_ranks_get_equal_shares_where_there_are_as_many_samples():
    for count in (8, 16, 40, 130):
        sizes = [len(group) for group in Batches([16] * count, 64).of(range(count))]
        assert len(sizes) % SHARES == 0 and max(sizes) - min(sizes) <= 1


def test_no_selection_of_samples_gives_a_larger_batch_than_the_largest():
    rng = random.Random(0)  # noqa: S311 - a test, no secret
    for _ in range(200):
        batches = Batches(
            [rng.choice((3, 5, 8)) for _ in range(rng.randint(1, 40))], rng.choice((1, 16, 40, 64))
        )
        everything = range(len(batches.lengths))
        most = sum(batches.lengths[i] for i in batches.largest())
        for _ in range(20):
            some = sorted(rng.sample(everything, rng.randint(1, len(everything))))
            assert all(sum(batches.lengths[i] for i in group) <= most for group in batches.of(some))


@pytest.mark.parametrize("room", [1, 2, 3, 5, 7, 9])
def test_the_size_is_halved_until_the_largest_batch_fits(room, caplog):
    batches, tried = Batches([20] * 130, 180), []

    def measure(group):
        tried.append(len(group))
        if len(group) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert batches.fit(measure) == batches.tokens
    assert tried == sorted(set(tried), reverse=True) and tried[0] == 9 and tried[-1] <= room
    assert max(len(group) for group in batches.of(range(130))) <= room
    assert len(caplog.records) == (room < 9)


def test_a_sample_that_does_not_fit_is_an_error_and_any_other_error_comes_through():
    def raising(error):
        def measure(group):
            raise error

        return measure

    with pytest.raises(ModelError, match="one sample of 20 tokens does not fit"):
        Batches([20] * 3, 4096).fit(raising(MemoryError()))
    with pytest.raises(RuntimeError, match="^mine$"):
        Batches([20] * 3, 4096).fit(raising(RuntimeError("mine")))
