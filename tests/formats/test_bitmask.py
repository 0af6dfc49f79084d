"""The sparse-bitmask layout against a slow oracle on bytes, and everything that must be refused."""

import dataclasses
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.errors import FormatError
from msp_plugin.formats.bitmask import SUFFIXES, Packed, SparseBitmask, pack, unpack
from msp_plugin.formats.bits import positive_zeros
from msp_plugin.plan.levels import Level
from msp_plugin.plan.units import Layer

FORMAT = SparseBitmask()
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def raw(tensor):
    """The bytes of a tensor, so that NaN equals NaN and -0.0 differs from 0.0."""
    return b"".join(
        struct.pack("B", byte) for byte in tensor.contiguous().flatten().view(torch.uint8).tolist()
    )


def weight_of(dtype, rows, columns, share, seed):
    """A weight of arbitrary bits, NaN, infinities and subnormals among them; no negative zeros."""
    rng = np.random.default_rng(seed)
    kind = UNSIGNED[dtype.itemsize]
    bits = rng.integers(0, np.iinfo(kind).max, (rows, columns), dtype=kind, endpoint=True)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-45, -1.0]).to(dtype)
    odd = np.frombuffer(raw(odd), kind)
    bits = np.where(rng.random(bits.shape) < 0.3, odd[rng.integers(0, len(odd), bits.shape)], bits)
    bits[rng.random(bits.shape) < share] = 0
    if dtype != torch.int8:
        bits[bits == 1 << (8 * dtype.itemsize - 1)] = 0
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.uint8)).view(dtype).reshape(rows, columns)


