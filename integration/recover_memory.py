"""What a blockwise recovery of a large model costs: memory, and time against the count of weights.

    python integration/recover_memory.py --sizes "1 B"       # memory on the model of whole_run.py
    python integration/recover_memory.py --sizes "100 M" "300 M" --in-memory

Llamas of random weights with the demo's tokenizer; of every four weights the two smallest are zero. `msp recover` in float32
by `blockwise`, halves of blocks, 2 epochs of 7 samples of 256 tokens, one rate, without perplexities; with
`--offload`, and with ``--in-memory`` without it too. Peak memory is the largest resident set of the process, mapped
files with it, and of it the most that is anonymous, sampled every 50 ms: pages of files the system may drop.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from database_cost import RESULTS, machine, make_model
from growth import SIZES
from whole_run import Steps

OPTIONS = (
    "--method", "blockwise", "--set", "blockwise.epochs=2", "--set", "blockwise.rates=[0.06]", "--dtype", "float32",
    "--samples", "8", "--length", "256", "--data", "demo:calibration", "--test-samples", "0",
)  # fmt: skip


def make(size: str, folder: Path) -> int:
    """Write a dense and a sparse model; return the count of weights."""
    from msp_plugin.demo import demo_model_path
    from msp_plugin.models.layers import prunable_layers
    from msp_plugin.models.source import load_tokenizer
    from msp_plugin.plan.levels import Level
    from msp_plugin.pruning.masks import nm_mask

    model, tokenizer = make_model(*SIZES[size]), load_tokenizer(demo_model_path("llama"))
    for name in ("dense", "sparse"):
        if name == "sparse":
            for layer in prunable_layers(model).layers:
                weight = model.get_submodule(layer.name).weight.data
                weight.masked_fill_(~nm_mask(weight.abs().float(), Level.parse("2:4")), 0)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return sum(p.numel() for p in model.parameters())


def measure(size: str, offload: bool) -> dict[str, Any]:
    """Return the figures of one recovery."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        with torch.no_grad():
            weights = make(size, folder)
        command = [sys.executable, "-m", "msp_plugin", "recover", str(folder / "sparse"), *OPTIONS]
        command += ["--original", str(folder / "dense"), "--out", str(folder / "out")]
        began = time.perf_counter()
        steps = Steps(command + ["--offload"] * offload, {**os.environ, "MSP_CACHE": str(folder / "cache")})
        status, used = steps.wait()
        if status:
            raise SystemExit("the recovery failed")
        wall = time.perf_counter() - began
        stage = json.loads((folder / "out" / "run.json").read_text())["stages"][-1]
    anonymous = max(pair[0] for pair in steps.peaks.values())
    return {
        "size": size, "weights": weights, "offload": offload, "wall": wall, "recovery": stage["seconds"],
        "cpu": used.ru_utime + used.ru_stime, "peak_gb": used.ru_maxrss * 1024 / 1e9, "anonymous_gb": anonymous / 1e9,
        "curve": stage["recovery"]["curve"], "machine": machine(),
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the page."""
    lines = ["# Memory and time of a blockwise recovery", "", "Made by `python integration/recover_memory.py`: "
             + " ".join(__doc__.split("\n\n")[-1].split()), "",
             "| weights, M | weights, GB | on disk | peak GB | of it anonymous | recovery, s | CPU s | CPU s for 100 M weights |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        figures = (
            f"{row['weights'] / 1e6:.0f}", f"{4 * row['weights'] / 1e9:.2f}", "both models" if row["offload"] else "nothing",
            f"{row['peak_gb']:.2f}", f"{row['anonymous_gb']:.2f}", f"{row['recovery']:.0f}", f"{row['cpu']:.0f}",
            f"{1e8 * row['cpu'] / row['weights']:.0f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["1 B"], choices=list(SIZES))
    parser.add_argument("--in-memory", action="store_true", help="measure without --offload too")
    given = parser.parse_args()
    path = RESULTS / "recover_memory.json"
    for size in given.sizes:
        for offload in (True, False) if given.in_memory else (True,):
            rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
            rows = [row for row in rows if (row["size"], row["offload"]) != (size, offload)]
            rows = sorted([*rows, measure(size, offload)], key=lambda row: (row["weights"], row["offload"]))
            path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            (RESULTS / "recover_memory.md").write_text(markdown(rows), encoding="utf-8")
            print(markdown(rows), flush=True)


if __name__ == "__main__":
    main()
