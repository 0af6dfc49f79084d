"""Products with packed weights on a CPU: every kernel against the dense product in float64, at all shapes and inputs."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msp_plugin.errors import FormatError, ServingError
from msp_plugin.formats import bitmask
from msp_plugin.formats.bitmask_int8 import dequantize, quantize
from msp_plugin.serving.cpu import build, kernel
from msp_plugin.serving.cpu.kernel import (
    DTYPES,
    FORCE,
    KERNELS,
    PackedWeight,
    check_structure,
    checked_choice,
    choose,
    equal_rows,
    linear,
    pack_dense,
    pays,
    self_check,
)

reason = build.load_operator()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"no kernels here: {reason}")
HERE = [k for k in KERNELS if reason is None and torch.ops.msp_plugin.cpu_supports(k)]
#: Rounding of the result, and of sums in float32 in any order.
ALLOWED = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 2**-16}


def weight_of(rows, columns, kept, dtype, seed=0):
    """Return a weight [rows, columns] that keeps about the share ``kept``, with an empty and a full row."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) >= kept] = 0
    if rows > 2:
        weight[0] = 0
        weight[1] = torch.randn(columns, generator=generator)
    return weight.to(dtype)


def inputs(tokens, columns, dtype):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(7)).to(dtype)


def assert_product(out, x, weight, bias=None):
    add = torch.zeros(len(weight)) if bias is None else bias.double()
    expected = x.double() @ weight.double().T + add
    scale = (
        (x.double().abs() @ weight.double().abs().T + add.abs()).max().clamp_min(1e-30) if out.numel() else 1
    )
    assert out.dtype == weight.dtype and out.shape == expected.shape
    if out.numel():
        assert float((out.double() - expected).abs().max() / scale) <= ALLOWED[weight.dtype]


#: Weights with and without bias, for hypothesis.
WEIGHTS = {
    "dtype": st.sampled_from(DTYPES),
    "rows": st.integers(1, 70),
    "columns": st.integers(1, 200),
    "kept": st.sampled_from([0.0, 0.125, 0.5, 1.0]),
    "biased": st.booleans(),
}


@pytest.mark.parametrize("kernel", HERE)
@settings(max_examples=25)
@given(
    **WEIGHTS,
    tokens=st.sampled_from([0, 1, 2, 3, 4, 5, 9, 16, 20, 33, 50, 65]),
)
def test_every_kernel_gives_the_dense_product(kernel, dtype, rows, columns, tokens, kept, biased):
    weight, x = weight_of(rows, columns, kept, dtype), inputs(tokens, columns, dtype)
    bias = inputs(1, rows, dtype)[0] if biased else None
    packed = pack_dense(weight)
    check_structure(packed, "w")
    assert_product(linear(x, packed, kernel, bias), x, weight, bias)


def int8_weight(weight):
    """Return a weight with values in int8, and the weight in float64 that it stands for."""
    values, scale = quantize(weight)
    stored = bitmask.pack(values)
    packed = PackedWeight(stored.values, stored.bitmask, stored.row_offsets, weight.shape[1], scale)
    return packed, values.double() * scale.double()[:, None]


