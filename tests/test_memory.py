"""Memory that is freed goes back to the system."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
import torch

from msp_plugin.runtime.memory import free_cached

MIB = 2**20


def resident() -> int:
    """Return the bytes of this process in memory that are no file's."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide for themselves")
def test_the_many_small_tensors_of_a_step_are_not_resident_after_it():
    free_cached()  # what other tests have left
    before = resident()
    tensors = [torch.ones(16384) for _ in range(2000)]  # 125 MiB, in pieces that come from the heap
    last = tensors.pop()  # lies behind them: the heap cannot just be made shorter
    assert resident() - before > 100 * MIB
    del tensors
    assert resident() - before > 100 * MIB
    free_cached()
    assert resident() - before < 25 * MIB
    assert last.sum() == 16384
