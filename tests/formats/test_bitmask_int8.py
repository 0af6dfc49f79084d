"""The bitmask layout with values in int8, against quantization weight by weight, and everything that must be refused."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.errors import FormatError
from msp_plugin.formats.bitmask import SparseBitmask
from msp_plugin.formats.bitmask_int8 import MOST_ERROR, SUFFIXES, Int8Bitmask, dequantize, error, quantize
from msp_plugin.plan.levels import Level
from msp_plugin.serving.cpu.kernel import DTYPES

FORMAT = Int8Bitmask()


def weight_of(dtype, rows, columns, share, scale, seed):
    """A weight whose rows have magnitudes about powers of two around ``scale``, down to subnormal numbers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= 2.0 ** (scale + torch.randint(-3, 4, (rows, 1), generator=generator))
    weight[torch.rand(rows, columns, generator=generator) < share] = 0
    return weight.to(dtype)


weights = st.builds(
    weight_of,
    st.sampled_from(DTYPES),
    st.integers(1, 6),
    st.integers(1, 41),
    st.sampled_from([0, 0.1, 0.5, 0.75, 0.97, 1]),
    st.sampled_from([-140, -24, -16, -5, 0, 10]),
    st.integers(0, 2**32),
)


def exact(number):
    return Fraction(float(number))


@given(weights)
def test_each_value_is_the_nearest_multiple_of_its_rows_scale_and_the_largest_takes_the_whole_range(weight):
    values, scale = quantize(weight)
    assert (values.dtype, values.shape) == (torch.int8, weight.shape)
    assert (scale.dtype, scale.shape) == (weight.dtype, weight.shape[:1])
    smallest = torch.finfo(weight.dtype).smallest_normal
    for row, numbers, step in zip(weight, values, scale, strict=True):
        largest = max(abs(exact(w)) for w in row)
        if not largest:
            assert float(step) == 1 and not numbers.any()
        elif largest / 127 >= smallest:
            assert int(numbers.abs().max()) == 127
            assert abs(exact(step) * 127 / largest - 1) <= Fraction(torch.finfo(weight.dtype).eps)
        for w, q in zip(row, numbers, strict=True):
            assert -127 <= int(q) <= 127
            assert abs(exact(w) - int(q) * exact(step)) <= exact(step) / 2


@given(weights)
def test_what_comes_back_is_value_times_scale_rounded_once_and_zeros_stay_zeros(weight):
    tensors = FORMAT.pack(weight, "layer")
    values, scale = quantize(weight)
    found = FORMAT.unpack(tensors, "layer")
    expected = (values.double() * scale.double()[:, None]).to(weight.dtype)
    assert found.dtype == weight.dtype and torch.equal(found, expected)
    assert not found[weight == 0].any()
    wide = FORMAT.unpack({**tensors, "scale": tensors["scale"].float()}, "layer")
    assert wide.dtype == torch.float32 and torch.equal(
        wide, (values.double() * scale.double()[:, None]).float()
    )


@given(weights)
def test_the_tensors_are_those_of_the_layout_of_the_values(weight):
    tensors, (values, scale) = FORMAT.pack(weight, "layer"), quantize(weight)
    plain = SparseBitmask().pack(values, "layer")
    assert list(tensors) == list(SUFFIXES) and torch.equal(tensors["scale"], scale)
    assert all(torch.equal(tensors[suffix], tensor) for suffix, tensor in plain.items())
    kept = np.unpackbits(tensors["bitmask"].numpy(), axis=1, count=weight.shape[1], bitorder="little")
    assert torch.equal(torch.from_numpy(kept) == 1, values != 0) and bool((tensors["compressed"] != 0).all())
    size = FORMAT.sizes(tuple(weight.shape), weight.dtype, len(tensors["compressed"]))
    assert size == {suffix: tensor.nbytes for suffix, tensor in tensors.items()}


def test_two_rows_by_hand():
    weight = torch.tensor([[127.0, 0, -63.6, 0.4], [0, 0, 0, 0], [0, -0.5, 0.25, 0]])
    values, scale = quantize(weight)
    assert scale.tolist() == [1, 1, float(torch.tensor(0.5) / 127)]
    assert values.tolist() == [[127, 0, -64, 0], [0] * 4, [0, -127, 64, 0]]  # a half goes to the even number
    tensors = FORMAT.pack(weight, "layer")
    assert tensors["compressed"].tolist() == [
        127,
        -64,
        -127,
        64,
    ]  # 0.4 rounds to zero, and leaves the bitmask
    assert tensors["bitmask"].tolist() == [[0b101], [0], [0b110]]


@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 2.0**-24), (torch.bfloat16, 2.0**-133)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_of_a_row_is_in_range_where_half_a_subnormal_scale_is_over(dtype, least, sign):
    weight = torch.tensor([[sign * 255 * least, 3 * least]]).to(dtype)
    values, scale = quantize(weight)
    assert scale.item() == 3 * least and values.tolist() == [[sign * 85, 1]]


