"""The sparse-24-bitmask layout against a slow oracle on bytes, and everything that must be refused."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msp_plugin.errors import FormatError
from msp_plugin.formats.base import without_shape
from msp_plugin.formats.bits import positive_zeros
from msp_plugin.formats.sparse24 import Packed, Sparse24Bitmask, is_packable, pack, unpack

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
FLOATS = DTYPES[:5]
WIDTHS = [4, 8, 12, 16, 20, 32, 64, 100, 132]
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
#: The places of the nonzeros of a group: none, one, and the six pairs.
PATTERNS = [p for count in range(3) for p in combinations(range(4), count)]
PAIRS = [p for p in PATTERNS if len(p) == 2]


def raw(tensor):
    """The bytes of a tensor, so that NaN equals NaN and -0.0 differs from 0.0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def from_bits(bits, dtype):
    return torch.from_numpy(bits.view(np.uint8).copy()).view(dtype).reshape(bits.shape)


def special_bits(dtype):
    """Bit patterns that go wrong first: -0.0, NaNs, infinities, subnormals, the largest and the smallest."""
    size = torch.empty(0, dtype=dtype).element_size()
    top = 8 * size - 1
    values = {1 << top, 1, (1 << top) + 1, (1 << top) - 1, (1 << (top + 1)) - 1, 1 << (top - 1), 3, 1 << 7}
    if dtype.is_floating_point:
        numbers = [1.0, -1.0, float("inf"), float("-inf"), float("nan"), torch.finfo(dtype).tiny]
        tensor = torch.tensor(numbers).to(dtype)
        values |= set(tensor.view(torch.uint8).numpy().view(UNSIGNED[size]).tolist())
    return np.array(sorted(values - {0}), dtype=UNSIGNED[size])