def oracle(weight):
    """The bytes of values, bitmask and row offsets, weight by weight, from the layout's description."""
    cells = np.frombuffer(raw(weight), np.uint8).reshape(*weight.shape, weight.element_size())
    values, masks, offsets = b"", b"", b""
    for row in cells:
        offsets += struct.pack("<q", len(values) // weight.element_size())
        number = 0
        for i, cell in enumerate(map(bytes, row)):
            if any(cell):
                values += cell
                number |= 1 << i
        masks += number.to_bytes((len(row) + 7) // 8, "little")
    return values, masks, offsets


weights = st.builds(
    weight_of,
    st.sampled_from(DTYPES),
    st.integers(1, 6),
    st.integers(1, 41),
    st.sampled_from([0, 0.1, 0.5, 0.75, 0.97, 1]),
    st.integers(0, 2**32),
)


def example(columns=13, rows=4, dtype=torch.bfloat16):
    return pack(weight_of(dtype, rows, columns, 0.5, 3))


@given(weights)
def test_every_bit_comes_back(weight):
    before = raw(weight)
    found = unpack(pack(weight))
    assert (found.dtype, found.shape) == (weight.dtype, weight.shape)
    assert raw(found) == before == raw(weight)


@given(weights)
def test_the_tensors_are_the_bytes_that_the_layout_asks_for(weight):
    packed = pack(weight)
    rows, columns = weight.shape
    assert (packed.values.dtype, packed.values.dim()) == (weight.dtype, 1)
    assert (packed.bitmask.dtype, packed.bitmask.shape) == (torch.uint8, (rows, (columns + 7) // 8))
    assert (packed.row_offsets.dtype, packed.row_offsets.shape) == (torch.int64, (rows,))
    assert (raw(packed.values), raw(packed.bitmask), raw(packed.row_offsets)) == oracle(weight)


@given(weights)
def test_the_sizes_are_those_of_the_tensors(weight):
    tensors = FORMAT.pack(weight, "layer")
    kept = int(torch.count_nonzero(weight.float()))
    assert list(tensors) == list(SUFFIXES)
    assert FORMAT.sizes(tuple(weight.shape), weight.dtype, kept) == {s: t.nbytes for s, t in tensors.items()}
    assert (tensors["shape"].dtype, tensors["shape"].tolist()) == (torch.int64, list(weight.shape))


def test_two_rows_by_hand():
    weight = torch.tensor([[0, 3.0, 0, -5, 0, 0, 0, 0, 0, 7], [0] * 10, [1.0] + [0] * 9], dtype=torch.float16)
    packed = pack(weight)
    assert packed.values.tolist() == [3, -5, 7, 1]
    assert packed.bitmask.tolist() == [[0b1010, 0b10], [0, 0], [1, 0]]
    assert packed.row_offsets.tolist() == [0, 3, 3]


@pytest.mark.parametrize("chunk", [1, 20, 50, 100])
def test_the_size_of_a_chunk_changes_no_bit(chunk, monkeypatch):
    weight = weight_of(torch.bfloat16, 11, 20, 0.6, 3)
    whole = pack(weight)
    monkeypatch.setattr("msp_plugin.formats.bits.CHUNK", chunk)
    parts = pack(weight)
    assert all(
        raw(a) == raw(b) for a, b in zip(parts.by_suffix.values(), whole.by_suffix.values(), strict=True)
    )
    assert raw(unpack(parts)) == raw(weight)


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.t().contiguous().t(),
        lambda w: torch.cat([torch.full_like(w[:, :1], 9), w], dim=1)[:, 1:],
        lambda w: torch.stack([w, torch.full_like(w, 9)], dim=-1)[..., 0],
        torch.nn.Parameter,
    ],
    ids=["transposed", "some columns", "every second", "parameter"],
)
def test_views_and_parameters_pack_as_their_copies_do(view):
    weight = weight_of(torch.float16, 6, 16, 0.5, 5)
    packed, found = pack(weight), pack(view(weight))
    assert all(
        raw(a) == raw(b) for a, b in zip(found.by_suffix.values(), packed.by_suffix.values(), strict=True)
    )
    apart = Packed(*(torch.stack([t, t], dim=-1)[..., 0] for t in (packed.values, packed.bitmask, packed.row_offsets)), packed.shape)  # fmt: skip
    assert raw(unpack(apart)) == raw(weight)


@pytest.mark.parametrize("dtype", DTYPES[:5], ids=str)
def test_negative_zeros_are_refused_and_mended_without_a_change_of_value(dtype):
    weight = torch.tensor([[1.0, -2.0, -0.0], [0.0, -0.0, 3.0]]).to(dtype)
    with pytest.raises(FormatError, match="layer: 2 negative zeros") as error:
        pack(weight, "layer")
    assert "positive_zeros" in error.value.hint
    assert unpack(pack(positive_zeros(weight)[0])).float().tolist() == [[1, -2, 0], [0, 0, 3]]


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.zeros(8), "shape (8,) is not a matrix"),
        (torch.zeros(2, 4, 4), "shape (2, 4, 4) is not a matrix"),
        (torch.zeros(0, 4), "shape (0, 4) is not a matrix"),
        (torch.zeros(4, 0), "shape (4, 0) is not a matrix"),
        (torch.zeros(4, 8, dtype=torch.float64), "dtype torch.float64 cannot be packed"),
        (torch.zeros(4, 8, dtype=torch.complex64), "dtype torch.complex64 cannot be packed"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(weight, words):
    with pytest.raises(FormatError) as error:
        pack(weight, "blocks.0.proj")
    assert error.value.message.startswith("blocks.0.proj: ") and words in error.value.message


# damaged packed weights


def damaged(**changes):
    return dataclasses.replace(example(), **changes)


@pytest.mark.parametrize("columns", [1, 8, 13])
def test_no_flipped_bit_of_a_bitmask_goes_unseen(columns):
    packed = example(columns)
    for row, byte, bit in np.ndindex(*packed.bitmask.shape, 8):
        bitmask = packed.bitmask.clone()
        bitmask[row, byte] ^= 1 << bit
        with pytest.raises(FormatError, match="layer: the bitmask keeps"):
            unpack(dataclasses.replace(packed, bitmask=bitmask), "layer")


def test_a_one_that_moves_to_another_row_is_seen_by_the_offsets():
    weight = torch.tensor([[1.0, 0], [0, 2.0]])
    packed = pack(weight)
    moved = dataclasses.replace(packed, bitmask=torch.tensor([[0b11], [0]], dtype=torch.uint8))
    with pytest.raises(FormatError, match="row 1 starts at value 1, by the bitmask at 2"):
        unpack(moved)


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("offset", [-1, 1, 10**6, -(2**62), 2**62])
def test_offsets_that_run_backwards_or_out_of_the_values_are_refused(row, offset):
    packed = example()
    offsets = packed.row_offsets.clone()
    offsets[row] += offset
    with pytest.raises(FormatError, match=f"layer: row {row} starts at value "):
        unpack(dataclasses.replace(packed, row_offsets=offsets), "layer")


@pytest.mark.parametrize("change", [lambda v: v[:-1], lambda v: torch.cat([v, v[:1]]), lambda v: v[:0]])
def test_other_counts_of_values_are_refused(change):
    packed = example()
    ones, values = len(packed.values), change(packed.values)
    with pytest.raises(
        FormatError, match=f"the bitmask keeps {ones} weights, there are {len(values)} values"
    ):
        unpack(dataclasses.replace(packed, values=values))


@pytest.mark.parametrize("columns", [1, 4, 7, 9, 15])
def test_ones_beyond_the_width_are_refused(columns):
    packed = example(columns)
    bitmask = packed.bitmask.clone()
    bitmask[1, -1] |= 0x80
    values = torch.cat([packed.values, packed.values[:1]])
    with pytest.raises(FormatError, match=f"keeps weights beyond its {columns} columns"):
        unpack(dataclasses.replace(packed, bitmask=bitmask, values=values))


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (4, 17)}, {"shape": (5, 13)}, {"shape": (0, 13)}, {"shape": (4, 0)}, {"shape": (4, 2**60)},
        {"bitmask": torch.zeros(4, 3, dtype=torch.uint8)}, {"bitmask": torch.zeros(8, dtype=torch.uint8)},
        {"bitmask": torch.zeros(4, 2, dtype=torch.int8)}, {"row_offsets": torch.zeros(5, dtype=torch.int64)},
        {"row_offsets": torch.zeros(4, dtype=torch.int32)}, {"row_offsets": torch.zeros(4, 1, dtype=torch.int64)},
        {"values": torch.zeros(2, 8, dtype=torch.bfloat16)}, {"values": torch.zeros((), dtype=torch.bfloat16)},
    ],
    ids=str,
)  # fmt: skip
def test_shapes_and_types_that_contradict_each_other_are_refused(changes):
    with pytest.raises(FormatError, match="layer: values .* do not belong to a weight"):
        unpack(damaged(**changes), "layer")


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_values_of_a_type_that_is_not_read_are_refused(dtype):
    with pytest.raises(FormatError, match=f"dtype {dtype} cannot be unpacked"):
        unpack(damaged(values=torch.zeros(9, dtype=dtype)))