def test_at_2_8_it_takes_three_sixteenths_of_16_bits_and_ten_bytes_a_row():
    rows, columns = 64, 512
    sizes = FORMAT.sizes((rows, columns), torch.bfloat16, rows * columns // 4)
    assert sum(sizes.values()) - sizes["shape"] == 2 * rows * columns * 3 // 16 + 10 * rows
    packed, dense = sum(sizes.values()), 2 * rows * columns
    level = Level.parse("2:8")
    assert packed < dense and FORMAT.refuses("m.0.up", (rows, columns), torch.bfloat16, level) is None


def test_the_error_is_that_of_frobenius_norms():
    weight = torch.tensor([[3.0, 0], [0, 4]])
    assert error(weight, torch.tensor([[3.0, 0], [0, 3]])) == pytest.approx(1 / 5)
    assert error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert 0.003 < error(plain(), dequantize(*quantize(plain()))) < 0.02


def plain():
    return weight_of(torch.bfloat16, 64, 512, 0.5, 0, 1)


def test_a_layer_that_one_scale_a_row_does_not_fit_is_refused_with_how_much_it_would_change():
    weight = plain()
    assert FORMAT.refuses_weight(weight) is None
    weight[:, 0] = 100
    reason = FORMAT.refuses_weight(weight)
    assert reason.startswith("int8 changes it too much (by 0.") and f"at most {MOST_ERROR:g}" in reason


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_row_and_name(number):
    weight = plain()
    weight[3, 5] = number
    assert FORMAT.refuses_weight(weight) == "row 3 holds weights that are not finite"
    with pytest.raises(FormatError, match=r"m\.up: row 3 holds weights that are not finite"):
        FORMAT.pack(weight, "m.up")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64])
def test_weights_of_another_type_are_refused(dtype):
    with pytest.raises(FormatError, match="cannot be stored in int8"):
        FORMAT.pack(torch.ones(4, 8, dtype=dtype), "m.up")


# damage


def example(**changes):
    return {**FORMAT.pack(weight_of(torch.bfloat16, 4, 13, 0.5, 0, 3), "m.up"), **changes}


def scale_with(number):
    scale = example()["scale"].clone()
    scale[2] = number
    return scale


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"compressed": example()["compressed"].bfloat16()},
            "its values are torch.bfloat16, expected torch.int8",
        ),
        (
            {"compressed": example()["compressed"].clone().index_fill_(0, torch.tensor([2]), -128)},
            "below -127",
        ),
        ({"compressed": example()["compressed"].clone().index_fill_(0, torch.tensor([2]), 0)}, "values of 0"),
        ({"compressed": example()["compressed"][1:]}, "the bitmask keeps"),
        ({"bitmask": example()["bitmask"] ^ 1}, "the bitmask keeps|starts at value"),
        ({"row_offsets": example()["row_offsets"].flip(0)}, "row 0 starts at value"),
        ({"scale": scale_with(math.nan)}, "not above 0, or not finite"),
        ({"scale": scale_with(math.inf)}, "not above 0, or not finite"),
        ({"scale": scale_with(-1)}, "not above 0"),
        ({"scale": scale_with(0)}, "not above 0"),
        (
            {"scale": example()["scale"][1:]},
            r"its scale is torch.bfloat16 \[3\], expected a number for each row",
        ),
        ({"scale": example()["scale"][:, None]}, r"its scale is torch.bfloat16 \[4, 1\]"),
        ({"scale": example()["scale"].double()}, "its scale is torch.float64"),
        ({"shape": torch.tensor([4, 17])}, "do not belong to a weight"),
    ],
)
def test_damaged_tensors_are_refused_by_name(changes, words):
    with pytest.raises(FormatError, match=f"m.up.*({words})"):
        FORMAT.unpack(example(**changes), "m.up")


@pytest.fixture
def stored(headers):
    """Write a packed layer's tensors, some of them changed; return their headers."""
    return lambda **changes: headers(example(**changes))


def test_the_header_is_that_of_the_weight_in_the_scales_type(stored):
    found = FORMAT.header(stored(), "m.up")
    assert (found.dtype, found.shape) == (torch.bfloat16, (4, 13))


@pytest.mark.parametrize(
    "changes",
    [
        {"compressed": torch.zeros(9, dtype=torch.bfloat16)},
        {"scale": torch.ones(3, dtype=torch.bfloat16)},
        {"scale": torch.ones(4, dtype=torch.float64)},
        {"scale": torch.ones(4, dtype=torch.int8)},
    ],
)
def test_headers_that_cannot_be_those_of_a_packed_weight_are_refused(changes, stored):
    with pytest.raises(FormatError, match="m.up is not a packed weight"):
        FORMAT.header(stored(**changes), "m.up")
