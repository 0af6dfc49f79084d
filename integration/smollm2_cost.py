"""CPU seconds of a whole searched run on SmolLM2-135M against one uniform llm-compressor run on the same samples.

    python integration/smollm2.py --out smollm2 --text wiki.valid.tokens
    python integration/smollm2_cost.py --model smollm2                  # --dtype float32 on a CPU without bfloat16

The uniform run is ``msp run`` of a recipe, which llm-compressor carries out; the searched one is ``msp prune``. Both are
from nothing, one after the other, each with a cache of its own. The figures go to
results/smollm2_cost.json; the searched run's directory, with its report.html, is left in ``--work``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
MOST = 6.0


def run(model: Path, work: Path, sparsity: str, allocator: str, samples: int, dtype: str) -> dict[str, float]:
    """Return CPU and wall seconds and the test perplexity of one run."""
    out, cache, text = work / allocator, work / f"{allocator}-cache", model / "text"
    for path in (out, cache):
        shutil.rmtree(path, ignore_errors=True)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    if allocator == "uniform":
        line = {"sparsity": sparsity, "method": "sparsegpt", "allocator": allocator, "cache": str(cache)}
        recipe = work / "uniform.json"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(
            json.dumps({"a_stage": {"a_modifiers": {"MixedSparsityModifier": line}}}), encoding="utf-8"
        )
        what = ["run", str(recipe), "--model", str(model / "model")]
    else:
        what = [
            "prune",
            str(model / "model"),
            "-s",
            sparsity,
            "--allocator",
            allocator,
            "--cache",
            str(cache),
        ]
    command = [
        sys.executable, "-m", "msp_plugin", *what, "--data", str(text / "calibration.txt"),
        "--search-data", str(text / "search.txt"), "--test-data", str(text / "test.txt"),
        "--samples", str(samples), "--length", "512", "--dtype", dtype, "--no-baseline", "--out", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, "TQDM_DISABLE": "1"})
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - began
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    quality = record["perplexity"]
    return {
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "seconds": round(seconds, 1), "dense": quality["dense"], "perplexity": quality["mixed"],
        "search": record.get("search"),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("smollm2"), help="directory that smollm2.py made")
    parser.add_argument("--work", type=Path, default=Path("smollm2/cost"))
    parser.add_argument("--sparsity", default="0.625")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    found = {
        name: run(options.model, options.work, options.sparsity, name, options.samples, options.dtype)
        for name in ("uniform", "search")
    }
    ratio = found["search"]["cpu_seconds"] / found["uniform"]["cpu_seconds"]
    found |= {
        "ratio": round(ratio, 2),
        "samples": options.samples,
        "sparsity": options.sparsity,
        "dtype": options.dtype,
    }
    (RESULTS / "smollm2_cost.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in found.items() if k != "search"}, indent=1))
    print(f"searched run: {ratio:.2f} times the CPU seconds of the uniform one, at most {MOST} are the goal")
    raise SystemExit(ratio > MOST)
