"""Whatever was measured is read from the cache, as long as all that it depends on is the same."""

import re
from fractions import Fraction

import numpy as np
import pytest

from msp_plugin.allocators.base import AllocationResult
from msp_plugin.models.layers import prunable_layers
from msp_plugin.passes.gradients import backward_passes
from msp_plugin.pruning.magnitude import Magnitude
from msp_plugin.runtime.files import cache_directory
from msp_plugin.search import keys, level_database, measurements
from msp_plugin.sensitivity import fisher as fisher_module
from msp_plugin.sensitivity import fisher_error
from msp_plugin.sensitivity.fisher import FisherTrace
from tests.helpers.clock import make_losses_slow
from tests.helpers.losses import MENU
from tests.helpers.measuring import Asking, problem_of, times


def test_everything_is_measured_once_for_all_allocators_budgets_and_seeds(
    make_measurements, count, tmp_path, bits
):
    built, fishers, prints = (
        count(level_database, "build_database"),
        count(measurements, "fisher_errors"),
        count(measurements, "fingerprint"),
    )
    held = make_measurements()
    before = bits(held.model)
    asking = Asking()
    held.allocate(asking, problem_of(held), 0)
    files, first = times(tmp_path), asking.seen[0][0]
    zeros = len(held.estimators["zeros"].calls)
    for allocator, target, seed in [
        (Asking(), Fraction(5, 8), 1), (Asking(errors=("fisher", "kl")), Fraction(1, 4), 2),
    ]:  # fmt: skip
        held.allocate(allocator, problem_of(held, target), seed)
        inputs = allocator.seen[0][0]
        assert (inputs.seed, inputs.problem.target) == (seed, target)
        for name, values in inputs.errors.items():
            assert np.array_equal(values, first.errors[name])
        assert {k: v.tolist() for k, v in inputs.sensitivities.items()} == {
            k: v.tolist() for k, v in first.sensitivities.items()
        }
    assert (len(built), len(fishers), len(prints), zeros) == (1, 1, 1, 1)
    assert len(held.estimators["zeros"].calls) == 1 and times(tmp_path) == files
    assert bits(held.model) == before


def test_code_that_measures_differently_reads_nothing_of_the_old(make_measurements, count, monkeypatch):
    calls = count(measurements, "fisher_errors")
    for code in ("", "edited", "edited"):
        if code:
            monkeypatch.setattr(keys, "measuring_code", lambda: "edited")
        make_measurements().error("fisher")
    assert len(calls) == 3  # each object asks; what is measured is in the journals
    names = {path.name for path in cache_directory(make_measurements().cache).rglob("fisher-error-*.jsonl")}
    assert len(names) == 2


@pytest.fixture
def passes(monkeypatch):
    """Count the backward passes over samples."""
    calls = []

    def counting(model, data, *rest):
        calls.append(len(data))
        return backward_passes(model, data, *rest)

    monkeypatch.setattr(fisher_module, "backward_passes", counting)
    monkeypatch.setattr(fisher_error, "backward_passes", counting)
    return calls


def test_a_second_object_reads_from_disk_what_the_first_measured(make_measurements, count, passes, tmp_path):
    def ask(held):
        kl, measured = held.replace_one(48)
        return held.error("fisher"), kl, measured.forward_tokens, held.sensitivity("fisher")

    expected, files = ask(make_measurements()), times(tmp_path)
    passes.clear()
    losses = count(measurements, "CandidateLoss")
    found = ask(make_measurements())
    assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])
    assert found[2:] == expected[2:] and not passes and not losses and times(tmp_path) == files