@pytest.mark.parametrize("kernel", HERE)
@settings(max_examples=25)
@given(
    **WEIGHTS,
    tokens=st.sampled_from([0, 1, 2, 3, 5, 17, 65]),
)
def test_every_kernel_gives_the_product_with_values_in_int8_times_their_rows_scale(
    kernel, dtype, rows, columns, tokens, kept, biased
):
    packed, meant = int8_weight(weight_of(rows, columns, kept, dtype))
    check_structure(packed, "w")
    x, bias = inputs(tokens, columns, dtype), inputs(1, rows, dtype)[0] if biased else None
    out = linear(x, packed, kernel, bias)
    assert out.dtype == dtype and out.shape == (tokens, rows)
    add = torch.zeros(rows) if bias is None else bias.double()
    largest = float((x.double().abs() @ meant.abs().T + add.abs()).max()) if out.numel() else 1
    difference = (out.double() - (x.double() @ meant.T + add)).abs()
    assert not out.numel() or float(difference.max()) <= ALLOWED[dtype] * max(largest, 1e-30)


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize(("columns", "tokens"), [(1056, 70), (2085, 6)])
def test_values_in_int8_of_several_column_blocks_and_rows_give_the_product(kernel, columns, tokens):
    packed, meant = int8_weight(weight_of(300, columns, 0.5, torch.bfloat16))
    x = inputs(tokens, columns, torch.bfloat16)
    out, expected = linear(x, packed, kernel), x.double() @ meant.T
    assert float((out.double() - expected).abs().max() / expected.abs().max()) < 2**-7


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_inputs_go_through_values_in_int8_as_through_a_dense_product(kernel, dtype):
    packed, meant = int8_weight(weight_of(24, 100, 0.5, dtype))
    x = inputs(20, 100, dtype)
    x[0, 3], x[1, 40] = math.inf, math.nan
    out, expected = linear(x, packed, kernel), x.double() @ meant.T
    assert torch.equal(out.isnan(), expected.isnan()) and int(expected[0].isnan().sum()) > 0
    infinite = expected.isinf()
    assert torch.equal(out.double()[infinite], expected[infinite]) and int(infinite.sum())


def test_the_self_check_holds_values_in_int8_against_the_dequantized_weight():
    weight = weight_of(40, 90, 0.5, torch.bfloat16)
    packed, dense = int8_weight(weight)[0], dequantize(*quantize(weight))
    assert checked_choice(dense, packed).kernel == choose(torch.bfloat16).kernel
    assert packed.bytes == packed.values.numel() + 40 * (12 + 8 + 2)
    wrong = checked_choice(dense * 1.1, packed)
    assert wrong.kernel == "dense" and "was wrong by" in wrong.reason


def test_a_scale_that_does_not_belong_to_the_values_is_refused():
    packed, x = int8_weight(weight_of(6, 16, 0.5, torch.float32))[0], torch.ones(2, 16)
    for changes, message in (
        ({"scale": None}, "must share a dtype, or values with a scale be int8"),
        ({"values": packed.values.float()}, "must share a dtype, or values with a scale be int8"),
        ({"scale": packed.scale[1:]}, "the scale has 5 numbers for 6 rows"),
        ({"scale": packed.scale.int()}, "the scale has 6 numbers for 6 rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            linear(x, dataclasses.replace(packed, **changes), HERE[0])


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize(("columns", "tokens"), [(1056, 70), (2085, 6)])
def test_tiles_of_several_column_blocks_and_rows_give_the_dense_product(kernel, columns, tokens):
    weight, x = weight_of(300, columns, 0.5, torch.bfloat16), inputs(tokens, columns, torch.bfloat16)
    assert_product(linear(x, pack_dense(weight), kernel), x, weight)


def test_more_tokens_than_one_pass_takes_give_the_dense_product():
    weight, x = weight_of(9, 40, 0.5, torch.bfloat16), inputs(1030, 40, torch.bfloat16)
    assert_product(linear(x, pack_dense(weight), HERE[0]), x, weight)


@pytest.mark.parametrize("kernel", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [2, 20])
def test_nan_and_infinity_go_where_the_dense_product_has_them(kernel, dtype, tokens):
    weight, x = weight_of(24, 100, 0.5, dtype), inputs(tokens, 100, dtype)
    x[0, 3], x[1, 40] = math.inf, math.nan
    weight[5, 17], weight[6, 99], weight[7, 8] = math.inf, math.nan, -math.inf
    out = linear(x, pack_dense(weight), kernel)
    expected = x.double() @ weight.double().T
    assert torch.equal(out.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(out.double()[infinite], expected[infinite]) and int(infinite.sum())
    assert int(out[0].isnan().sum()) > 0  # a zero weight times infinity, as in a dense product


@pytest.mark.parametrize("tokens", [1, 4, 16, 50, 65])
@pytest.mark.parametrize("kernel", HERE)
def test_results_do_not_depend_on_the_number_of_threads(kernel, tokens):
    weight, x = weight_of(515, 515, 0.4, torch.bfloat16), inputs(tokens, 515, torch.bfloat16)
    packed, threads, outs = pack_dense(weight), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs.append(linear(x, packed, kernel))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 5)])