@pytest.mark.parametrize("said", [[4], [4, 13, 1], [4, 0], [-4, 13], [4.0, 13.0]])
def test_a_shape_of_something_else_is_refused(said):
    tensors = {**example().by_suffix, "shape": torch.tensor(said)}
    with pytest.raises(FormatError, match=r"layer.shape holds .*, expected two sizes"):
        FORMAT.unpack(tensors, "layer")


# which layers, and their headers


@pytest.mark.parametrize(
    ("level", "packed"),
    [
        ("2:4", 196_624),
        ("3:8", 163_856),
        ("7:8", 294_928),
        ("1/100", 339_984),
        ("15:16", None),
        ("dense", None),
    ],
)
def test_a_layer_is_packed_where_that_takes_fewer_bytes(level, packed):
    shape, dtype = (256, 512), torch.bfloat16
    reason = FORMAT.refuses("layer", shape, dtype, Level.parse(level))
    kept = Level.parse(level).kept(Layer("layer", *shape))
    size = sum(FORMAT.sizes(shape, dtype, kept).values())
    assert (reason is None) == (size < 256 * 512 * 2)
    if reason:
        assert reason == f"at level {level} packing does not pay ({size:,} bytes packed, 262,144 dense)"


def test_without_a_level_the_zeros_of_the_weight_decide():
    weight = torch.ones(64, 256, dtype=torch.bfloat16)
    weight[:, :20] = 0  # 236 / 256 + 1 / 16 + 4 / 256 is one
    assert FORMAT.refuses_weight(weight) == "packing does not pay (32,784 bytes packed, 32,768 dense)"
    weight[0, 20:30] = -0.0
    assert FORMAT.refuses_weight(weight) is None


def test_experts_and_types_that_are_not_served_stay_dense():
    level = Level.parse("2:8")
    assert FORMAT.refuses("m.experts.3.up", (64, 64), torch.bfloat16, level) == "experts are served dense"
    assert FORMAT.refuses("m.up", (64, 64), torch.int8, level) == "dtype torch.int8 is not served"


@pytest.fixture
def stored(headers):
    """Write a packed layer's tensors, some of them changed; return their headers."""
    return lambda **changes: headers({**example().by_suffix, **changes})


def test_the_header_is_that_of_the_weight(stored):
    found = FORMAT.header(stored(), "m.up")
    assert (found.dtype, found.shape) == (torch.bfloat16, (4, 13))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": torch.tensor([4, 17])}, r"m.up.shape says \[4, 17\], its bitmask is \[4, 2\]"),
        ({"shape": torch.tensor([4, 8])}, r"says \[4, 8\], its bitmask"),
        ({"shape": torch.tensor([0, 13])}, "expected two sizes"),
        ({"shape": torch.tensor([4, 13], dtype=torch.int32)}, "m.up is not a packed weight"),
        ({"bitmask": torch.zeros(4, 0, dtype=torch.uint8)}, "is not a packed weight"),
        ({"row_offsets": torch.zeros(3, dtype=torch.int64)}, "is not a packed weight"),
        ({"compressed": torch.zeros(65, dtype=torch.bfloat16)}, "is not a packed weight"),
        ({"compressed": torch.zeros(9, dtype=torch.int8)}, "is not a packed weight"),
        ({"compressed": torch.zeros(3, 3)}, "is not a packed weight"),
    ],
)
def test_headers_that_cannot_be_those_of_a_packed_weight_are_refused(changes, words, stored):
    with pytest.raises(FormatError, match=words):
        FORMAT.header(stored(**changes), "m.up")
