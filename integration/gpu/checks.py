"""Right results: packed layers, other inputs, the file format, CUDA graphs, compilation."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from common import BF16_TOLERANCE, Run, all_ok, captured, describe, normal, relative_error, weight_24
from torch.nn.functional import linear as dense_linear

from msp_plugin.formats import sparse24
from msp_plugin.serving import kernels
from msp_plugin.serving.algorithms import TOLERANCE

CHECK_TOKENS = (1, 3, 16, 256, 4096)
CHECK_SHAPES = ((128, 256), (1024, 4096), (4096, 1024), (6144, 4096), (3584, 18944))
#: As small as ``choose`` lets them be. Checked late: what a library does at its limits can end the process.
SMALLEST_SHAPES = ((16, 16), (32, 64), (64, 32), (48, 80))
#: Correctness searches algorithms for weights up to this size; the timings search for all of theirs.
SEARCHED_WEIGHTS = 2**23


def correctness(run: Run) -> dict:
    """Return one row for every shape, dtype, kernel, token count and bias: errors against float32."""
    return checked_shapes(run, CHECK_SHAPES[:3] if run.quick else CHECK_SHAPES)


def smallest(run: Run) -> dict:
    """Return the same for the smallest shapes."""
    return checked_shapes(run, SMALLEST_SHAPES)


def checked_shapes(run: Run, shapes: tuple[tuple[int, int], ...]) -> dict:
    """Return one row for every case, and print those that are wrong."""
    rows = []
    for dtype in kernels.DTYPES:
        for shape in shapes:
            weight = weight_24(shape, dtype, run.device)
            for kernel in run.kernels_for(shape, dtype):
                case = {"kernel": kernel, "dtype": str(dtype), "shape": list(shape)}
                try:
                    rows += [{**case, **row} for row in check_layer(run, weight, kernel)]
                except Exception as error:  # one shape that a library refuses must not hide the others
                    rows.append({**case, "ok": False, "problem": describe(error)})
    wrong = [row for row in rows if not row["ok"]]
    for row in wrong[:10]:
        print("  wrong:", json.dumps(row))
    for dtype in map(str, kernels.DTYPES):
        both = [(r["error"], r["dense_error"]) for r in rows if r["dtype"] == dtype and "error" in r]
        if both:
            worst, dense = (max(errors) for errors in zip(*both, strict=True))
            print(f"  {dtype}: {len(both)} cases, largest error {worst:.1e}, of the dense kernel {dense:.1e}")
    return {"ok": all_ok(rows), "rows": rows}


def check_layer(run: Run, weight: torch.Tensor, kernel: str) -> list[dict]:
    """Return the errors of one packed layer and of the dense kernel."""
    search = not run.quick and weight.numel() <= SEARCHED_WEIGHTS
    packed = kernels.pack(weight, kernel, search=search, found=run.found)
    rows = []
    for tokens in CHECK_TOKENS:
        x = normal((tokens, weight.shape[1]), weight, seed=tokens)
        for bias in (None, normal((weight.shape[0],), weight, seed=7)):
            wide = None if bias is None else bias.float()
            reference = dense_linear(x.float(), weight.float(), wide)
            out = kernels.linear(x, packed, bias)
            error = relative_error(out, reference)
            rows.append(
                {
                    "tokens": tokens,
                    "bias": bias is not None,
                    "algorithms": packed.algorithms,
                    "error": error,
                    "dense_error": relative_error(dense_linear(x, weight, bias), reference),
                    "ok": error <= TOLERANCE[weight.dtype] and out.is_contiguous(),
                }
            )
    self_check = kernels.self_check(weight, packed)
    rows.append({"self_check": self_check, "ok": self_check <= TOLERANCE[weight.dtype]})
    return rows


def other_inputs(run: Run) -> dict:
    """Return whether inputs of other layouts, and a weight with negative zeros, come out right."""
    weight = weight_24((512, 1024), torch.bfloat16, run.device)
    x = normal((2, 5, 1024), weight, seed=1)
    inputs = {
        "three dimensions": x,
        "no tokens": x[:, :0],
        "one dimension": x[0, 0],
        "transposed": x.transpose(0, 1),
        "every second row": normal((40, 1024), weight, seed=2)[::2],
    }
    rows = []
    for kernel in run.kernels_for((512, 1024), weight.dtype):
        packed = kernels.pack(weight, kernel, search=False)
        cases = {name: (value, packed) for name, value in inputs.items()}
        negative = weight.masked_fill(weight == 0, -0.0)
        cases["negative zeros in the weight"] = (x, kernels.pack(negative, kernel, search=False))
        for name, (value, layer) in cases.items():
            out, dense = kernels.linear(value, layer), dense_linear(value, weight)
            same = out.shape == dense.shape and out.is_contiguous()
            error = relative_error(out, dense) if same and out.numel() else 0.0
            ok = same and error <= BF16_TOLERANCE
            rows.append({"kernel": kernel, "input": name, "error": error, "ok": ok})
    return {"ok": all_ok(rows), "rows": rows}


def file_format(run: Run) -> dict:
    """Return whether the checkpoint format gives the same bits back on the GPU, and its share of the bytes."""
    weight = weight_24((4096, 4096), torch.bfloat16, run.device)
    packed = sparse24.pack(weight, "layer")
    back = sparse24.unpack(packed, "layer")
    same = bool(torch.equal(back.view(torch.int16), weight.view(torch.int16)))
    return {"ok": same and back.device == weight.device, "bytes": packed.bytes / (weight.numel() * 2)}


def cuda_graphs(run: Run) -> dict:
    """Return whether a replayed graph of the operator equals the eager operator for inputs it has not seen."""
    weight = weight_24((4096, 4096), torch.bfloat16, run.device)
    bias, rows = normal((4096,), weight, seed=1), []
    for kernel in run.kernels_for((4096, 4096), weight.dtype):
        packed = kernels.pack(weight, kernel, search=not run.quick, found=run.found)
        for tokens in (1, 16, 256):
            x = normal((tokens, 4096), weight, seed=2)
            graph, out = captured(lambda x=x, packed=packed: kernels.linear(x, packed, bias))
            for seed in (3, 4, 5):
                x.copy_(normal((tokens, 4096), weight, seed=seed))
                graph.replay()
                eager = kernels.linear(x, packed, bias)
                error = relative_error(out, eager)
                rows.append(
                    {
                        "kernel": kernel,
                        "tokens": tokens,
                        "error": error,
                        "same_bits": bool(torch.equal(out, eager)),
                        "ok": error <= BF16_TOLERANCE,
                    }
                )
    return {"ok": all_ok(rows), "rows": rows}


class Layer(torch.nn.Module):
    """A packed linear between two operations that round nothing, so that compiled and eager bits can be equal."""

    def __init__(self, packed: kernels.Packed24, bias: torch.Tensor | None):
        super().__init__()
        self.packed, self.bias = packed, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.linear(torch.relu(x), self.packed, self.bias).neg()


def compilation(run: Run) -> dict:
    """Return whether a compiled module equals the eager one: for several token counts in one graph, and replayed."""
    from torch._dynamo.utils import counters

    weight = weight_24((1024, 2048), torch.bfloat16, run.device)
    kernel = run.kernels_for((1024, 2048), weight.dtype)[0]
    layer = Layer(kernels.pack(weight, kernel, search=False), normal((1024,), weight, seed=1))
    counters.clear()
    compiled = torch.compile(layer, fullgraph=True)
    rows = [compiled_row("dynamic", compiled, layer, (n, 2048), seed=n) for n in (5, 16, 33, 256)]
    graphs = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    rows += [compiled_row("reduce-overhead", compiled, layer, (16, 2048), seed=n) for n in range(5)]
    return {
        "ok": all_ok(rows) and graphs == 1,
        "graphs_for_four_token_counts": graphs,
        "cudagraph_skips": counters["inductor"].get("cudagraph_skips", 0),
        "rows": rows,
    }


def compiled_row(mode: str, compiled: Callable, layer: Layer, shape: tuple[int, int], seed: int) -> dict:
    """Return how far a compiled layer is from the eager one for an input of its own."""
    x = normal(shape, layer.packed.packed, seed)
    if mode == "dynamic":
        torch._dynamo.mark_dynamic(x, 0)
    torch.compiler.cudagraph_mark_step_begin()
    out, eager = compiled(x).clone(), layer(x)
    error = relative_error(out, eager)
    row = {"mode": mode, "tokens": shape[0], "error": error, "same_bits": bool(torch.equal(out, eager))}
    return {**row, "ok": error <= BF16_TOLERANCE}
