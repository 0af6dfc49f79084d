"""The 2:4 kernels on a real GPU: right results, memory and speed. Needs torch and transformers alone.

    python integration/gpu/sparse24_gpu.py --out results.json [--quick] [--sweep]

Run it from the repository root. It writes the JSON file after every section, and a Markdown report beside it.
Times are medians over CUDA events around replayed CUDA graphs of one call, as servers run them; the cache is
flushed before each, and dense and sparse calls alternate in one loop, so that a clock that drifts meets both.
Everything that the operator does is inside: padding, the multiplication, cutting.

Exit code 0; 1 if any result is wrong; 2 without a GPU that has a 2:4 kernel. A missed target of speed or memory
is printed as FAIL and does not change the exit code.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean, median

import torch
from torch.nn.functional import linear as dense_linear

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from msp_plugin.formats import sparse24
from msp_plugin.serving import kernels

#: (out, in) of the linears that a server runs: q, k and v as one, gate and up as one.
LAYERS = {
    "Llama-3-8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
    "Qwen2.5-7B": {
        "qkv": (4608, 3584),
        "o": (3584, 3584),
        "gate_up": (37888, 3584),
        "down": (3584, 18944),
    },
}
TOKENS = (1, 8, 16, 64, 256, 1024, 2048, 4096, 8192)
CHECK_TOKENS = (1, 3, 16, 256, 4096)
CHECK_SHAPES = ((128, 256), (1024, 4096), (4096, 1024), (6144, 4096), (3584, 18944))
#: As small as ``choose`` lets them be. Checked late: what a library does at its limits can end the process.
SMALLEST_SHAPES = ((16, 16), (32, 64), (64, 32), (48, 80))
#: Correctness searches algorithms for weights up to this size; the timings search for all of theirs.
SEARCHED_WEIGHTS = 2**23

MEMORY_TARGET, SPEED_TARGET, SPEED_TOKENS = 0.60, 1.3, 1024
LARGE = "min(out, in) >= 4096 or out x in >= 50e6"
#: The operator in a whole model may stray this many times as far from float32 as the dense kernel does.
DRIFT = 1.5


def is_large(shape: tuple[int, int]) -> bool:
    """Return True for the shapes that the speed target is about."""
    return min(shape) >= 4096 or math.prod(shape) >= 50e6


@dataclass
class Run:
    """What all sections share."""

    quick: bool
    deadline: float
    device: torch.device
    capability: tuple[int, int]
    found: kernels.Found = field(default_factory=dict)

    def left(self) -> float:
        """Seconds until the script should be done."""
        return self.deadline - time.monotonic()

    def kernels_for(self, shape: tuple[int, int], dtype: torch.dtype) -> list[str]:
        """Return the kernel that ``choose`` gives, and on 8.x, where both run, CUTLASS as well."""
        names = [kernels.choose(shape, dtype, self.device).kernel]
        if self.capability[0] == 8:
            names.append(kernels.choose(shape, dtype, self.device, has_cusparselt=False).kernel)
        return [name for name in dict.fromkeys(names) if name != "dense"]


# Weights and inputs


def masked_24(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight [out, in] with the two smallest of every four in a row set to zero; ties go to the left."""
    size = weight.abs().reshape(-1, 4)
    left, right = size[:, None, :], size[:, :, None]
    earlier = torch.ones(4, 4, dtype=torch.bool, device=weight.device).tril(-1)
    larger = (left > right) | ((left == right) & earlier)  # [groups, 4, 4]: [i, j] says that j goes before i
    return weight.masked_fill((larger.sum(-1, dtype=torch.uint8) >= 2).reshape(weight.shape), 0)


