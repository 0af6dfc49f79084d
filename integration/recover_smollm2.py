"""Measure recoveries of SmolLM2-135M: shares of the loss taken back, seconds, peak memory; a stopped run goes on.

    python integration/recover_smollm2.py --work smollm2 --sparsity 5/8 --methods blockwise weight_update

``--work`` is a directory that integration/smollm2.py has made. Each cell is one `msp prune` (uniform or searched) and one
`msp recover` in a process of its own; a cell that is there is not run again. The table goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

ALLOCATIONS = {"uniform": ["--allocator", "uniform"], "search": []}


def command(arguments: list[str]) -> dict[str, float]:
    """Run `msp` with arguments; return its seconds and its peak resident memory in GiB."""
    start = time.monotonic()
    child = subprocess.Popen([sys.executable, "-m", "msp_plugin", *arguments])
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"msp {' '.join(arguments)} failed")
    return {"seconds": time.monotonic() - start, "peak_gib": usage.ru_maxrss / 2**20}


def cell(out: Path, arguments: list[str]) -> tuple[dict, dict[str, float]]:
    """Return the record and the cost of a run of `msp`, which is not repeated if its directory is there."""
    cost = out.with_suffix(".cost.json")
    if not (out / "run.json").exists():
        cost.write_text(json.dumps(command([*arguments, "--out", str(out)])))
    return json.loads((out / "run.json").read_text()), json.loads(cost.read_text())


def row(names: tuple[str, ...], record: dict, cost: dict[str, float]) -> str:
    """Return a line of the table."""
    values = record["perplexity"]
    dense, sparse, recovered = (math.log(values[name]) for name in ("dense", "mixed", "recovered"))
    share = (sparse - recovered) / (sparse - dense)
    stage = record["stages"][-1]
    figures = (
        f"{values['mixed']:.2f}", f"{values['recovered']:.2f}", f"{100 * share:.0f} %",
        f"{stage['seconds']:.0f}", f"{cost['peak_gib']:.2f}", f"{stage['recovery']['tokens']:,}",
    )  # fmt: skip
    return f"| {' | '.join((*names, *figures))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="where the runs go; default: WORK/recover")
    parser.add_argument("--sparsity", nargs="+", default=["1/2", "5/8", "3/4"])
    parser.add_argument("--allocations", nargs="+", choices=ALLOCATIONS, default=list(ALLOCATIONS))
    parser.add_argument("--methods", nargs="+", default=["blockwise"])
    parser.add_argument("--samples", default="128")
    parser.add_argument("--length", default="512")
    parser.add_argument("--test-samples", default="32")
    parser.add_argument("--set", nargs="+", default=[], help="options of the recovery, NAME.option=value")
    given = parser.parse_args()
    model, text = given.work / "model", given.work / "text"
    out = given.out or given.work / "recover"
    out.mkdir(parents=True, exist_ok=True)
    common = ["--data", str(text / "calibration.txt"), "--test-data", str(text / "test.txt")]
    common += ["--samples", given.samples, "--length", given.length, "--test-samples", given.test_samples]
    print(
        "| sparsity | allocation | method | sparse | recovered | taken back | seconds | peak GiB | tokens |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for sparsity in given.sparsity:
        for name in given.allocations:
            run = out / f"{sparsity.replace('/', '-')}-{name}"
            search = ["--search-data", str(text / "search.txt")] if name == "search" else []
            cell(
                run,
                ["prune", str(model), "-s", sparsity, "--no-baseline", *ALLOCATIONS[name], *search, *common],
            )
            for method in given.methods:
                options = [x for pair in given.set if pair.startswith(f"{method}.") for x in ("--set", pair)]
                recovered = run.with_name(f"{run.name}-{method}")
                start = ["recover", str(run), "--original", str(model), "--method", method]
                print(
                    row((sparsity, name, method), *cell(recovered, [*start, *options, *common])), flush=True
                )


if __name__ == "__main__":
    main()
