"""The text that a search gets, that its hold-out loss gets, and what is left for calibration."""

import dataclasses

import pytest
import torch

from msp_plugin.allocators.base import AllocationResult
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import split_text
from msp_plugin.errors import DataError, RecipeError
from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.search import level_database
from msp_plugin.search.allocate import check_model, make_problem, uniform_levels
from msp_plugin.search.level_database import open_database
from tests.helpers.allocating import MSP, allocate


def parts(data, made):
    text = split_text(data, made.search_text)
    return text.calibration, text.search, text.holdout


def database_of(model, data, made):
    table = check_model(model, made)
    levels = uniform_levels(make_problem(model, table, made))
    prefix = {layer.name: level for unit, level in zip(table, levels, strict=True) for layer in unit.layers}
    return open_database(fingerprint(model), data, made.pruner, made.menu, made.cache, prefix=prefix)


def test_a_search_without_text_is_refused(llama, msp_plan):
    with pytest.raises(RecipeError, match="allocator 'msp' needs calibration text") as error:
        allocate(llama, None, msp_plan())
    assert "dataset" in error.value.hint


def test_too_little_text_for_the_search_is_refused(llama, data, msp_plan):
    with pytest.raises(DataError, match="asks for 100 held-out tokens, but 6 .* 144 tokens leave at most 72"):
        allocate(llama, data, msp_plan(allocator={**MSP, "tokens": 100}))


def test_the_held_out_samples_do_not_calibrate(llama, data, msp_plan, tmp_path):
    made = msp_plan(method="wanda")
    head, tail = data.split(48)
    allocate(llama, data, made)
    database = database_of(llama, head, made)
    assert database.path.is_dir() and len(tail) == 2
    assert not database_of(llama, data, made).path.exists()


@pytest.mark.parametrize("lengths, tokens, holdout, expected", [
    ([24] * 6, 48, 24, ([24] * 3, [24] * 2, [24])),
    ([24] * 8, 40, 30, ([24] * 4, [24] * 2, [24] * 2)),  # a hold-out of whole samples takes none of the search's
    ([24] * 6, 10, 10, ([24] * 4, [24], [24])),
    ([10, 50, 7, 40, 9, 20], 35, 25, ([10, 50, 7], [40], [9, 20])),
    ([10, 50, 60, 5, 6, 30, 9, 20], 31, 25, ([10, 50, 60, 5], [6, 30], [9, 20])),
    ([24] * 6, 48, 0, ([24] * 4, [24] * 2, [])),
])  # fmt: skip
def test_the_search_gets_as_much_text_as_it_asks_for_and_so_does_the_hold_out(
    msp_plan, lengths, tokens, holdout, expected
):
    made = msp_plan()

    class Stopping(type(made.allocator)):
        stopping_tokens = holdout

    made = dataclasses.replace(made, allocator=Stopping(tokens=tokens))
    samples = tuple(torch.full((length,), i) for i, length in enumerate(lengths))
    found = parts(CalibrationSet(samples, "some"), made)
    assert tuple([len(sample) for sample in part.samples] for part in found) == expected
    joined = [sample for part in found for sample in part.samples]
    assert all(torch.equal(a, b) for a, b in zip(joined, samples, strict=True))


def test_the_three_parts_are_used_for_what_they_are_for(llama, make_samples, msp_plan, monkeypatch):
    data, seen = make_samples(10), {}
    made = msp_plan(method="wanda")

    class Stopping(type(made.allocator)):
        stopping_tokens = 48

        def allocate(self, inputs):
            seen["search"], seen["holdout"] = inputs.loss.data.samples, inputs.holdout.data.samples
            return AllocationResult(inputs.problem.uniform())

    original = level_database.build_database

    def build(database, model, table, pruner, samples, **options):
        seen["statistics"] = samples.samples
        return original(database, model, table, pruner, samples, **options)

    monkeypatch.setattr(level_database, "build_database", build)
    allocate(llama, data, dataclasses.replace(made, allocator=Stopping(tokens=48)))
    assert {name: [len(part), [torch.equal(a, b) for a in part for b in data.samples].index(True)]
            for name, part in seen.items()} == {"statistics": [6, 0], "search": [2, 6], "holdout": [2, 8]}  # fmt: skip


@pytest.mark.parametrize("count, expected", [(2, (1, 1, 0)), (6, (3, 2, 1)), (64, (32, 21, 11))])
def test_a_search_whose_defaults_ask_for_more_text_than_there_is_takes_half(
    msp_plan, make_samples, caplog, count, expected
):
    made = msp_plan(allocator="search")
    found = parts(make_samples(count), made)
    assert tuple(map(len, found)) == expected
    assert f"candidates are measured on {24 * expected[1]} tokens" in caplog.text


@pytest.mark.parametrize("option", [{"tokens": 8192}, {"holdout": 4096}])
def test_text_that_was_asked_for_by_name_is_not_made_less(msp_plan, make_samples, option):
    with pytest.raises(DataError, match="held-out tokens"):
        parts(make_samples(6), msp_plan(allocator={"name": "search", **option}))


def test_a_search_with_its_defaults_starts_on_a_few_short_samples(llama, msp_plan, make_samples):
    made = msp_plan(method="magnitude", allocator={"name": "search", "rounds": 1})
    assert allocate(llama, make_samples(4), made).allocation.budget.exact
