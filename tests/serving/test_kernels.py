import math
from dataclasses import replace

import pytest
import torch
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from msp_plugin.errors import FormatError, ServingError
from msp_plugin.serving import kernels
from msp_plugin.serving.algorithms import BUCKETS, TOKEN_MULTIPLE, TOLERANCE, bucket, pad_tokens, padded
from msp_plugin.serving.kernels import MULTIPLES, Packed24, choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF = torch.float16
OP = torch.ops.msp_plugin.sparse24_linear.default


def chosen(shape=(4096, 4096), dtype=torch.bfloat16, device=CUDA, capability=(9, 0), has=True):
    return choose(shape, dtype, device, capability=capability, has_cusparselt=has)


def packed(rows=32, columns=64, kernel="cusparselt"):
    """A packed weight of the right shapes with nothing in it; no kernel may read it."""
    algorithms = tuple(range(len(BUCKETS))) if kernel == "cusparselt" else ()
    if kernel == "cutlass":
        kept, meta = torch.zeros(rows, columns // 2, dtype=HALF), torch.zeros(rows, columns // 16).short()
    else:
        kept, meta = torch.zeros(rows, columns * 9 // 16, dtype=HALF), None
    return Packed24(kernel, kept, meta, rows, columns, algorithms)


class Layer(torch.nn.Module):
    def __init__(self, packed24, bias=None):
        super().__init__()
        self.packed24, self.bias = packed24, bias

    def forward(self, x):
        return torch.relu(kernels.linear(x, self.packed24, self.bias))


# choose


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cusparselt_is_chosen_from_8_0_on_where_torch_has_it(capability, dtype):
    assert chosen(dtype=dtype, capability=capability).kernel == "cusparselt"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9)])
def test_cutlass_stands_in_on_8_x(capability):
    assert chosen(capability=capability, has=False).kernel == "cutlass"


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
def test_without_cusparselt_later_gpus_are_dense_and_the_reason_names_both(capability):
    choice = chosen(capability=capability, has=False)
    assert choice.kernel == "dense"
    assert "no cuSPARSELt" in choice.reason and f"8.x, not {capability[0]}.{capability[1]}" in choice.reason


@pytest.mark.parametrize("has", [True, False])
def test_gpus_before_8_0_are_dense(has):
    choice = chosen(capability=(7, 5), has=has)
    assert choice.kernel == "dense" and "7.5" in choice.reason and "8.0" in choice.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fn])
def test_other_dtypes_are_dense_and_named(dtype):
    choice = chosen(dtype=dtype)
    assert choice.kernel == "dense" and str(dtype) in choice.reason


@pytest.mark.parametrize("device", ["cpu", "meta", "mps"])
def test_other_devices_are_dense_and_nothing_is_asked_of_them(device):
    assert choose((64, 64), HALF, torch.device(device)) == kernels.Choice(
        "dense", f"no sparse kernel on {device}"
    )


def test_rocm_is_dense_though_torch_calls_it_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert chosen() == kernels.Choice("dense", "no sparse kernel on ROCm")


def test_capability_and_cusparselt_are_asked_of_torch_by_default(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    device = torch.device("cuda", 1)
    assert choose((64, 64), HALF, device).kernel == "cusparselt" and asked == [device]


@pytest.mark.parametrize("shape", [(16, 16), (16, 4096), (28672, 4096), (3584, 18944), (48, 80)])
def test_cusparselt_takes_multiples_of_16(shape):
    assert chosen(shape).kernel == "cusparselt"


@pytest.mark.parametrize("shape", [(8, 16), (16, 8), (17, 32), (32, 40), (0, 16), (16, 0)])
def test_other_shapes_are_dense_and_the_reason_says_what_was_expected(shape):
    choice = chosen(shape)
    assert choice.kernel == "dense"
    assert f"{shape[0]} x {shape[1]}" in choice.reason and "multiples of 16 x 16" in choice.reason


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((32, 64), "cutlass"),
        ((96, 192), "cutlass"),
        ((16, 64), "dense"),
        ((32, 32), "dense"),
        ((32, 80), "dense"),
    ],
)
def test_cutlass_takes_multiples_of_32_by_64(shape, kernel):
    assert chosen(shape, capability=(8, 0), has=False).kernel == kernel


