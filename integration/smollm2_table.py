"""Compare allocators on SmolLM2-135M: test perplexity and KL after the final pruning, at equal forward tokens.

    python integration/smollm2.py --out smollm2 --text wiki.valid.tokens
    python integration/smollm2_table.py --model smollm2 --work compared                      # all cells, hours
    python integration/smollm2_table.py --model smollm2 --work compared --cells sparsegpt:0.625:layer

A cell is one method, sparsity and granularity (``unit``: fused layers share a level), and one ``msp compare``: stopped, it
goes on with the same command. The figures go to results/smollm2.json and smollm2.md beside those of the cells that were
measured before; so do rows of one cell from runs with other ``--allocators``, if dense and uniform came out the same to the
last digit. The allocations lie in the cell's directory, for `msp prune --allocation`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CELLS = ("sparsegpt:0.5:layer", "sparsegpt:0.625:layer", "sparsegpt:0.75:layer", "wanda:0.625:layer")
#: A search that may take as long as it likes, and an earlier default: kept on the page, measured only if asked for.
LONG_CELL = "sparsegpt:0.625:layer:long"
EARLIER = (LONG_CELL, "sparsegpt:0.625:unit")
#: Forward tokens of atp, msp, evopress and search each, beside what measures uniform; and of the search that is long.
TOKENS, LONG = 200_000, 1_200_000
EQUAL = ("uniform", "owl", "atp", "knapsack", "knapsack@kfac", "msp", "evopress", "search")
ALLOCATORS = (*EQUAL, "search@long")
#: EvoPress' and MSP's authors spend hundreds of times as much: with their own counts one generation would be all.
OPTIONS = (
    f"atp.max_tokens={TOKENS}", f"msp.max_tokens={TOKENS}", f"evopress.max_tokens={TOKENS}", f"search.max_tokens={TOKENS}",
    f"search@long.max_tokens={LONG}",
    "msp.tokens=4096", "msp.generations=1000", "evopress.tokens=16384", "evopress.offspring=16",
    "evopress.survivors=[4,1]", "knapsack@kfac.surrogate=kfac", "evopress.tokens_per_selection=[512,4096]",
)  # fmt: skip


def run_cell(cell: str, model: Path, work: Path, allocators: Sequence[str]) -> dict[str, Any]:
    """Return the record of one cell, measured or, if it is there, read."""
    method, sparsity, granularity = cell.split(":")[:3]
    out, text = work / cell.replace(":", "-"), model / "text"
    if not (out / "compare.json").exists():
        command = [
            sys.executable, "-m", "msp_plugin", "compare", str(model / "model"), "-s", sparsity, "--methods", method,
            "--allocators", ",".join(allocators), "--data", str(text / "calibration.txt"),
            "--search-data", str(text / "search.txt"), "--test-data", str(text / "test.txt"),
            "--samples", "64", "--length", "512", "--test-samples", "32", "--granularity", granularity, "--cache", str(work / "cache"),
            "--out", str(out), "--verbose",
        ]  # fmt: skip
        for option in OPTIONS:
            if option.partition(".")[0] in allocators:
                command += ["--set", option]
        subprocess.run(command, check=True)
    return json.loads((out / "compare.json").read_text(encoding="utf-8"))


def rows_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return of each allocator what the table shows."""
    dense, uniform = record["dense"]["perplexity"], record["rows"][0]["perplexity"]
    found = []
    for row in record["rows"]:
        share = 1 - math.log(row["perplexity"] / dense) / math.log(uniform / dense)
        found.append({
            "allocator": row["allocator"], "perplexity": row["perplexity"], "kl": row["kl"],
            "database_kl": row["database"]["kl"], "taken_back": share,
            "tokens": row["forward_tokens"] + row["sensitivity_tokens"], "seconds": row["seconds"],
        })  # fmt: skip
    return found


def joined(
    rows: list[dict[str, Any]], before: dict[str, Any], dense: float, tokens: int
) -> list[dict[str, Any]]:
    """Return the rows of a cell with those of an earlier run that this one left out, if both measured the same."""
    same = (dense, rows[0]["perplexity"], tokens)
    if not before or (before["dense"], before["rows"][0]["perplexity"], before["tokens"]) != same:
        return rows
    by_name = {row["allocator"]: row for row in [*before["rows"], *rows]}
    return [by_name[name] for name in ALLOCATORS if name in by_name]


def write_allocations(record: dict[str, Any], cell: str, folder: Path) -> None:
    """Write each row's levels as an allocation.json, named by its allocator."""
    from msp_plugin.plan.allocation import make_allocation
    from msp_plugin.plan.budget import AllocationProblem
    from msp_plugin.plan.fractions import parse_sparsity
    from msp_plugin.plan.levels import Level
    from msp_plugin.records.comparison import CompareRecord

    method, sparsity, granularity = cell.split(":")[:3]
    menu = tuple(Level.parse(name) for name in record["levels"])
    table = CompareRecord.model_validate(record).table
    problem = AllocationProblem(table, menu, parse_sparsity(sparsity))
    provenance = {"method": {"name": method}, "levels": record["levels"], "granularity": granularity}
    for row in record["rows"]:
        choice = tuple(record["levels"].index(name) for name in row["levels"])
        allocation = make_allocation(problem, choice, provenance=provenance)
        text = json.dumps(allocation.to_dict(), indent=1) + "\n"
        (folder / f"{row['allocator']}.json").write_text(text, encoding="utf-8")