def test_any_number_of_dimensions_comes_back(shape):
    weight, x = weight_of(6, 16, 0.5, torch.float32), torch.ones(*shape, 16)
    out = linear(x, pack_dense(weight), HERE[0])
    assert out.shape == (*shape, 6)
    assert torch.allclose(out, torch.nn.functional.linear(x, weight), atol=1e-5)


def test_an_input_with_strides_is_read_as_it_is():
    weight, base = weight_of(8, 40, 0.5, torch.bfloat16), inputs(40, 12, torch.bfloat16)
    for x in (base.t(), base.t()[::2], inputs(6, 80, torch.bfloat16)[:, ::2]):
        assert not x.is_contiguous()
        assert_product(linear(x, pack_dense(weight), HERE[0]), x, weight)


def test_a_negative_zero_is_kept_as_it_is():
    weight = torch.tensor([[0.0, -0.0, 1.0]])
    assert pack_dense(weight).values.tolist() == [-0.0, 1.0]


def test_rows_of_equal_length_are_those_of_2_4():
    from msp_plugin.formats.sparse24 import pack

    weight = weight_of(16, 64, 1.0, torch.bfloat16)
    weight.view(-1, 4)[:, 1:3] = 0
    stored, x = pack(weight), inputs(3, 64, torch.bfloat16)
    packed = equal_rows(stored.values, stored.bitmask, 64)
    check_structure(packed, "w")
    assert_product(linear(x, packed, HERE[0]), x, weight)


def test_packing_pays_below_the_share_that_bitmask_and_offsets_leave():
    assert pays(weight_of(64, 64, 0.5, torch.bfloat16)) and not pays(torch.ones(64, 64, dtype=torch.bfloat16))
    assert pack_dense(torch.eye(64, dtype=torch.bfloat16)).bytes == 64 * 2 + 64 * 8 + 64 * 8


# damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: (w.values[1:], w.bitmask, w.row_offsets), "there are"),
        (lambda w: (w.values, w.bitmask ^ 1, w.row_offsets), "starts at|there are"),
        (lambda w: (w.values, w.bitmask, w.row_offsets.flip(0)), "row 0 starts at"),
        (lambda w: (w.values, w.bitmask, w.row_offsets - 1), "row 0 starts at -1"),
        (lambda w: (w.values, w.bitmask | 128, w.row_offsets), "beyond the last column"),
        (lambda w: (w.values, w.bitmask[:, 1:], w.row_offsets), "does not belong to a weight"),
        (lambda w: (w.values, w.bitmask.int(), w.row_offsets), "torch.int32 bitmask"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused_by_name(damage, message):
    whole = pack_dense(weight_of(6, 21, 0.5, torch.float32))
    with pytest.raises(FormatError, match=message) as error:
        check_structure(PackedWeight(*damage(whole), 21), "layers.0.up")
    assert error.value.message.startswith("layers.0.up:") and error.value.hint


@pytest.mark.parametrize("kernel", HERE)
@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**20), dtype=st.sampled_from(DTYPES), rows=st.integers(1, 12), columns=st.integers(1, 150),
    count=st.integers(0, 300), tokens=st.sampled_from([1, 3, 6]), int8=st.booleans(),
)  # fmt: skip
def test_hostile_masks_and_offsets_end_in_numbers_of_the_values(
    kernel, seed, dtype, rows, columns, count, tokens, int8
):
    """Where they lead beyond the values, zeros are read: each output is a sum of the values that are there."""
    random = np.random.default_rng(seed)
    values, scale = torch.ones(count, dtype=torch.int8 if int8 else dtype), torch.ones(rows) if int8 else None
    masks = torch.from_numpy(random.integers(0, 256, (rows, -(-columns // 8)), dtype=np.uint8))
    offsets = torch.from_numpy(random.choice([-(2**62), -1, 0, 1, count, count + 1, 2**62], rows))
    weight = PackedWeight(values, masks, offsets, columns, scale)
    out = linear(torch.ones(tokens, columns, dtype=dtype), weight, kernel)
    bits = np.unpackbits(masks.numpy(), axis=1, count=columns, bitorder="little").sum(axis=1)
    starts = [o if 0 <= o <= count else count for o in offsets.tolist()]
    expected = [min(int(b), count - start) for b, start in zip(bits, starts, strict=True)]
    assert out.tolist() == [expected] * tokens


def test_a_call_with_wrong_tensors_is_refused():
    packed, x = pack_dense(weight_of(6, 16, 0.5, torch.float32)), torch.ones(2, 16)
    for call, message in (
        (lambda: linear(x[:, :8], packed, HERE[0]), "width 8 meets a weight with in_features = 16"),
        (lambda: linear(x.half(), packed, HERE[0]), "must share a dtype"),
        (lambda: linear(x, packed, "sse"), "there is no kernel sse"),
        (lambda: linear(x, packed, HERE[0], torch.ones(5)), "do not belong to a weight"),
        (
            lambda: linear(
                x, PackedWeight(packed.values, packed.bitmask[1:], packed.row_offsets, 16), HERE[0]
            ),
            "do not",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


# choice


def test_the_self_check_passes_right_weights_and_sees_wrong_ones():
    weight = weight_of(40, 90, 0.5, torch.bfloat16)
    packed = pack_dense(weight)
    assert self_check(weight, packed, HERE[0]) < 2**-6
    assert self_check(weight.roll(1, 1), packed, HERE[0]) > 0.1
    assert checked_choice(weight, packed).kernel == choose(torch.bfloat16).kernel
    wrong = checked_choice(weight.roll(1, 1), packed)
    assert wrong.kernel == "dense" and "was wrong by" in wrong.reason


@pytest.mark.parametrize("kernel", HERE)
def test_the_environment_forces_a_kernel(kernel, monkeypatch):
    monkeypatch.setenv(FORCE, kernel)
    assert choose(torch.bfloat16).kernel == kernel


def test_a_forced_kernel_that_does_not_know_the_dtype_is_named_as_what_runs(monkeypatch):
    monkeypatch.setitem(kernel._FIRST, torch.float32, "portable")
    for name in HERE:
        monkeypatch.setenv(FORCE, name)
        choice = choose(torch.float32)
        said = "says so" if name == "portable" else f"is {name}, which is portable in torch.float32"
        assert (choice.kernel, choice.reason) == ("portable", f"MSP_CPU_KERNEL {said}")


def test_the_environment_forces_dense_and_no_unknown_kernel(monkeypatch):
    monkeypatch.setenv(FORCE, "dense")
    assert (choose(torch.bfloat16).kernel, choose(torch.bfloat16).reason) == (
        "dense",
        "MSP_CPU_KERNEL says so",
    )
    monkeypatch.setenv(FORCE, "avx1024")
    with pytest.raises(ServingError, match="avx1024") as error:
        choose(torch.bfloat16)
    assert "amx_bf16, avx512_bf16, avx512, avx2, portable, dense" in error.value.hint


def test_a_dtype_that_no_kernel_takes_is_dense():
    assert "float64" in choose(torch.float64).reason and choose(torch.float64).kernel == "dense"


def test_the_operator_compiles():
    weight, x = weight_of(8, 24, 0.5, torch.float32), inputs(3, 24, torch.float32)
    packed = pack_dense(weight)
    compiled = torch.compile(lambda x: linear(x, packed, HERE[0]) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), linear(x, packed, HERE[0]) + 1)
