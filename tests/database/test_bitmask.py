"""Kept values and a bitmask: what they were made of, in the bytes that they must take."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.database.bitmask import bitmask_bytes, pack_bitmask, unpack_bitmask
from msp_plugin.errors import FormatError

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(BITS[a.element_size()]), b.view(BITS[b.element_size()]))


@given(st.sampled_from(DTYPES), st.integers(1, 7), st.integers(1, 19), st.floats(0, 1), st.integers(0, 10**6))
def test_a_weight_comes_back_bit_for_bit_but_for_the_sign_of_its_zeros(dtype, rows, columns, share, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    weight[torch.rand(rows, columns, generator=generator) < share] = 0
    odd = torch.tensor([float("nan"), float("inf"), 1e-8, -float("inf")], dtype=dtype)
    at = torch.randint(rows * columns, (4,), generator=generator)
    weight.view(-1)[at] = odd
    values, mask = pack_bitmask(torch.where(weight == 0, -weight, weight))
    assert same_bits(unpack_bitmask(values, mask, (rows, columns)), weight)
    assert values.dtype == dtype and values.dim() == 1 and mask.dtype == torch.uint8
    zeros = int((weight == 0).sum())
    assert len(values) == rows * columns - zeros and len(mask) == bitmask_bytes(rows, columns)


def test_the_bitmask_is_little_endian_over_the_rows():
    weight = torch.tensor([[1.0, 0, 0, 0, 0], [0, -0.0, 0, 2.0, -3.0]])
    values, mask = pack_bitmask(weight)
    assert values.tolist() == [1.0, 2.0, -3.0] and mask.tolist() == [1, 0b11]


def test_a_transposed_weight_is_packed_as_it_reads():
    weight = torch.tensor([[1.0, 0.0], [2.0, 3.0]]).T
    values, mask = pack_bitmask(weight)
    assert torch.equal(unpack_bitmask(values, mask, (2, 2)), weight)


@pytest.mark.parametrize(
    ("count", "bytes_", "words"), [(2, 1, "3 ones, there are 2"), (4, 1, "3 ones"), (3, 2, "2 bytes")]
)
def test_parts_that_do_not_belong_together_are_refused(count, bytes_, words):
    mask = torch.tensor([0b111, 0], dtype=torch.uint8)[:bytes_]
    with pytest.raises(FormatError, match=words):
        unpack_bitmask(torch.ones(count), mask, (2, 4))
