"""Memory that is freed goes back to the system."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
import torch

from msp_plugin.errors import ModelError
from msp_plugin.runtime.memory import free_cached, retried, shortage_explained

MIB = 2**20


def resident() -> int:
    """Return the bytes of this process in memory that are no file's."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide for themselves")
def test_the_many_small_tensors_of_a_step_are_not_resident_after_it():
    free_cached()  # what other tests have left
    before = resident()
    # 250 MiB, in pieces that come from the heap, where other tests may have left some that are resident.
    tensors = [torch.ones(16384) for _ in range(4000)]
    last = tensors.pop()  # lies behind them: the heap cannot just be made shorter
    assert resident() - before > 100 * MIB
    del tensors
    assert resident() - before > 100 * MIB
    free_cached()
    assert resident() - before < 25 * MIB
    assert last.sum() == 16384


def test_work_is_tried_again_once_what_is_held_is_let_go():
    held, calls = [1], []

    def work():
        calls.append(len(held))
        if held:
            raise MemoryError
        return "done"

    def release():
        found = bool(held)
        held.clear()
        return found

    assert retried(work, release) == "done" and calls == [1, 0]
    held.append(1)
    with pytest.raises(MemoryError):
        retried(work, lambda: False)
    with pytest.raises(MemoryError):
        retried(work, lambda: True)  # it does not suffice even then
    assert len(calls) == 5


def test_a_shortage_is_explained_and_any_other_error_comes_through():
    explained = pytest.raises(ModelError, match="one sample does not fit into memory")
    with explained as error, shortage_explained("one sample does", "shorter samples"):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore lines")
    assert "give shorter samples" in error.value.hint and "more lines" not in str(error.value)
    with (
        pytest.raises(RuntimeError, match="^mine$"),
        shortage_explained("one sample does", "shorter samples"),
    ):
        raise RuntimeError("mine")