def weight_of(dtype, rows, columns, seed, full=False):
    """A 2:4 weight of arbitrary bits; at most two of four are nonzero, with ``full`` exactly two."""
    rng = np.random.default_rng(seed)
    kind = UNSIGNED[torch.empty(0, dtype=dtype).element_size()]
    bits = rng.integers(1, np.iinfo(kind).max, (rows, columns // 4, 4), dtype=kind, endpoint=True)
    special = special_bits(dtype)
    bits = np.where(rng.random(bits.shape) < 0.4, special[rng.integers(0, len(special), bits.shape)], bits)
    patterns = PAIRS if full else PATTERNS
    keep = np.zeros((len(patterns), 4), dtype=bool)
    for i, places in enumerate(patterns):
        keep[i, list(places)] = True
    bits[~keep[rng.integers(0, len(patterns), bits.shape[:2])]] = 0
    return from_bits(np.ascontiguousarray(bits.reshape(rows, columns)), dtype)


def oracle(weight):
    """The bytes of values and bitmask, group by group, straight from the layout's description."""
    rows, columns = weight.shape
    cells = np.frombuffer(raw(weight), np.uint8).reshape(rows, columns, weight.element_size())
    values, masks = b"", b""
    for row in cells:
        bits = []
        for start in range(0, columns, 4):
            group = [bytes(cell) for cell in row[start : start + 4]]
            stored = [i for i in range(4) if any(group[i])]
            for i in range(4):
                if len(stored) < 2 and i not in stored:
                    stored.append(i)
            values += b"".join(group[i] for i in sorted(stored))
            bits += [i in stored for i in range(4)]
        masks += np.packbits(np.array(bits, dtype=bool), bitorder="little").tobytes()
    return values, masks


def random_packed(columns=12, rows=3, dtype=torch.bfloat16):
    return pack(weight_of(dtype, rows, columns, 7, full=True))


weights = st.builds(
    weight_of,
    st.sampled_from(DTYPES),
    st.integers(1, 5),
    st.integers(1, 40).map(lambda groups: 4 * groups),
    st.integers(0, 2**32),
    st.booleans(),
)


@given(weights)
def test_every_bit_comes_back(weight):
    before = raw(weight)
    packed = pack(weight)
    found = unpack(packed)
    assert (found.dtype, found.shape) == (weight.dtype, weight.shape)
    assert raw(found) == before == raw(weight)


@given(weights)
def test_values_and_bitmask_are_the_bytes_that_the_layout_asks_for(weight):
    packed = pack(weight)
    rows, columns = weight.shape
    assert packed.values.dtype == weight.dtype and packed.values.shape == (rows, columns // 2)
    assert packed.bitmask.dtype == torch.uint8 and packed.bitmask.shape == (rows, (columns + 7) // 8)
    assert packed.values.is_contiguous() and packed.bitmask.is_contiguous()
    assert (raw(packed.values), raw(packed.bitmask)) == oracle(weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", WIDTHS)
def test_every_dtype_at_every_kind_of_width(dtype, columns):
    weight = weight_of(dtype, 9, columns, columns)
    packed = pack(weight)
    assert raw(unpack(packed)) == raw(weight)
    assert (raw(packed.values), raw(packed.bitmask)) == oracle(weight)


def test_a_group_by_hand():
    weight = torch.tensor([[0, 3.0, 0, -5, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]], dtype=torch.float16)
    packed = pack(weight)
    assert packed.values.tolist() == [[3, -5, 7, 0, 0, 0, 0, 2]]
    assert [f"{byte:08b}" for byte in packed.bitmask[0]] == ["00111010", "01010011"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_six_pairs_of_places_keep_their_values(dtype):
    weight = torch.zeros(len(PAIRS), 8)
    for row, (i, j) in enumerate(PAIRS):
        weight[row, [i, j, 4 + i, 4 + j]] = torch.tensor([1.0, -2, 3, -4])
    packed = pack(weight.to(dtype))
    assert packed.values.float().tolist() == [[1, -2, 3, -4]] * 6
    assert packed.bitmask[:, 0].tolist() == [0x11 * (2**i + 2**j) for i, j in PAIRS]
    assert torch.equal(unpack(packed).float(), weight)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_negative_zero_is_kept_where_it_fits(dtype):
    weight = torch.tensor([[-0.0, 0, 0, 1], [-0.0, 0, -0.0, 0]]).to(dtype)
    packed = pack(weight)
    assert raw(unpack(packed)) == raw(weight)
    assert packed.bitmask[:, 0].tolist() == [0b1001, 0b0101]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_of_zeros_stores_two_places_of_every_group_too(dtype):
    packed = pack(torch.zeros(2, 12).to(dtype))
    assert packed.bitmask.tolist() == [[0x33, 0x03]] * 2 and not any(raw(packed.values))
    assert not any(raw(unpack(packed)))


@pytest.mark.parametrize("chunk", [1, 20, 50, 100])
def test_the_size_of_a_chunk_changes_no_bit(chunk, monkeypatch):
    weight = weight_of(torch.bfloat16, 11, 20, 3)
    whole = pack(weight)
    monkeypatch.setattr("msp_plugin.formats.bits.CHUNK", chunk)
    parts = pack(weight)
    assert raw(parts.values) == raw(whole.values) and raw(parts.bitmask) == raw(whole.bitmask)
    assert raw(unpack(parts)) == raw(weight)
    assert is_packable(weight) and not is_packable(torch.ones(11, 20))
    mended, count = positive_zeros(torch.full((11, 20), -0.0))
    assert count == 220 and not any(raw(mended))


def test_a_fault_in_a_late_chunk_is_found_in_all_three(monkeypatch):
    monkeypatch.setattr("msp_plugin.formats.bits.CHUNK", 16)
    weight = weight_of(torch.bfloat16, 9, 8, 3)
    packed = pack(weight)
    packed.bitmask[8, 0] = 0x31
    with pytest.raises(FormatError, match="bitmask"):
        unpack(packed)
    weight[8, 4:8] = 1
    assert not is_packable(weight)
    with pytest.raises(FormatError, match="row 8, columns 4 to 7"):
        pack(weight)


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.t().contiguous().t(),
        lambda w: torch.cat([torch.full_like(w[:, :1], 9), w], dim=1)[:, 1:],
        lambda w: torch.stack([w, torch.full_like(w, 9)], dim=-1)[..., 0],
        lambda w: torch.cat([torch.full_like(w[:1], 9), w])[1:],
    ],
    ids=["transposed", "some columns", "every second", "some rows"],
)
def test_views_pack_as_their_copies_do(view):
    weight = weight_of(torch.float16, 6, 16, 5)
    packed, found = pack(weight), pack(view(weight))
    assert raw(found.values) == raw(packed.values) and raw(found.bitmask) == raw(packed.bitmask)
    assert is_packable(view(weight))
    apart = Packed(view(packed.values), view(packed.bitmask), packed.shape)
    assert raw(unpack(apart)) == raw(weight)


def test_a_parameter_packs_without_its_gradient():
    parameter = torch.nn.Parameter(torch.tensor([[1.0, 0, 2, 0]]))
    packed = pack(parameter)
    assert not packed.values.requires_grad and not unpack(packed).requires_grad
    assert is_packable(parameter) and positive_zeros(parameter)[1] == 0


# sizes


@pytest.mark.parametrize(
    ("dtype", "numerator", "denominator"),
    [(torch.bfloat16, 9, 16), (torch.float16, 9, 16), (torch.float32, 17, 32), (torch.float8_e4m3fn, 5, 8)],
)
def test_a_packed_weight_takes_the_share_that_the_layout_says(dtype, numerator, denominator):
    weight = weight_of(dtype, 48, 64, 0)
    packed = pack(weight)
    assert packed.bytes * denominator == weight.numel() * weight.element_size() * numerator
    assert packed.bytes == len(raw(packed.values)) + len(raw(packed.bitmask))
    assert packed.bytes == without_shape(Sparse24Bitmask().sizes((48, 64), weight.dtype, 0))


@pytest.mark.parametrize("columns", [4, 12, 100])
def test_half_a_byte_of_bitmask_counts_as_one(columns):
    assert pack(torch.zeros(3, columns)).bytes == without_shape(
        Sparse24Bitmask().sizes((3, columns), torch.float32, 0)
    )


def test_the_tensors_of_a_checkpoint_are_three_by_name():
    packed = random_packed(16)
    tensors = packed.tensors("model.layers.0.mlp.up_proj")
    assert list(tensors) == [f"model.layers.0.mlp.up_proj.{s}" for s in ("compressed", "bitmask", "shape")]
    values, bitmask, shape = tensors.values()
    assert values is packed.values and bitmask is packed.bitmask
    assert shape.dtype == torch.int64 and shape.tolist() == [[3], [16]]


# what is not 2:4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("places", [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3), (0, 1, 2, 3)])
def test_three_in_one_group_are_refused_by_layer_row_and_columns(dtype, places):
    weight = torch.zeros(5, 20)
    weight[3, [8 + i for i in places]] = -1.0
    weight = weight.to(dtype)
    before = raw(weight)
    with pytest.raises(FormatError) as error:
        pack(weight, "model.layers.1.mlp.up_proj")
    assert "model.layers.1.mlp.up_proj is not 2:4: 1 of 25 groups" in error.value.message
    assert "row 3, columns 8 to 11" in error.value.message
    assert raw(weight) == before and not is_packable(weight)


def test_all_groups_that_hold_too_much_are_counted():
    weight = torch.zeros(4, 16)
    weight[1, 4:8] = weight[1, 12:15] = weight[3, 0:3] = 1
    with pytest.raises(FormatError, match="3 of 16 groups of four .* the first in row 1, columns 4 to 7"):
        pack(weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-45, -1e-45])
def test_what_is_no_ordinary_number_counts_as_a_nonzero(value):
    weight = torch.tensor([[1.0, 2.0, value, 0.0]])
    assert not is_packable(weight)
    with pytest.raises(FormatError, match="is not 2:4"):
        pack(weight)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_negative_zeros_without_a_place_are_refused_and_mended_without_a_change_of_value(dtype):
    weight = torch.tensor([[1.0, -2.0, -0.0, 0.0], [-0.0, -0.0, -0.0, 3.0]]).to(dtype)
    with pytest.raises(FormatError, match="layer: negative zeros") as error:
        pack(weight, "layer")
    assert "positive_zeros" in error.value.hint
    assert is_packable(weight)
    mended, count = positive_zeros(weight)
    assert count == 4 and raw(mended) == raw(torch.tensor([[1.0, -2, 0, 0], [0, 0, 0, 3.0]]).to(dtype))
    assert raw(weight) == raw(torch.tensor([[1.0, -2, -0.0, 0], [-0.0, -0.0, -0.0, 3]]).to(dtype))
    assert raw(unpack(pack(mended))) == raw(mended)


@given(weights)
def test_positive_zeros_touches_nothing_but_negative_zeros(weight):
    mended, count = positive_zeros(weight)
    size = weight.element_size()
    before = np.frombuffer(raw(weight), UNSIGNED[size])
    after = np.frombuffer(raw(mended), UNSIGNED[size])
    negative = (
        before == 1 << (8 * size - 1) if weight.dtype.is_floating_point else np.zeros(before.shape, bool)
    )
    assert count == int(negative.sum())
    assert (after == np.where(negative, 0, before)).all()
    assert (mended is weight) == (count == 0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str)
def test_where_the_sign_bit_alone_is_nan_it_is_no_negative_zero(dtype):
    weight = torch.tensor([[-128, 0, 0, 56]], dtype=torch.int8).view(dtype)
    assert bool(weight.float().isnan()[0, 0])
    assert positive_zeros(weight) == (weight, 0) and raw(unpack(pack(weight))) == raw(weight)
    crowded = torch.tensor([[-128, 0, 56, 56]], dtype=torch.int8).view(dtype)
    assert not is_packable(crowded)


def test_the_least_integer_is_no_negative_zero():
    weight = torch.tensor([[-128, 0, 0, 1]], dtype=torch.int8)
    assert positive_zeros(weight) == (weight, 0)
    weight[0, 1] = 5
    assert not is_packable(weight)


@given(weights, st.integers(0, 2**32))
def test_packable_is_what_holds_two_nonzero_values_in_each_group(weight, seed):
    rng = np.random.default_rng(seed)
    weight = weight.clone()
    bits = weight.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[weight.element_size()])
    bits[torch.from_numpy(rng.random(weight.shape) < 0.05)] = 1  # the least subnormal
    counts = (weight.float().reshape(weight.shape[0], -1, 4) != 0).sum(-1)
    assert is_packable(weight) == (int(counts.max()) <= 2)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.zeros(8), "shape (8,) is not a matrix"),
        (torch.zeros(2, 4, 4), "shape (2, 4, 4) is not a matrix"),
        (torch.zeros(()), "is not a matrix"),
        (torch.zeros(0, 4), "shape (0, 4) is not a matrix"),
        (torch.zeros(4, 0), "shape (4, 0) is not a matrix"),
        (torch.zeros(4, 6), "in_features = 6 is not a multiple of 4"),
        (torch.zeros(4, 3), "in_features = 3 is not a multiple of 4"),
        (torch.zeros(4, 8, dtype=torch.float64), "dtype torch.float64 cannot be packed"),
        (torch.zeros(4, 8, dtype=torch.complex64), "dtype torch.complex64 cannot be packed"),
    ],
)
def test_what_is_no_matrix_of_groups_of_four_is_refused_by_name(weight, words):
    assert not is_packable(weight)
    with pytest.raises(FormatError) as error:
        pack(weight, "blocks.0.proj")
    assert error.value.message.startswith("blocks.0.proj: ") and words in error.value.message