def test_a_sensitivity_that_was_stopped_goes_on_with_the_next_samples(
    make_measurements, make_samples, monkeypatch, passes
):
    monkeypatch.setattr("msp_plugin.sensitivity.base.TOGETHER", 2)
    expected = make_measurements().sensitivity("fisher")
    assert passes == [1] * 4

    def stop(step, done, total):
        if done == 2:
            raise KeyboardInterrupt

    passes.clear()
    with pytest.raises(KeyboardInterrupt):
        make_measurements(progress=stop, fresh=True).sensitivity("fisher")
    assert passes == [1] * 2
    assert make_measurements().sensitivity("fisher") == expected and passes == [1] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("fisher-error", lambda text: text[: len(text) // 2]),
        ("replace-one", lambda text: text[: len(text) // 2]),
        ("fisher", lambda text: ""),
        ("fisher", lambda text: "[1, 2]\n"),
        ("replace-one", lambda text: "\0\xff\n"),
        ("fisher-error", lambda text: text.replace('"value"', '"lost"')),
        ("fisher", lambda text: re.sub(r"(\d)e", r"\g<1>1e", text)),
        ("replace-one", lambda text: re.sub(r"(\d)e", r"\g<1>1e", text)),
    ],
    ids=["cut", "cut losses", "empty", "a list", "binary", "renamed", "digits", "digits of losses"],
)
def test_a_file_that_is_damaged_is_measured_anew(make_measurements, tmp_path, name, damage, caplog):
    def ask(held):
        return {
            "fisher-error": lambda: held.error("fisher"), "fisher": lambda: held.sensitivity("fisher"),
            "replace-one": lambda: held.replace_one(24)[0],
        }[name]()  # fmt: skip

    expected = ask(make_measurements())
    (path,) = (tmp_path / "cache").rglob(f"{name}-????????????????.jsonl")
    text = path.read_text()
    path.write_text(damage(text), encoding="latin-1")
    changed = path.read_bytes() != text.encode()
    assert np.array_equal(ask(make_measurements()), expected)
    values = [re.sub(r'^\w+ |"seconds": [\d.e-]+', "", line) for line in path.read_text().splitlines()]
    assert values == [re.sub(r'^\w+ |"seconds": [\d.e-]+', "", line) for line in text.splitlines()]
    assert (str(path) in caplog.text) == (
        changed and path.read_bytes()[-1:] == b"\n" and damage(text)[-1:] == "\n"
    )


def test_other_text_units_or_method_are_measured_on_their_own(
    make_measurements, count, make_samples, tmp_path
):
    calls = count(measurements, "fisher_errors")
    make_measurements().error("fisher")
    other = make_samples(4, seed=3)
    changes = [
        {"estimators": {"fisher": FisherTrace(samples=3)}}, {"calibration": other}, {"pruner": Magnitude()},
        {"pruner": Magnitude(), "calibration": other}, {"menu": MENU[1:]},
    ]  # fmt: skip
    for number, change in enumerate(changes, 2):
        make_measurements(**change).error("fisher")
        assert len(calls) == number
    make_measurements().replace_one(24)
    make_measurements().replace_one(48)
    make_measurements(search=other).replace_one(24)
    by_layer = prunable_layers(make_measurements().model, granularity="layer")
    assert make_measurements(table=by_layer).replace_one(24)[0].shape == (14, 3)
    assert len(list((tmp_path / "cache").rglob("replace-one-*.jsonl"))) == 4


def test_what_an_estimate_rests_on_is_part_of_its_journal(make_measurements, make_samples):
    class Remeasuring(Asking):
        def allocate(self, inputs):
            self.seen.append(inputs.estimate("fisher", inputs.problem.uniform()))
            return AllocationResult(inputs.problem.uniform())

    def ask(**changes):
        held, allocator = (
            make_measurements(pruner=Magnitude(), **changes),
            Remeasuring(errors=(), sensitivities=("fisher",)),
        )
        held.allocate(allocator, problem_of(held), 0)
        return allocator.seen[0].tolist()

    first = ask()
    assert ask() == first
    assert ask(estimators={"fisher": FisherTrace(samples=2)}) != first
    assert ask(calibration=make_samples(4, seed=9)) != first


def test_a_search_that_is_read_from_its_journal_has_the_time_that_it_had_taken(
    make_measurements, monkeypatch
):
    late = make_losses_slow(monkeypatch)

    class Timed(Asking):
        def allocate(self, inputs):
            began = inputs.clock()
            inputs.loss(inputs.problem.uniform())
            self.seen.append(inputs.clock() - began)
            return AllocationResult(inputs.problem.uniform())

    taken, saved = [], []
    for _ in range(2):
        held, allocator = make_measurements(), Timed(errors=(), sensitivities=())
        _, record = held.allocate(allocator, problem_of(held), 0)
        taken += [*allocator.seen, record.seconds]
        saved.append(held.saved_seconds)
    assert late == [1000.0] and [round(seconds, -3) for seconds in taken] == [1000.0] * 4
    assert [round(seconds, -3) for seconds in saved] == [0.0, 1000.0]