@pytest.mark.parametrize("name", ["cusparselt", "cutlass"])
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_the_multiples_are_those_of_torch(name, dtype):
    limits = getattr(torch.sparse, f"SparseSemiStructuredTensor{name.upper()}")._DTYPE_SHAPE_CONSTRAINTS[
        dtype
    ]
    assert MULTIPLES[name] == (limits.sparse_min_rows, limits.sparse_min_cols)
    assert TOKEN_MULTIPLE == limits.dense_min_rows == limits.dense_min_cols


# padding and buckets


@pytest.mark.parametrize(
    ("tokens", "rows"), [(0, 0), (1, 8), (7, 8), (8, 8), (9, 16), (16, 16), (4097, 4104)]
)
def test_tokens_are_padded_to_the_next_multiple_of_8(tokens, rows):
    assert padded(tokens) == rows


def test_the_rows_added_are_zero_and_the_others_stay():
    x = torch.randn(3, 16)
    out = pad_tokens(x)
    assert torch.equal(out[:3], x) and out.shape == (8, 16) and not out[3:].any()


def test_nothing_is_copied_where_no_row_is_missing():
    x = torch.randn(16, 4)
    assert pad_tokens(x) is x


@pytest.mark.parametrize(
    ("tokens", "index"), [(1, 0), (16, 0), (17, 1), (64, 1), (256, 2), (257, 3), (8192, 4), (100_000, 4)]
)
def test_a_bucket_serves_the_counts_up_to_its_own_and_the_last_all_above(tokens, index):
    assert bucket(tokens) == index


# the operator


@pytest.mark.parametrize("shape", [(64,), (5, 64), (0, 64), (2, 3, 64), (2, 0, 64)])
@pytest.mark.parametrize("kernel", ["cusparselt", "cutlass"])
def test_the_fake_kernel_keeps_the_leading_dimensions(shape, kernel):
    weight = packed(kernel=kernel)
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = kernels.linear(torch.empty(shape, dtype=HALF), weight, torch.empty(32, dtype=HALF))
    assert out.shape == (*shape[:-1], 32) and out.dtype == HALF and out.is_contiguous()


def test_the_fake_kernel_gives_a_contiguous_result_for_a_transposed_input():
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = kernels.linear(torch.empty(64, 5, dtype=HALF).t(), packed())
    assert out.shape == (5, 32) and out.is_contiguous()


def test_a_trace_holds_one_call_for_any_number_of_tokens():
    traced = make_fx(Layer(packed()), tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        torch.zeros(5, 64, dtype=HALF)
    )
    calls = [node for node in traced.graph.nodes if node.target is OP]
    assert len(calls) == 1
    assert str(calls[0].meta["val"].shape[0]).startswith("s")


def test_compilation_makes_one_graph_without_breaks_for_several_numbers_of_tokens():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lambda *args: tuple(n.meta["example_value"] for n in graph.graph.output_node().args[0])

    torch._dynamo.reset()
    compiled = torch.compile(Layer(packed(), torch.zeros(32, dtype=HALF)), fullgraph=True, backend=backend)
    for tokens in (5, 16, 33):
        x = torch.zeros(tokens, 64, dtype=HALF)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x)
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert ["sparse24_linear" in str(n.target) for n in graphs[0].graph.nodes].count(True) == 1


@pytest.mark.parametrize("kernel", ["cusparselt", "cutlass"])
def test_tensors_on_the_cpu_are_refused_by_name(kernel):
    with pytest.raises(ServingError, match=r"got tensors on cpu; it runs on CUDA\n  -> where choose"):
        kernels.linear(torch.zeros(8, 64, dtype=HALF), packed(kernel=kernel))


def test_the_operator_knows_no_dense_kernel():
    x = torch.zeros(8, 64, dtype=HALF)
    with pytest.raises(ServingError, match="no 2:4 kernel 'dense'"):
        kernels.sparse24_linear(x, x, None, None, 8, "dense", [])


def test_an_input_of_another_width_is_refused():
    with pytest.raises(ServingError, match="width 32 meets a weight with in_features = 64"):
        kernels.linear(torch.zeros(8, 32, dtype=HALF), packed())


