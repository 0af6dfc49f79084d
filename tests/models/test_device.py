"""A number type that the CPU multiplies slowly is warned of, once, where that costs a user time."""

import logging

import pytest
import torch

from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.demo import demo_model_path
from msp_plugin.models import device


@pytest.fixture
def warnings(monkeypatch, caplog):
    """Return the warnings of loading the bfloat16 demo model, with a given size and slowness to warn of."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def warnings(large, slow, dtype="auto", times=1):
        device._warn_of.cache_clear()
        caplog.clear()
        monkeypatch.setattr(device, "LARGE", large)
        monkeypatch.setattr(device, "SLOW", slow)
        with caplog.at_level(logging.WARNING, device.__name__):
            for _ in range(times):
                ModelSource(demo_model_path(), dtype).load()
        return [record.getMessage() for record in caplog.records if record.name == device.__name__]

    yield warnings
    device._warn_of.cache_clear()


def test_a_large_model_in_a_slow_type_is_warned_of_once(warnings):
    (said,) = warnings(large=1, slow=0.0, times=2)
    assert said.startswith("this CPU multiplies bfloat16 ") and "dtype float32 is faster here" in said


def test_a_small_model_a_fast_type_and_a_type_that_was_asked_for_are_not_warned_of(warnings):
    assert not warnings(large=10**9, slow=0.0)
    assert not warnings(large=1, slow=1e9)
    assert not warnings(large=1, slow=0.0, dtype="bfloat16")
    assert not warnings(large=1, slow=0.0, dtype="float32")
