"""Packed weights lie in huge pages, one behind the other, and their memory goes back when they are gone."""

import gc
import mmap
import os
from pathlib import Path

import pytest
import torch

from msp_plugin.serving.cpu.kernel import pack_dense
from msp_plugin.serving.cpu.memory import _Memory, in_huge_pages

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without huge pages")

#: What Linux says of huge pages.
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Memory of the test's own, which no other test's weights keep alive."""
    monkeypatch.setattr("msp_plugin.serving.cpu.memory._memory", _Memory())


def packed(rows: int, seed: int = 0):
    torch.manual_seed(seed)
    weight = torch.randn(rows, 64).to(torch.bfloat16)
    weight[:, ::2] = 0
    return pack_dense(weight)


def mapping_of(address: int) -> str | None:
    """Return what Linux says of the mapping that holds an address."""
    parts: list[list[str]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            parts.append([])
        parts[-1].append(line)
    for part in parts:
        start, end = (int(number, 16) for number in part[0].split()[0].split("-"))
        if start <= address < end:
            return "\n".join(part)
    return None


def test_values_and_bitmask_are_the_same_in_memory_that_asks_for_huge_pages():
    weight = packed(24)
    held = in_huge_pages(weight)
    assert torch.equal(held.values, weight.values) and torch.equal(held.bitmask, weight.bitmask)
    for tensor in (held.values, held.bitmask):
        flags = mapping_of(tensor.data_ptr())
        assert tensor.data_ptr() % 64 == 0 and flags is not None and " hg" in flags.partition("VmFlags:")[2]


@pytest.mark.skipif(
    not ENABLED.is_file() or "[never]" in ENABLED.read_text(), reason="a system that gives no huge pages"
)
def test_the_system_gives_huge_pages():
    held = in_huge_pages(packed(1 << 16))  # 4 MiB of values
    assert "AnonHugePages:         0 kB" not in mapping_of(held.values.data_ptr())


def test_a_forked_process_does_not_write_into_this_ones_weights():
    before = in_huge_pages(packed(8))
    child = os.fork()
    if not child:
        in_huge_pages(packed(8, 1))
        before.values.fill_(7)
        os._exit(0)
    os.waitpid(child, 0)
    assert torch.equal(before.values, packed(8).values)
    assert torch.equal(in_huge_pages(packed(8, 2)).values, packed(8, 2).values)


def test_weights_lie_one_behind_the_other():
    first, second = in_huge_pages(packed(8)), in_huge_pages(packed(8, 1))
    places = [t.data_ptr() for w in (first, second) for t in (w.values, w.bitmask)]
    assert places == sorted(places) and places[-1] - places[0] < 4096
    assert torch.equal(first.values, packed(8).values)  # the second one was not written over it


def test_a_weight_larger_than_a_chunk_has_one_of_its_own(monkeypatch):
    monkeypatch.setattr("msp_plugin.serving.cpu.memory._CHUNK", 1 << 16)
    weight = packed(1 << 16)
    held = in_huge_pages(weight)
    assert held.values.nbytes > 1 << 16 and torch.equal(held.values, weight.values)


def test_memory_goes_back_when_the_last_weight_in_it_is_gone():
    held = [in_huge_pages(packed(8, seed)) for seed in range(2)]
    address = held[1].bitmask.data_ptr()
    del held[0]
    assert mapping_of(address) is not None
    held.clear()
    gc.collect()
    flags = mapping_of(address)
    assert flags is None or " hg" not in flags.partition("VmFlags:")[2]
