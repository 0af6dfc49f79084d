"""Memory and times of the linears of two models, of the algorithms for them, and what a call costs the host.

Times are medians over CUDA events around replayed CUDA graphs of one call, as servers run them; the cache is
flushed before each, and dense and sparse calls alternate in one loop, so that a clock that drifts meets both.
Everything that the operator does is inside: padding, the multiplication, cutting.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from common import BF16_TOLERANCE, Run, all_ok, captured, describe, normal, relative_error, weight_24
from torch.nn.functional import linear as dense_linear

from msp_plugin.serving import kernels
from msp_plugin.serving.algorithms import BUCKETS

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
    return {"ok": all_ok(times), "layers": layers}


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
        "ok": error <= BF16_TOLERANCE,
    }


def algorithm_rows(run: Run, clock: Clock, packed: kernels.Packed24) -> list[dict]:
    """Return, for each bucket, the time of the default algorithm, of the one searched, and of it split over in.

    The split is what the library's search pairs with its algorithm; the operator does not use it. Where a
    row has it and it is much faster, the operator should learn it.
    """
    rows = []
    for index, tokens in enumerate(BUCKETS):
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
