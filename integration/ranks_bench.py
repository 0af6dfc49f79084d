"""What a second rank brings: the same allocation from one process and from several that torchrun starts.

    python integration/ranks_bench.py                   # the demo Llama, one rank against two
    python integration/ranks_bench.py --quick           # a smaller search, writes nothing

Every rank has one thread, so that the ranks of a run have as many cores as they are. Each run starts from an empty
cache; the seconds of the search, and of sensitivities and level database before it, are those that run.json tells.
All must find the same level for every layer; the losses differ by rounding, as the ranks add up parts of the samples.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
TEXT = ("--data", "demo:calibration", "--search-data", "demo:search", "--length", "256", "--samples", "64")
SEARCH = ("--set", "allocator.tokens=12288", "--set", "allocator.holdout=4096")
QUICK = ("--set", "allocator.tokens=2048", "--set", "allocator.holdout=1024", "--set", "allocator.rounds=3")


def allocate(ranks: int, model: str, options: tuple[str, ...], folder: Path) -> dict:
    """Return the seconds of a run with some ranks, the levels that it finds and their loss."""
    out = folder / f"{ranks}.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MSP_CACHE": str(folder / f"cache-{ranks}")}
    began = time.monotonic()
    run = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "msp_plugin",
            "allocate", model, "-s", "0.75", "--dtype", "float32", "--json", "--out", str(out), *options,
        ],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        raise SystemExit(run.stderr[-3000:])
    found = json.loads(run.stdout[run.stdout.index("{") :])["search"]
    levels = [unit["level"] for unit in json.loads(out.read_text())["units"]]
    return {
        "ranks": ranks, "seconds": time.monotonic() - began, "search_seconds": found["seconds"],
        "prepare_seconds": found["total_seconds"] - found["seconds"], "forward_tokens": found["forward_tokens"],
        "loss": found["loss"], "levels": levels,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:llama")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    options = (*TEXT, *(QUICK if args.quick else SEARCH))
    with tempfile.TemporaryDirectory() as folder:
        rows = [allocate(ranks, args.model, options, Path(folder)) for ranks in args.ranks]
    found = [row.pop("levels") for row in rows]
    equal = all(levels == found[0] for levels in found)
    first = rows[0]
    apart = max(abs(row["loss"] / first["loss"] - 1) for row in rows)
    machine = f"{platform.machine()}, {os.cpu_count()} logical cores"
    lines = [
        "# What a second rank brings", "",
        f"Made by `python integration/ranks_bench.py`; {args.model}, SparseGPT at 75 %, {machine}, one thread per rank.",
        "", "| ranks | search, s | times as fast | sensitivities and level database, s | times as fast "
        "| whole command, s | times as fast |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        lines.append(
            f"| {row['ranks']} | {row['search_seconds']:.1f} | {first['search_seconds'] / row['search_seconds']:.2f} "
            f"| {row['prepare_seconds']:.1f} | {first['prepare_seconds'] / row['prepare_seconds']:.2f} "
            f"| {row['seconds']:.1f} | {first['seconds'] / row['seconds']:.2f} |"
        )
    lines += ["", f"Allocation: {'equal' if equal else 'NOT EQUAL'}; the losses are {apart:.1e} apart."]
    print("\n".join(lines))
    if not args.quick:
        (RESULTS / "ranks.json").write_text(
            json.dumps({"machine": machine, "equal": equal, "rows": rows}, indent=1) + "\n"
        )
        (RESULTS / "ranks.md").write_text("\n".join(lines) + "\n")
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
