"""Losses that are read from a journal."""

import math

import numpy as np
import pytest

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.runtime.journal import Journal
from msp_plugin.search.recorded import RecordedLoss

ABOUT = {"model": "a", "seed": 0}


class Loss:
    """Counts what it is asked; two tokens a sample."""

    def __init__(self):
        self.calls, self.kept, self.forward_tokens = [], [], 0

    def __call__(self, choice, samples=None):
        self.calls.append((choice, samples))
        self.forward_tokens += 2 * (3 if samples is None else len(samples))
        return math.inf if choice == (9,) else sum(choice) / 3

    def move_gradients(self, choice, samples, reach, seed):
        self.calls.append((choice, samples, reach, seed))
        self.forward_tokens += 10 * len(samples)
        found = np.random.default_rng(seed).standard_normal((2, len(samples), 2, 3))
        found[:, :, 1, 2] = np.nan
        return tuple(found)

    def set_incumbent(self, choice):
        self.kept.append(choice)


@pytest.fixture
def open_loss(tmp_path, make_samples):
    made = []

    def opened(about=ABOUT):
        def make():
            made.append(Loss())
            return made[-1]

        journal = Journal(tmp_path / "j" / "search.jsonl", about)
        return RecordedLoss(make, CalibrationSet(make_samples(3, 2).samples, ""), journal, "search"), made

    return opened


def ask(loss):
    loss.set_incumbent((0, 1))
    gradients = loss.move_gradients((0, 1), (0, 2), 2, 7)
    values = [
        loss((0, 1)),
        loss((9,)),
        loss((0, 1), (1,)),
        loss((0, 1)),
        *gradients[0].flat,
        *gradients[1].flat,
    ]
    return values, loss.forward_tokens


def test_what_was_measured_once_is_read_bit_for_bit_without_a_model(open_loss):
    first, made = open_loss()
    expected = ask(first)
    assert expected[1] == 20 + 6 + 6 + 2 + 6  # asked twice counts twice, as without a journal
    assert len(made) == 1 and len(made[0].calls) == 4 and made[0].kept == [(0, 1)]
    assert first.saved_seconds == 0.0
    again, made = open_loss()
    found = ask(again)
    assert np.array_equal(found[0], expected[0], equal_nan=True) and found[1] == expected[1]
    assert len(made) == 1 and again.lengths == (2, 2, 2)


def test_the_first_value_that_is_missing_is_measured_around_the_kept_choice(open_loss):
    ask(open_loss()[0])
    again, made = open_loss()
    ask(again)
    assert again((1, 1)) == 2 / 3
    assert len(made) == 2 and made[1].calls == [((1, 1), None)] and made[1].kept == [(0, 1)]


@pytest.mark.parametrize("keep", range(0, 700, 23))
def test_a_file_cut_anywhere_gives_the_same_values_and_no_warning(open_loss, tmp_path, keep, caplog):
    expected = ask(open_loss()[0])[0]
    path = tmp_path / "j" / "search.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: min(keep, len(whole) - 1)])
    assert np.array_equal(ask(open_loss()[0])[0], expected, equal_nan=True)
    assert not caplog.records
    final, made = open_loss()
    ask(final)
    assert len(made) == 2  # the third found everything


def test_a_damaged_line_is_named_and_measured_anew_and_the_others_are_kept(open_loss, tmp_path, caplog):
    expected = ask(open_loss()[0])[0]
    path = tmp_path / "j" / "search.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"value", b"valve")
    path.write_bytes(b"".join(lines))
    loss, made = open_loss()
    assert f"{path}: 1 damaged lines are measured again" in caplog.text
    assert np.array_equal(ask(loss)[0], expected, equal_nan=True) and len(made[1].calls) == 1


@pytest.mark.parametrize("content", [b"\xff\x00garbage\n", b"{}\n", b"00000000 {}\n"])
def test_a_file_of_something_else_is_begun_anew(open_loss, tmp_path, content, caplog):
    path = tmp_path / "j" / "search.jsonl"
    path.parent.mkdir()
    path.write_bytes(content)
    ask(open_loss()[0])
    assert "it starts again" in caplog.text and b"garbage" not in path.read_bytes()


def test_another_identity_does_not_read_the_values(open_loss, caplog):
    ask(open_loss()[0])
    ask(open_loss({"model": "b"})[0])
    other, made = open_loss({"model": "b"})
    ask(other)
    assert len(made) == 2 and "belongs to another model, seed: it" in caplog.text
