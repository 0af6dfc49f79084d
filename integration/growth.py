"""How a level database and a short search grow with the model and with the levels.

    python integration/growth.py                          # all cases
    python integration/growth.py --cases "1 B, 2 levels"  # one case, added to results/growth.json
    python integration/growth.py --quick                  # a model of 11 M, writes nothing

Llamas of random weights in float32, 8 x 256 random tokens for the SparseGPT database and as many for the search,
which stops after its seeds. Each case is a process of its own; seconds are those of the work, peak
memory is that of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from database_cost import RESULTS, in_process, machine, make_data, make_model

#: Blocks, hidden size, intermediate size.
SIZES = {"100 M": (12, 768, 2048), "300 M": (18, 1152, 3072), "1 B": (19, 2048, 5632), "11 M": (2, 384, 1024)}
LEVELS = {2: ("2:4", "1:4"), 4: ("3:4", "2:4", "1:4", "1:8")}
CASES = ("100 M, 2 levels", "100 M, 4 levels", "300 M, 2 levels", "300 M, 4 levels", "1 B, 2 levels")
#: What the table says, below it.
WHY = """
Time is linear in the weights. It is not in the levels: statistics and factors serve all of them, so twice the levels
take about half as long again. Memory of the search grows less than in proportion: beside the model, Fisher diagonals
take at most 4 GiB, and so do the pruned weights that are held beside the present candidate's. CPU seconds and memory
compare; wall seconds of some rows were taken beside other work.
"""
SEARCH = {"name": "search", "tokens": 1024, "holdout": 1024, "rounds": 0, "seeds": 2}


def grow(size: str, levels: int, folder: str) -> dict[str, float]:
    """Return seconds, CPU seconds and peak memory of a database and a search of a model."""
    import torch

    from msp_plugin.data.samples import TextSplit
    from msp_plugin.models.layers import prunable_layers
    from msp_plugin.plan.budget import AllocationProblem
    from msp_plugin.plan.fractions import parse_sparsity
    from msp_plugin.plan.menus import parse_menu
    from msp_plugin.plugins.manager import Plugins
    from msp_plugin.search.measurements import Measurements

    torch.set_num_threads(2)
    model, data = make_model(*SIZES[size]), make_data(16, 256)
    calibration, rest = data.cut(8 * 256)
    search, holdout = rest.cut(4 * 256)
    table, menu, plugins = prunable_layers(model), parse_menu(["dense", *LEVELS[levels]]), Plugins()
    measurements = Measurements(
        model, table, menu, plugins.build("pruners", "sparsegpt"), TextSplit(calibration, search, holdout),
        {"fisher": plugins.build("estimators", {"name": "fisher", "samples": 2})}, folder,
    )  # fmt: skip
    found: dict[str, float] = {"parameters": sum(p.numel() for p in model.parameters())}

    def step(name: str, work) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        found[f"{name}_cpu"], found[f"{name}_wall"] = time.process_time() - cpu, time.perf_counter() - wall
        found[f"{name}_peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    problem = AllocationProblem(table, menu, parse_sparsity("0.6"))
    step("database", lambda: measurements.database)
    step("search", lambda: measurements.allocate(plugins.build("allocators", SEARCH), problem, 0))
    return found


def lines_of(cases: dict[str, dict[str, float]]) -> list[str]:
    """Return the table: seconds and memory, and both per million weights (and level)."""
    lines = [
        "| model | weights | database, CPU s | per M weights and level | wall s | peak GB "
        "| search, CPU s | per M weights | wall s | peak GB | peak bytes per weight |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in cases.items():
        millions, levels = row["parameters"] / 1e6, int(name.split(", ")[1][0])
        lines.append(
            f"| {name} | {millions:.0f} M | {row['database_cpu']:.0f} "
            f"| {row['database_cpu'] / millions / levels:.3f} | {row['database_wall']:.0f} "
            f"| {row['database_peak_gb']:.2f} | {row['search_cpu']:.0f} | {row['search_cpu'] / millions:.3f} "
            f"| {row['search_wall']:.0f} | {row['search_peak_gb']:.2f} "
            f"| {1000 * row['search_peak_gb'] / millions:.1f} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a model of 11 M alone; nothing is written")
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        size, levels = args.case.split(", ")
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(grow(size, int(levels[0]), folder)))
        return 0
    if args.quick:
        args.cases = ("11 M, 2 levels", "11 M, 4 levels")
    path = RESULTS / "growth.json"
    record = json.loads(path.read_text()) if path.exists() and not args.quick else {"cases": {}}
    for case in args.cases:
        record["cases"][case] = in_process(__file__, ["--case", case])
        cases = {name: record["cases"][name] for name in (*CASES, *args.cases) if name in record["cases"]}
        record = {"machine": machine(), "cases": cases}
        if not args.quick:
            path.write_text(json.dumps(record, indent=1) + "\n")
            head = ["# How cost grows", "", "Made by `python integration/growth.py`:"]
            head += [" ".join(__doc__.split("\n\n")[-1].split()), "", f"{record['machine']}", ""]
            (RESULTS / "growth.md").write_text("\n".join([*head, *lines_of(cases)]) + "\n" + WHY)
    print("\n".join(lines_of(record["cases"])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