def weight_24(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> torch.Tensor:
    """Return a 2:4 weight [out, in] whose outputs are of size 1; every eighth row is 1:4, and one row is zero."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
    weight = masked_24(weight * (2 / shape[1]) ** 0.5).to(dtype)
    sparser = weight[::8].reshape(-1, 4)
    largest = sparser.abs().amax(-1, keepdim=True)
    weight[::8] = sparser.masked_fill(sparser.abs() < largest, 0).reshape(-1, shape[1])
    weight[shape[0] // 2] = 0
    return weight


def normal(shape: tuple[int, ...], like: torch.Tensor, seed: int) -> torch.Tensor:
    """Return seeded normal values in the dtype and on the device of another tensor."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference relative to the largest expected magnitude; infinite for a NaN."""
    scale = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    error = float((found.float() - expected.float()).abs().max()) / scale
    return error if math.isfinite(error) else math.inf


# 1 and 2: the machine, and right results


def machine(run: Run) -> dict:
    """Return what the numbers depend on."""
    properties = torch.cuda.get_device_properties(run.device)
    packages = {}
    for name in ("nvidia-cusparselt-cu12", "nvidia-cusparselt-cu13", "triton", "transformers"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "gpu": properties.name,
        "capability": ".".join(map(str, run.capability)),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cusparselt_available": torch.backends.cusparselt.is_available(),
        "cusparselt": torch.backends.cusparselt.version(),
        "packages": packages,
        "python": platform.python_version(),
        "kernels": {str(d): run.kernels_for((4096, 4096), d) for d in kernels.DTYPES},
        "reason": kernels.choose((4096, 4096), torch.bfloat16, run.device).reason,
    }


def driver_version() -> str | None:
    """Return the driver's version, or None where its tool is missing."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return found.stdout.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return None


def correctness(run: Run) -> dict:
    """Return one row for every shape, dtype, kernel, token count and bias: errors against float32."""
    return checked_shapes(run, CHECK_SHAPES[:3] if run.quick else CHECK_SHAPES)


def smallest(run: Run) -> dict:
    """Return the same for the smallest shapes."""
    return checked_shapes(run, SMALLEST_SHAPES)


def checked_shapes(run: Run, shapes: tuple[tuple[int, int], ...]) -> dict:
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
    return {"ok": bool(rows) and not wrong, "rows": rows}


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
                    "ok": error <= kernels.TOLERANCE[weight.dtype] and out.is_contiguous(),
                }
            )
    self_check = kernels.self_check(weight, packed)
    rows.append({"self_check": self_check, "ok": self_check <= kernels.TOLERANCE[weight.dtype]})
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
            ok = same and error <= tolerance()
            rows.append({"kernel": kernel, "input": name, "error": error, "ok": ok})
    return {"ok": bool(rows) and all(row["ok"] for row in rows), "rows": rows}


def tolerance() -> float:
    """What two right bfloat16 kernels can differ by."""
    return kernels.TOLERANCE[torch.bfloat16]


def file_format(run: Run) -> dict:
    """Return whether the checkpoint format gives the same bits back on the GPU, and its share of the bytes."""
    weight = weight_24((4096, 4096), torch.bfloat16, run.device)
    packed = sparse24.pack(weight, "layer")
    back = sparse24.unpack(packed, "layer")
    same = bool(torch.equal(back.view(torch.int16), weight.view(torch.int16)))
    return {"ok": same and back.device == weight.device, "bytes": packed.bytes / (weight.numel() * 2)}


# 4 and 5: CUDA graphs and compilation


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
                        "ok": error <= tolerance(),
                    }
                )
    return {"ok": bool(rows) and all(row["ok"] for row in rows), "rows": rows}


def captured(call: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Return a CUDA graph of one call, and the tensor that each replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is set up on first use must not be part of the graph
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


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
        "ok": all(row["ok"] for row in rows) and graphs == 1,
        "graphs_for_four_token_counts": graphs,
        "cudagraph_skips": counters["inductor"].get("cudagraph_skips", 0),
        "rows": rows,
    }


def compiled_row(mode: str, compiled: Callable, layer: Layer, shape: tuple[int, int], seed: int) -> dict:
    x = normal(shape, layer.packed.packed, seed)
    if mode == "dynamic":
        torch._dynamo.mark_dynamic(x, 0)
    torch.compiler.cudagraph_mark_step_begin()
    out, eager = compiled(x).clone(), layer(x)
    error = relative_error(out, eager)
    same = bool(torch.equal(out, eager))
    return {"mode": mode, "tokens": shape[0], "error": error, "same_bits": same, "ok": error <= tolerance()}


# 3 and 6: algorithms, memory and times


class Clock:
    """Medians of GPU times in microseconds."""

    def __init__(self, run: Run):
        cache = getattr(torch.cuda.get_device_properties(run.device), "L2_cache_size", 64 * 2**20)
        self.flush = torch.empty(max(4 * cache, 2**28), dtype=torch.uint8, device=run.device)

    def medians(self, calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
        """Return each call's median; the calls alternate, and the order turns round each time."""
        events: dict[str, list] = {name: [] for name in calls}
        for turn in range(repeats + 3):
            for name in list(calls) if turn % 2 else list(reversed(calls)):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self.flush.zero_()  # long enough, too, for the host to queue what follows
                start.record()
                calls[name]()
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize()
        return {
            name: 1000 * median(start.elapsed_time(end) for start, end in pairs[3:])
            for name, pairs in events.items()
        }


def timed_linears(run: Run) -> dict:
    """Return memory, algorithms and times of each layer of ``LAYERS``."""
    clock, layers = Clock(run), []
    for model, shapes in LAYERS.items():
        for name, shape in shapes.items():
            for kernel in run.kernels_for(shape, torch.bfloat16):
                if run.quick and name in ("qkv", "o"):
                    continue
                case = {"model": model, "layer": name, "shape": list(shape), "kernel": kernel}
                if run.left() < 30:
                    print(f"  out of time: {model} {name} was left out")
                    layers.append({**case, "skipped": True, "times": [], "algorithms": []})
                    continue
                layers.append({**case, **timed_layer(run, clock, shape, kernel)})
                print_layer(layers[-1])
                torch.cuda.empty_cache()
    times = [row for layer in layers for row in layer["times"]]
    return {"ok": bool(times) and all(row["ok"] for row in times), "layers": layers}


def timed_layer(run: Run, clock: Clock, shape: tuple[int, int], kernel: str) -> dict:
    """Return memory, algorithms and times of one layer."""
    weight = weight_24(shape, torch.bfloat16, run.device)
    start = time.monotonic()
    packed = kernels.pack(weight, kernel, found=run.found)
    torch.cuda.synchronize()
    seconds = time.monotonic() - start
    return {
        "bytes": packed.bytes / (weight.numel() * weight.element_size()),
        "pack_seconds": seconds,
        "times": [timed_row(run, clock, weight, packed, tokens) for tokens in token_counts(run)],
        "algorithms": [] if kernel == "cutlass" else algorithm_rows(run, clock, packed),
    }


def token_counts(run: Run) -> tuple[int, ...]:
    return (1, 16, 256, 2048) if run.quick else TOKENS


def repeats(run: Run, tokens: int) -> int:
    if run.quick:
        return 10
    return 60 if tokens <= 1024 else 20


def timed(
    clock: Clock, calls: dict[str, Callable[[], torch.Tensor]], count: int
) -> tuple[dict[str, float], str]:
    """Return the medians of the calls as CUDA graphs, or as the host launches them if they cannot be captured."""
    try:
        replays = {name: captured(call)[0].replay for name, call in calls.items()}
    except RuntimeError as error:
        return clock.medians(calls, count), f"host ({describe(error)})"
    return clock.medians(replays, count), "graph"


def timed_row(run: Run, clock: Clock, weight: torch.Tensor, packed: kernels.Packed24, tokens: int) -> dict:
    """Return the times of the dense and the sparse layer at a number of tokens, and how far they are apart."""
    x = normal((tokens, weight.shape[1]), weight, seed=tokens)
    error = relative_error(kernels.linear(x, packed), dense_linear(x, weight))
    calls = {"dense": lambda: dense_linear(x, weight), "sparse": lambda: kernels.linear(x, packed)}
    times, launch = timed(clock, calls, repeats(run, tokens))
    return {
        "tokens": tokens,
        "launch": launch,
        "dense_us": times["dense"],
        "sparse_us": times["sparse"],
        "ratio": times["dense"] / times["sparse"],
        "error": error,
        "ok": error <= tolerance(),
    }


def algorithm_rows(run: Run, clock: Clock, packed: kernels.Packed24) -> list[dict]:
    """Return, for each bucket, the time of the default algorithm, of the one searched, and of it split over in.

    The split is what the library's search pairs with its algorithm; the operator does not use it. Where a
    row has it and it is much faster, the operator should learn it.
    """
    rows = []
    for index, tokens in enumerate(kernels.BUCKETS):
        if run.left() < 30:
            break
        x = normal((tokens, packed.in_features), packed.packed, seed=tokens)
        options = {"default": {"alg_id": 0}, "searched": {"alg_id": packed.algorithms[index]}}
        split = split_option(x, packed)
        if split is not None and split["split_k"] != 1:
            options["split"] = split
        calls = {name: multiplication(x, packed, option) for name, option in options.items()}
        row: dict = {"tokens": tokens, "algorithm": packed.algorithms[index], "search": split}
        try:
            row["us"], row["launch"] = timed(clock, calls, repeats(run, tokens))
        except RuntimeError as error:
            row["problem"] = describe(error)
        rows.append(row)
    return rows


def multiplication(x: torch.Tensor, packed: kernels.Packed24, option: dict) -> Callable[[], torch.Tensor]:
    return lambda: torch._cslt_sparse_mm(packed.packed, x.t(), transpose_result=True, **option)


def split_option(x: torch.Tensor, packed: kernels.Packed24) -> dict | None:
    """Return what the newer search of torch finds, or None where torch does not have it."""
    try:
        found = torch._C._cusparselt.mm_search(packed.packed, x.t(), None, None, None, True)
        return {"alg_id": int(found[0]), "split_k": int(found[1]), "split_k_mode": int(found[2])}
    except (AttributeError, TypeError, RuntimeError):
        return None


def print_layer(layer: dict) -> None:
    ratios = " ".join(f"{row['tokens']}:{row['ratio']:.2f}" for row in layer["times"])
    name = f"{layer['model']} {layer['layer']}"
    print(
        f"  {name:20} {layer['shape'][0]:>5}x{layer['shape'][1]:<5} {layer['kernel']} "
        f"bytes {layer['bytes']:.3f} pack {layer['pack_seconds']:.1f}s  dense/sparse {ratios}"
    )
    found = [
        f"{row['tokens']}: " + " ".join(f"{name} {us:.1f}" for name, us in row.get("us", {}).items())
        for row in layer["algorithms"]
    ]
    print(f"    us by algorithm: {'; '.join(found)}", flush=True)


def host_cost(run: Run) -> dict:
    """Return what an eager call costs the host: time, and memory that does not come back."""
    weight = weight_24((4096, 4096), torch.bfloat16, run.device)
    x = normal((16, 4096), weight, seed=1)
    packed = kernels.pack(weight, run.kernels_for((4096, 4096), weight.dtype)[0], search=False)
    calls = {"dense": lambda: dense_linear(x, weight), "sparse": lambda: kernels.linear(x, packed)}
    result: dict = {"ok": True, "tokens": 16, "shape": [4096, 4096]}
    for name, call in calls.items():
        host_us(call, 200)
        before = resident_bytes()
        result[name] = {"us": host_us(call, 2000), "bytes_kept": (resident_bytes() - before) / 2000}
    print("  a call from the host:", json.dumps(result))
    return result


def host_us(call: Callable[[], object], times: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times * 1e6


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# 7: a whole model


class SparseLinear(torch.nn.Module):
    """A packed linear in the place of a dense one."""

    def __init__(self, dense: torch.nn.Linear, kernel: str, found: kernels.Found):
        super().__init__()
        self.packed = kernels.pack(dense.weight, kernel, found=found)
        self.bias = dense.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.linear(x, self.packed, self.bias)


def pruned_llama(run: Run) -> torch.nn.Module:
    """Return a Llama of 190 M random parameters, its decoder linears pruned to 2:4 by magnitude."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=2 if run.quick else 4,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).to(run.device, torch.bfloat16).eval()
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = masked_24(module.weight.data)
    return model


def with_sparse_linears(model: torch.nn.Module, run: Run) -> tuple[torch.nn.Module, float]:
    """Return a copy with the decoder linears packed, and their bytes relative to dense."""
    model = copy.deepcopy(model)
    dense_bytes = sparse_bytes = 0
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                kernel = run.kernels_for(tuple(child.weight.shape), child.weight.dtype)[0]
                sparse = SparseLinear(child, kernel, run.found)
                setattr(parent, name, sparse)
                dense_bytes += child.weight.numel() * child.weight.element_size()
                sparse_bytes += sparse.packed.bytes
    return model, sparse_bytes / dense_bytes


def end_to_end(run: Run) -> dict:
    """Return how far dense and sparse logits are from float32, and the times of whole forward passes."""
    dense = pruned_llama(run)
    sparse, share = with_sparse_linears(dense, run)
    ids = torch.randint(0, 4096, (2, 256), generator=torch.Generator().manual_seed(0)).to(run.device)
    reference = logits(copy.deepcopy(dense).float(), ids)
    of_dense, of_sparse = logits(dense, ids).float(), logits(sparse, ids).float()
    errors = {
        "dense": distance(of_dense, reference),
        "sparse": distance(of_sparse, reference),
        "between": distance(of_sparse, of_dense),
    }
    del reference
    rows = [forward_row(run, dense, sparse, shape) for shape in ((1, 1024), (8, 2048))]
    print("  relative errors:", json.dumps(errors))
    for row in rows:
        print("  forward:", json.dumps(row))
    return {
        "ok": math.isfinite(errors["sparse"]) and errors["sparse"] <= DRIFT * errors["dense"],
        "parameters": sum(p.numel() for p in dense.parameters()),
        "linear_bytes": share,
        "relative_errors": errors,
        "same_top_token": float((of_dense.argmax(-1) == of_sparse.argmax(-1)).float().mean()),
        "forwards": rows,
    }


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference relative to the norm of what was expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def forward_row(run: Run, dense: torch.nn.Module, sparse: torch.nn.Module, shape: tuple[int, int]) -> dict:
    """Return the times of a forward pass, launched by the host, and as a CUDA graph if it can be captured."""
    ids = torch.randint(0, 4096, shape, generator=torch.Generator().manual_seed(1)).to(run.device)
    clock, count = Clock(run), 5 if run.quick else 20
    calls = {"dense": lambda: logits(dense, ids), "sparse": lambda: logits(sparse, ids)}
    row: dict = {"shape": list(shape), "eager_us": clock.medians(calls, count)}
    row["eager_ratio"] = row["eager_us"]["dense"] / row["eager_us"]["sparse"]
    try:
        replays = {name: captured(call)[0].replay for name, call in calls.items()}
    except RuntimeError as error:  # the model's own code may wait for the GPU's results
        return row | {"graph_problem": describe(error)}
    row["graph_us"] = clock.medians(replays, count)
    row["graph_ratio"] = row["graph_us"]["dense"] / row["graph_us"]["sparse"]
    return row


# On demand: every algorithm by number


def sweep(run: Run) -> dict:
    """Return the time of each algorithm that the library accepts, for one layer: is the search's choice the best?"""
    shape, clock, rows = (28672, 4096), Clock(run), []
    weight = weight_24(shape, torch.bfloat16, run.device)
    packed = kernels.pack(weight, "cusparselt", found=run.found)
    for tokens in (16, 1024):
        x = normal((tokens, shape[1]), weight, seed=tokens)
        dense = clock.medians({"dense": captured(lambda x=x: dense_linear(x, weight))[0].replay}, 20)["dense"]
        times = {}
        for algorithm in range(256):
            if run.left() < 20:
                break
            try:
                graph, _ = captured(multiplication(x, packed, {"alg_id": algorithm}))
            except RuntimeError:  # past the last one
                break
            times[algorithm] = clock.medians({"one": graph.replay}, 10)["one"]
        if not times:
            break
        best = min(times, key=times.__getitem__)
        chosen = packed.algorithms[kernels.bucket(tokens)]
        rows.append({"tokens": tokens, "dense_us": dense, "us": times, "best": best, "searched": chosen})
        print(f"  {tokens} tokens: dense {dense:.1f}, best {best} {times[best]:.1f}, searched {chosen}")
    return {"rows": rows}


# The report


def verdicts(results: dict) -> list[dict]:
    """Return the targets, whether they are met, and by how much."""
    sections = [(name, part) for name, part in results.items() if "ok" in part and name != "sweep"]
    failed = [name for name, part in sections if not part["ok"]]
    text = f"wrong or failed: {', '.join(failed)}" if failed else f"all {len(sections)} sections"
    found = [{"target": "correctness", "passed": bool(sections) and not failed, "detail": text}]
    layers = [layer for layer in results.get("linears", {}).get("layers", []) if layer["times"]]
    if layers:
        found += [memory_verdict(layers), speed_verdict(layers)]
    return found


def memory_verdict(layers: list[dict]) -> dict:
    worst = max(layer["bytes"] for layer in layers)
    text = f"largest share {worst:.4f} of the dense bytes, target {MEMORY_TARGET}"
    return {"target": "memory", "passed": worst <= MEMORY_TARGET, "detail": text}


def speed_verdict(layers: list[dict]) -> dict:
    """Return the verdict on the large layers at many tokens."""
    points = {
        f"{layer['model']} {layer['layer']} at {row['tokens']}": row["ratio"]
        for layer in layers
        if is_large(tuple(layer["shape"]))
        for row in layer["times"]
        if row["tokens"] >= SPEED_TOKENS
    }
    if not points:
        return {"target": "speed", "passed": False, "detail": "nothing measured"}
    met = sum(ratio >= SPEED_TARGET for ratio in points.values())
    worst = min(points, key=points.__getitem__)
    text = (
        f"{met} of {len(points)} points at >= {SPEED_TARGET} (layers with {LARGE}, >= {SPEED_TOKENS} tokens); mean "
        f"{geometric_mean(points.values()):.2f}, least {points[worst]:.2f} ({worst}), most {max(points.values()):.2f}"
    )
    return {"target": "speed", "passed": met == len(points), "detail": text}


def markdown(results: dict) -> str:
    """Return the report."""
    about = results.get("machine", {})
    lines = ["# 2:4 kernels", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key not in ("ok", "error", "traceback")]
    lines += ["", "| target | | |", "|---|---|---|"]
    lines += [
        f"| {v['target']} | {'PASS' if v['passed'] else 'FAIL'} | {v['detail']} |" for v in verdicts(results)
    ]
    layers = [layer for layer in results.get("linears", {}).get("layers", []) if layer["times"]]
    if layers:
        lines += ["", "## Dense time over sparse time, bfloat16", "", *ratio_table(layers)]
        lines += ["", "## Microseconds, dense / sparse", "", *time_table(layers)]
        lines += ["", "## Algorithms: microseconds of the default and of the one searched", ""]
        lines += algorithm_table(layers)
    lines += ["", *forward_lines(results.get("end_to_end", {}))]
    lines += [f"\n{name} failed: `{part['error']}`" for name, part in results.items() if "error" in part]
    return "\n".join(lines).rstrip() + "\n"


def layer_table(layers: list[dict], head: str, cell: Callable[[dict], str]) -> list[str]:
    """Return a table of one row for each layer and one column for each number of tokens."""
    counts = list(dict.fromkeys(row["tokens"] for layer in layers for row in layer["times"]))
    lines = [
        f"| layer | out x in | {head} | " + " | ".join(map(str, counts)) + " |",
        "|" + "---|" * (3 + len(counts)),
    ]
    for layer in layers:
        cells = {row["tokens"]: cell(row) for row in layer["times"]}
        rest = f"{layer['bytes']:.3f}" if head == "bytes" else layer["kernel"]
        shape = " x ".join(map(str, layer["shape"]))
        values = " | ".join(cells.get(count, "-") for count in counts)
        lines.append(f"| {layer['model']} {layer['layer']} | {shape} | {rest} | {values} |")
    return lines


def ratio_table(layers: list[dict]) -> list[str]:
    return layer_table(layers, "bytes", lambda row: f"{row['ratio']:.2f}")


def time_table(layers: list[dict]) -> list[str]:
    return layer_table(layers, "kernel", lambda row: f"{row['dense_us']:.1f} / {row['sparse_us']:.1f}")


def algorithm_table(layers: list[dict]) -> list[str]:
    lines = [
        "| layer | tokens | searched | default | searched | split over in |",
        "|---|---|---|---|---|---|",
    ]
    for layer in layers:
        for row in layer["algorithms"]:
            us = row.get("us", {})
            cells = [f"{us[name]:.1f}" if name in us else "-" for name in ("default", "searched", "split")]
            name = f"{layer['model']} {layer['layer']}"
            lines.append(f"| {name} | {row['tokens']} | {row['algorithm']} | {' | '.join(cells)} |")
    return lines


def forward_lines(part: dict) -> list[str]:
    if "forwards" not in part:
        return []
    errors = ", ".join(f"{name} {value:.2e}" for name, value in part["relative_errors"].items())
    lines = [
        f"## A Llama of {part['parameters'] / 1e6:.0f} M parameters, dense time over sparse time",
        "",
        f"Logits, relative to float32: {errors}. Linears take {part['linear_bytes']:.3f} of the dense bytes.",
        "",
        "| batch x tokens | launched by the host | CUDA graph |",
        "|---|---|---|",
    ]
    for row in part["forwards"]:
        graph = f"{row['graph_ratio']:.2f}" if "graph_ratio" in row else "not captured"
        lines.append(f"| {row['shape'][0]} x {row['shape'][1]} | {row['eager_ratio']:.2f} | {graph} |")
    return lines


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"


# The run


SECTIONS: dict[str, Callable[[Run], dict]] = {
    "machine": machine,
    "correctness": correctness,
    "other_inputs": other_inputs,
    "file_format": file_format,
    "cuda_graphs": cuda_graphs,
    "linears": timed_linears,
    "host_cost": host_cost,
    "compilation": compilation,
    "end_to_end": end_to_end,
    "smallest": smallest,
}


def run_section(name: str, section: Callable[[Run], dict], run: Run, results: dict) -> None:
    """Add a section's result to the results; what a section raises is its result."""
    start = time.monotonic()
    print(f"{name} ...", flush=True)
    try:
        results[name] = section(run)
        torch.cuda.empty_cache()
    except Exception as error:  # a section that fails must not take the others' results with it
        results[name] = {"ok": False, "error": describe(error), "traceback": traceback.format_exc()}
        print(results[name]["traceback"])
    state = {True: "ok", False: "WRONG", None: ""}[results[name].get("ok")]
    print(f"{name} {state} {time.monotonic() - start:.1f} s", flush=True)


def write(results: dict, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**results, "verdicts": verdicts(results)}, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file to write; the report goes beside it"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer shapes, token counts and repeats, no --sweep"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="time every algorithm of cuSPARSELt for one layer"
    )
    parser.add_argument("--minutes", type=float, default=7.5, help="leave timings out after this long")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    return parser.parse_args(argv)


def unusable() -> str | None:
    """Return why this machine cannot run the script, if it cannot."""
    if not torch.cuda.is_available():
        return f"this needs an NVIDIA GPU; torch {torch.__version__} finds no CUDA device"
    choice = kernels.choose((4096, 4096), torch.bfloat16, torch.device("cuda", torch.cuda.current_device()))
    return f"this GPU has no 2:4 kernel: {choice.reason}" if choice.kernel == "dense" else None


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if problem := unusable():
        print(problem, file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")  # float32 is the reference
    gc.freeze()  # each capture of a graph may collect garbage, and should not look at the imported modules
    device = torch.device("cuda", torch.cuda.current_device())
    deadline = time.monotonic() + 60 * args.minutes
    run = Run(args.quick, deadline, device, torch.cuda.get_device_capability(device))
    results: dict = {}
    sections = {name: part for name, part in SECTIONS.items() if not args.only or name in args.only}
    if args.sweep and not args.quick:
        sections["sweep"] = sweep  # last: it asks the library for algorithms that it may not have
    for name, section in sections.items():
        run_section(name, section, run, results)
        if name == "machine":
            print(json.dumps(results[name], indent=1))
        write(results, args.out)
    for verdict in verdicts(results):
        print(f"{'PASS' if verdict['passed'] else 'FAIL'} {verdict['target']}: {verdict['detail']}")
    return 0 if verdicts(results)[0]["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