# packing


@pytest.mark.parametrize("kernel", ["cusparselt", "cutlass"])
def test_a_weight_on_the_cpu_is_not_packed(kernel):
    with pytest.raises(ServingError, match="float16 weight of shape .32, 64. on cpu"):
        kernels.pack(torch.zeros(32, 64, dtype=HALF), kernel)


def test_nothing_is_packed_for_dense():
    with pytest.raises(ServingError, match="no 2:4 kernel 'dense'"):
        kernels.pack(torch.zeros(32, 64, dtype=HALF), "dense")


@pytest.fixture
def pretend_cuda(monkeypatch):
    """Every tensor says it is on a CUDA device, for what happens before a kernel runs."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


def test_a_weight_that_is_not_2_4_is_refused_with_the_count(pretend_cuda):
    weight = torch.zeros(32, 64, dtype=HALF)
    weight[0, :3] = weight[5, 4:8] = 1
    with pytest.raises(FormatError, match="2 of 512 groups"):
        kernels.pack(weight, "cutlass")


def test_a_weight_of_the_wrong_shape_is_refused(pretend_cuda):
    with pytest.raises(ServingError, match="weight of 32 x 80; cutlass takes multiples of 32 x 64"):
        kernels.pack(torch.zeros(32, 80, dtype=HALF), "cutlass")


def two_of_four(rows, columns):
    weight = torch.randn(rows, columns // 4, 4, generator=torch.Generator().manual_seed(0)).half()
    weight[torch.arange(rows) % 3 == 0, :, 1] = 0  # groups with one nonzero too
    return weight.scatter(-1, weight.abs().argsort(-1)[..., :2], -0.0).reshape(rows, columns)


def test_cutlass_form_holds_every_weight_in_nine_sixteenths_of_the_bytes(pretend_cuda):
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    weight = two_of_four(64, 128)
    assert torch.signbit(weight[weight == 0]).any()
    result = kernels.pack(weight, "cutlass")
    dense = sparse_semi_structured_to_dense_cutlass(result.packed, result.meta)
    assert torch.equal(dense, weight) and not torch.signbit(dense[dense == 0]).any()
    assert result.bytes * 16 == weight.numel() * 2 * 9 and result.algorithms == ()


@pytest.fixture
def cusparselt(monkeypatch, pretend_cuda):
    """cuSPARSELt of dense tensors on the CPU: the weight is its own packed form; calls are written down."""
    calls = []

    def multiply(weight, x, bias=None, transpose_result=False, alg_id=0):
        assert transpose_result and x.shape[1] % 8 == 0 and x.stride(0) == 1
        calls.append((x.shape[1], alg_id))
        return torch.nn.functional.linear(
            x.t().float(), weight.float(), bias if bias is None else bias.float()
        ).to(x.dtype)

    def search(weight, x, transpose_result=False):
        calls.append(("search", x.shape[1]))
        if x.shape[1] == 256:
            raise RuntimeError("out of memory")
        return x.shape[1] % 7

    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return calls


def test_an_algorithm_is_searched_for_each_bucket_and_0_stands_where_the_search_fails(cusparselt):
    found = {}
    result = kernels.pack(two_of_four(16, 32), "cusparselt", found=found)
    assert result.algorithms == tuple(0 if size == 256 else size % 7 for size in BUCKETS)
    assert found == {("a GPU", HALF, 16, 32): result.algorithms}
    assert [size for kind, size in cusparselt if kind == "search"] == list(BUCKETS)
    assert {size for size, _ in cusparselt if size != "search"} == {8, 16, 24, 64, 264, 1024, 1032, 8192}


def test_an_algorithm_that_gives_something_else_than_the_default_is_not_taken(cusparselt, monkeypatch):
    right = torch._cslt_sparse_mm

    def wrong(weight, x, bias=None, transpose_result=False, alg_id=0):
        out = right(weight, x, bias, transpose_result, alg_id)
        return out.roll(1, 1) if alg_id == 2 else out * math.nan if alg_id == 1 else out

    monkeypatch.setattr(torch, "_cslt_sparse_mm", wrong)
    assert [size % 7 for size in BUCKETS] == [2, 1, 4, 2, 2]
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda weight, x, transpose_result: x.shape[1] % 7)
    assert kernels.pack(two_of_four(16, 32), "cusparselt").algorithms == (0, 0, 4, 0, 0)


def test_a_shape_is_searched_once(cusparselt):
    found = {}
    first = kernels.pack(two_of_four(16, 32), "cusparselt", found=found)
    del cusparselt[:]
    assert kernels.pack(two_of_four(16, 32), "cusparselt", found=found).algorithms == first.algorithms
    assert not cusparselt


def test_without_a_search_the_default_algorithm_serves_all(cusparselt):
    assert kernels.pack(two_of_four(16, 32), "cusparselt", search=False).algorithms == (0,) * len(BUCKETS)


@pytest.mark.parametrize("shape", [(32,), (1, 32), (3, 32), (16, 32), (2, 20, 32), (0, 32), (2, 0, 32)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_operator_pads_multiplies_and_cuts(cusparselt, shape, with_bias):
    weight, generator = two_of_four(16, 32), torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).half()
    bias = torch.randn(16, generator=generator).half() if with_bias else None
    result = kernels.pack(weight, "cusparselt")
    del cusparselt[:]
    out = kernels.linear(x, result, bias)
    torch.testing.assert_close(out, torch.nn.functional.linear(x, weight, bias), atol=1e-2, rtol=1e-2)
    assert out.is_contiguous() and out.shape == (*shape[:-1], 16)
    tokens = math.prod(shape[:-1])
    assert cusparselt == ([(padded(tokens), result.algorithms[bucket(tokens)])] if tokens else [])


def test_the_fake_kernel_agrees_with_the_operator_which_changes_and_returns_no_input(cusparselt):
    result = kernels.pack(two_of_four(16, 32), "cusparselt", search=False)
    for shape in ((3, 32), (16, 32), (2, 8, 32), (0, 32)):
        x, bias = torch.ones(shape, dtype=HALF), torch.ones(16, dtype=HALF)
        for one in (None, bias):
            args = (x, result.packed, None, one, 16, "cusparselt", [0, 1, 2, 3, 4])
            library.opcheck(kernels.sparse24_linear, args, test_utils=("test_schema", "test_faketensor"))


def test_mixed_dtypes_are_refused_because_the_library_would_take_them(cusparselt):
    result = kernels.pack(two_of_four(16, 32), "cusparselt", search=False)
    with pytest.raises(
        ServingError, match=r"torch.bfloat16 on cpu, torch.float16 on cpu\n  -> .* share dtype"
    ):
        kernels.linear(torch.ones(8, 32, dtype=torch.bfloat16), result)
    with pytest.raises(ServingError, match="torch.float32 on cpu"):
        kernels.linear(torch.ones(8, 32, dtype=HALF), result, torch.ones(16))


def test_the_self_check_finds_a_wrong_weight_and_what_is_not_a_number(cusparselt):
    weight = two_of_four(16, 32)
    result = kernels.pack(weight, "cusparselt", search=False)
    bias = torch.ones(16, dtype=HALF)
    assert kernels.self_check(weight, result, bias) <= TOLERANCE[HALF]
    state = torch.get_rng_state()
    assert kernels.self_check(weight.roll(1, 0), result) > 0.5
    assert torch.equal(torch.get_rng_state(), state)
    weight[0, 0] = math.nan
    assert kernels.self_check(weight, result) == math.inf


def test_the_self_check_tries_the_algorithm_of_every_bucket(cusparselt):
    weight = two_of_four(16, 32)
    result = replace(kernels.pack(weight, "cusparselt", search=False), algorithms=(3, 1, 4, 5, 9))
    kernels.self_check(weight, result)
    assert [algorithm for _, algorithm in cusparselt] == [3, 1, 4, 5, 9]


def test_the_tolerance_is_four_roundings_of_16_bits():
    for dtype in kernels.DTYPES:
        assert TOLERANCE[dtype] == 2 * torch.finfo(dtype).eps
    # Only CPU kernels take float32, whose sums of thousands of terms run in another order.
    assert set(TOLERANCE) - set(kernels.DTYPES) == {torch.float32} and TOLERANCE[torch.float32] == 2**-15