def draw_levels(record: dict[str, Any], path: Path) -> None:
    """Draw the level of each unit that ``search`` chose: blocks from left to right, a row for each kind of unit."""
    import matplotlib.pyplot as plt

    row = [row for row in record["rows"] if row["allocator"].startswith("search")][-1]
    kinds = list(dict.fromkeys(unit["name"].rpartition(".")[2] for unit in record["units"]))
    names = [name for name in record["levels"] if name in row["levels"]]
    blocks = 1 + max(unit["block"] for unit in record["units"])
    grid = [[float("nan")] * blocks for _ in kinds]
    for unit, level in zip(record["units"], row["levels"], strict=True):
        grid[kinds.index(unit["name"].rpartition(".")[2])][unit["block"]] = names.index(level)
    figure, axes = plt.subplots(figsize=(9, 2.2), layout="constrained")
    colors = plt.get_cmap("viridis_r", len(names))
    image = axes.imshow(grid, cmap=colors, vmin=-0.5, vmax=len(names) - 0.5, aspect="auto")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("decoder block")
    axes.set_xticks(range(0, blocks, 5))
    bar = figure.colorbar(image, ticks=range(len(names)), label="weights kept")
    bar.ax.set_yticklabels(names)
    figure.savefig(path, dpi=120)


def rank_correlation(rows: list[dict[str, Any]]) -> float:
    """Return Spearman's rank correlation of the KL with the database's weights and of that after the final pruning."""
    ranks = [[sorted(r[key] for r in rows).index(row[key]) for row in rows] for key in ("database_kl", "kl")]
    n = len(rows)
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (n * (n * n - 1))


def markdown(cells: dict[str, Any]) -> str:
    """Return the tables of all cells."""
    lines = ["# Allocators on SmolLM2-135M-Instruct", ""]
    lines += [
        "Pruned for good, block by block, on 64 samples of 512 tokens and those of the search; 32 test samples of 512 tokens.",
        "`atp`, `msp`, `evopress` and `search` may each use the tokens named. *Taken back* is the share of what",
        "uniform adds to the loss (the logarithm of the perplexity) over dense that the allocation saves. *KL, database* is",
        "measured with the level database's weights, as the search sees them, *KL* after the final pruning. Tokens count",
        "the sensitivities; seconds are of the allocator alone. `python integration/smollm2_table.py` makes this page. Where fused",
        "layers share a level, `evopress` is from before its mutants could trade between an attention and an MLP.",
    ]
    for cell, entry in cells.items():
        method, sparsity, granularity = cell.split(":")[:3]
        shares = "each layer has a level" if granularity == "layer" else "fused layers share a level"
        lines += [
            "",
            f"## {method} at {sparsity}, {shares}, {entry['tokens']:,} tokens; dense perplexity {entry['dense']:.2f}",
            "",
        ]
        lines += [
            "| allocator | test perplexity | taken back | KL | KL, database | tokens | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        best = min(row["perplexity"] for row in entry["rows"])
        for row in entry["rows"]:
            shown = f"{row['perplexity']:.2f}"
            shown = f"**{shown}**" if row["perplexity"] == best else shown
            lines.append(
                f"| {row['allocator']} | {shown} | {100 * row['taken_back']:.0f} % | {row['kl']:.3f} | "
                f"{row['database_kl']:.3f} | {row['tokens']:,} | {row['seconds']:.0f} |"
            )
        first, last = entry["rows"][0], entry["rows"][-1]
        survives = (first["kl"] - last["kl"]) / (first["database_kl"] - last["database_kl"])
        lines += ["", (
            f"Rank correlation of the two KLs {rank_correlation(entry['rows']):.2f}; of the gain in KL that `{last['allocator']}` sees, "
            f"{100 * survives:.0f} % is there after the final pruning."
        )]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("smollm2"), help="directory that smollm2.py made")
    parser.add_argument(
        "--work", type=Path, default=Path("smollm2/compared"), help="where the comparisons lie"
    )
    parser.add_argument("--cells", nargs="+", default=CELLS, choices=CELLS + EARLIER)
    parser.add_argument(
        "--allocators", nargs="+", choices=ALLOCATORS, help="default: all that a cell compares"
    )
    options = parser.parse_args()
    known = RESULTS / "smollm2.json"
    cells = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
    for name in options.cells:
        long = name == LONG_CELL
        allocators = options.allocators or (("uniform", "knapsack@kfac", "search@long") if long else EQUAL)
        tokens = LONG if long else TOKENS
        record = run_cell(name, options.model, options.work, allocators)
        write_allocations(record, name, options.work / name.replace(":", "-"))
        dense = record["dense"]["perplexity"]
        cells[name] = {
            "dense": dense, "tokens": tokens, "rows": joined(rows_of(record), cells.get(name, {}), dense, tokens),
            "machine": record["machine"], "versions": record["versions"],
        }  # fmt: skip
        cells = {cell: cells[cell] for cell in CELLS + EARLIER if cell in cells}
        if name == "sparsegpt:0.625:layer" and "search" in allocators:
            draw_levels(record, RESULTS / "smollm2_levels.png")
        known.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "smollm2.md").write_text(markdown(cells), encoding="utf-8")
    print(markdown(cells))