# damaged packed weights


@pytest.mark.parametrize("columns", [4, 8, 12, 16, 20])
def test_no_flipped_bit_of_a_bitmask_goes_unseen(columns):
    packed = random_packed(columns)
    flipped = 0
    for row, byte, bit in np.ndindex(*packed.bitmask.shape, 8):
        bitmask = packed.bitmask.clone()
        bitmask[row, byte] ^= 1 << bit
        with pytest.raises(FormatError, match="layer: the bitmask does not store two of four"):
            unpack(Packed(packed.values, bitmask, packed.shape), "layer")
        flipped += 1
    assert flipped == 3 * 8 * -(-columns // 8)


def test_two_flipped_bits_in_two_halves_of_a_byte_do_not_cancel_out():
    packed = random_packed(16)
    packed.bitmask[1, 1] = 0b00010111
    with pytest.raises(FormatError, match="bitmask"):
        unpack(packed)


def replaced(**fields):
    packed = random_packed(16)
    return Packed(**{"values": packed.values, "bitmask": packed.bitmask, "shape": packed.shape, **fields})


@pytest.mark.parametrize(
    "packed",
    [
        replaced(shape=(3, 20)),
        replaced(shape=(3, 12)),
        replaced(shape=(2, 16)),
        replaced(shape=(16, 3)),
        replaced(shape=(3, 18)),
        replaced(shape=(0, 16)),
        replaced(shape=(3, 0)),
        replaced(shape=(-3, -16)),
        replaced(shape=(2**62, 2**62)),
        replaced(shape=(3, 2**63)),
        replaced(values=torch.zeros(3, 7)),
        replaced(values=torch.zeros(24)),
        replaced(values=torch.zeros(3, 8, dtype=torch.float64)),
        replaced(values=torch.zeros(3, 8, dtype=torch.complex64)),
        replaced(bitmask=torch.full((3, 1), 0x33, dtype=torch.uint8)),
        replaced(bitmask=torch.full((6,), 0x33, dtype=torch.uint8)),
        replaced(bitmask=torch.full((3, 2), 0x33, dtype=torch.int8)),
        replaced(bitmask=torch.full((3, 2), 0x33, dtype=torch.int64)),
    ],
)
def test_shapes_and_dtypes_that_contradict_each_other_are_refused(packed):
    with pytest.raises(FormatError, match="^layer: "):
        unpack(packed, "layer")
