"""What packing costs in both formats: time against a plain pass over the weight, bytes on disk, memory of an export.

    python integration/sparse24_bench.py [--out integration/results/sparse24.json] [--threads 2]

Times are medians of interleaved runs. The plain pass copies the matrix and compares the copy with it: the least that
a writer that checks its own work could do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from msp_plugin.formats import bitmask
from msp_plugin.formats.sparse24 import is_packable, pack, unpack

SHAPE = (4096, 14336)  # down_proj of Llama-3-8B
LIMIT = 4.0  # times the plain pass
LAYERS, SHARD = 8, 128 * 2**20


def two_four(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return random weights of which two in every group of four are zero."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns // 4, 4, generator=generator)
    keep = torch.rand(weight.shape, generator=generator).topk(2, dim=-1).indices
    return (
        torch.zeros_like(weight).scatter_(-1, keep, weight.gather(-1, keep)).reshape(rows, columns).to(dtype)
    )


def medians(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each run, all of them interleaved, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if repeat:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def time_packing(repeats: int) -> dict[str, dict[str, float]]:
    """Return seconds and ratios to the plain pass, by dtype."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32, torch.int8):
        weight = (
            (100 * two_four(*SHAPE, torch.float32)).to(dtype)
            if dtype == torch.int8
            else two_four(*SHAPE, dtype)
        )
        packed, nonzeros = pack(weight), bitmask.pack(weight)
        assert torch.equal(bitmask.unpack(nonzeros).view(torch.uint8), weight.view(torch.uint8))
        assert torch.equal(unpack(packed).view(torch.uint8), weight.view(torch.uint8))
        seconds = medians(
            {
                "plain": lambda w=weight: torch.equal(w.clone(), w), "pack": lambda w=weight: pack(w),
                "unpack": lambda p=packed: unpack(p), "is_packable": lambda w=weight: is_packable(w),
                "pack_bitmask": lambda w=weight: bitmask.pack(w),
                "unpack_bitmask": lambda p=nonzeros: bitmask.unpack(p),
            },
            repeats,
        )  # fmt: skip
        dense = weight.numel() * weight.element_size()
        found[str(dtype).removeprefix("torch.")] = {
            **{f"{name}_seconds": value for name, value in seconds.items()},
            **{f"{name}_ratio": seconds[name] / seconds["plain"] for name in seconds if name != "plain"},
            "packed_over_dense": packed.bytes / dense, "packed_over_bf16": packed.bytes / (2 * weight.numel()),
        }  # fmt: skip
    return found


_EXPORT = """
import sys, threading, time
from pathlib import Path
from msp_plugin.checkpoint.export import Dense, export_checkpoint
from msp_plugin.checkpoint.packed_export import Bitmask, Sparse24
import msp_plugin.formats.bitmask, torch
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024
torch.ones(8).sum()
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous()); time.sleep(0.002)
thread = threading.Thread(target=watch, daemon=True); thread.start()
source, kind, out, shard = sys.argv[1:]
export_checkpoint(source, {"sparse24": Sparse24, "bitmask": Bitmask}.get(kind, Dense)(shard_bytes=int(shard)), out)
done = True; thread.join()
print(peak - before)
"""


def measure_export(work: Path) -> dict[str, dict[str, float]]:
    """Return the growth of private memory over each export, with what it may hold."""
    source = work / "source"
    source.mkdir()
    rows, columns = 4096, 8192
    layer_bytes = 2 * rows * columns
    for shard in range(4):
        part = range(shard * LAYERS // 4, (shard + 1) * LAYERS // 4)
        tensors = {
            f"model.layers.{i}.mlp.down_proj.weight": two_four(rows, columns, torch.bfloat16) for i in part
        }
        save_file(tensors, source / f"model-{shard + 1:05d}-of-00004.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps({"architectures": ["None"], "model_type": "llama"}))
    found = {}
    for kind, given, out in (
        ("sparse24", source, work / "packed"),
        ("dense", work / "packed", work / "dense"),
        ("bitmask", source, work / "bitmask"),
        ("dense from bitmask", work / "bitmask", work / "again"),
    ):
        command = [sys.executable, "-c", _EXPORT, given, kind, out, str(SHARD)]
        grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found[kind] = {
            "model_bytes": LAYERS * layer_bytes, "shard_bytes": SHARD, "layer_bytes": layer_bytes, "grown_bytes": grown,
            "layers_beyond_shard": (grown - SHARD) / layer_bytes,
        }  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sparse24.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    times = time_packing(options.repeats)
    with tempfile.TemporaryDirectory(prefix="msp-bench-") as work:
        memory = measure_export(Path(work))
    result = {
        "shape": SHAPE,
        "threads": options.threads,
        "torch": torch.__version__,
        "times": times,
        "export": memory,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    for dtype, row in times.items():
        print(f"{dtype}: pack {row['pack_ratio']:.2f}, unpack {row['unpack_ratio']:.2f}, as bitmask "
              f"{row['pack_bitmask_ratio']:.2f} and {row['unpack_bitmask_ratio']:.2f}, is_packable "
              f"{row['is_packable_ratio']:.2f} of a plain pass ({1000 * row['plain_seconds']:.0f} ms); "
              f"bytes {row['packed_over_dense']:.4f} of dense")  # fmt: skip
    for kind, row in memory.items():
        print(f"export {kind}: {row['grown_bytes'] / 2**20:.0f} MiB of private memory for a model of "
              f"{row['model_bytes'] / 2**20:.0f} MiB in shards of {row['shard_bytes'] / 2**20:.0f} MiB: one shard and "
              f"{row['layers_beyond_shard']:.1f} layers of {row['layer_bytes'] / 2**20:.0f} MiB")  # fmt: skip
    large = [kind for kind, row in memory.items() if row["layers_beyond_shard"] > 1]
    if large:
        print(f"more than one shard and one layer: {', '.join(large)}")
    slow = [
        d
        for d, row in times.items()
        if max(row[k] for k in row if "pack" in k and k.endswith("_ratio")) > LIMIT
    ]
    if slow:
        print(f"above {LIMIT} times the plain pass: {', '.join(slow)}")
    return 1 if large or "bfloat16" in slow else 0


if __name__ == "__main__":
    sys.exit(main())
