"""Every allocator on both demo models, two methods and three sparsities: the committed table.

Each cell is one comparison (as ``msp compare`` makes it): the same calibration, search, stopping and test
samples and the same level database for all allocators; those that use a seed run with every seed. What a
cell has already is not run again, so that the table can be made in pieces:

    python integration/allocator_table.py --work cells --models llama     # and, beside it, --models qwen2
    python integration/allocator_table.py --work cells --allocators search evopress --seeds 3 4
    python integration/allocator_table.py --work cells --join
    python integration/allocator_table.py --work new --allocators search --earlier integration/results/allocators.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

MODELS, METHODS, SPARSITIES = ("llama", "qwen2"), ("sparsegpt", "wanda"), ("0.625", "0.75", "0.875")
#: EvoPress: 400 generations of 64 for the 224 layers of a 7B model are 57 for the 32 units of a demo model; the
#: table runs a quarter of them (integration/search_bench.py runs all), with its token ladder divided by 8, as
#: the samples are. MSP: about as many forward tokens.
EVOPRESS = {
    "name": "evopress", "generations": 14, "tokens_per_selection": [256, 2048, 8192], "tokens": 12288,
}  # fmt: skip
#: 1:8 is the default menu's sparsest level: at 87.5 % it would leave no choice but uniform.
LEVELS = {"0.875": ["default", "1:16", "1:32"]}
ALLOCATORS = {
    "uniform": "uniform", "atp": {"name": "atp", "tokens": 12288}, "owl": "owl", "alphapruning": "alphapruning", "dlp": "dlp",
    "lsa": "lsa", "one_shot": "one_shot", "mrp": "mrp",
    "knapsack, weight error": {"name": "knapsack", "surrogate": "weight"},
    "knapsack, output error": {"name": "knapsack", "surrogate": "output"},
    "knapsack, Fisher": {"name": "knapsack", "surrogate": "fisher"},
    "knapsack, replace-one KL": {"name": "knapsack", "surrogate": "kl", "tokens": 4096},
    "msp": {"name": "msp", "population": 12, "generations": 6, "offspring": 9, "tokens": 12288},
    "evopress": EVOPRESS,
    "search": {"name": "search", "tokens": 12288, "holdout": 4096},
}  # fmt: skip


def run_cell(
    path: Path, cell: tuple[str, str, str], seeds: list[int], names: list[str], cache: Path | None
) -> None:
    """Add to the comparison at ``path`` the rows of ``names`` and ``seeds`` that it lacks."""
    from msp_plugin.checkpoint.source import ModelSource
    from msp_plugin.demo import demo_model_path, demo_text
    from msp_plugin.plugins.manager import Plugins
    from msp_plugin.runs.compare import compare
    from msp_plugin.runs.grid import Grid

    model, method, sparsity = cell
    shared = {"levels": LEVELS.get(sparsity, ["default"])} | ({} if cache is None else {"cache": str(cache)})
    text = dataclasses.replace(demo_text(), test_samples=64)
    record = json.loads(path.read_text()) if path.exists() else None
    there = {(row["allocator"], row["seed"]) for row in record["rows"]} if record else set()
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        seeded = Plugins().build("allocators", ALLOCATORS[name]).seeded
        wanted = tuple(s for s in (seeds if seeded else [0]) if (name, s) not in there)
        groups.setdefault(wanted, []).append(name)
    for wanted, chosen in groups.items():
        if not wanted:
            continue
        allocators = {name: ALLOCATORS[name] for name in chosen}
        grid = Grid([sparsity], [method], allocators, list(wanted), shared)
        found = compare(ModelSource(demo_model_path(model), "float32"), text, grid).to_dict()
        if record is None:
            record = found
        else:
            record["rows"] += found["rows"]
        path.write_text(json.dumps(record))


def summary(cells: dict[tuple[str, str, str], dict]) -> list[dict]:
    """Return one entry per cell and allocator: means and sample standard deviations over the seeds."""
    found = []
    for (model, method, sparsity), record in cells.items():
        groups: dict[str, list[dict]] = {}
        for row in record["rows"]:
            groups.setdefault(row["allocator"], []).append(row)
        for allocator, rows in groups.items():
            entry = {
                "model": model, "method": method, "sparsity": float(sparsity), "allocator": allocator,
                "seeds": len(rows), "errors": [row["error"] for row in rows if row["error"]],
            }  # fmt: skip
            done = [row for row in rows if not row["error"]]
            for key in (
                "perplexity",
                "kl",
                "holdout_loss",
                "forward_tokens",
                "sensitivity_tokens",
                "seconds",
            ):
                values = [row[key] for row in done]
                known = values and None not in values  # a seed whose loss is not finite is no part of a mean
                entry[key] = statistics.mean(values) if known else None
                entry[f"{key}_spread"] = statistics.stdev(values) if known and len(values) > 1 else None
            entry["pairs"] = [[row["database"]["kl"], row["kl"]] for row in done]
            found.append(entry)
    return found


def is_tie(entry: dict, best: dict) -> bool:
    """True if the KL is no further from the best than the noise."""
    from msp_plugin.records.statistics import within_noise

    return within_noise(entry["kl"], entry["kl_spread"], best["kl"], best["kl_spread"])


def by_cell(entries: list[dict]) -> dict[tuple[str, str, float], dict[str, dict]]:
    """Return the entries that have a KL by (model, method, sparsity) and allocator."""
    found: dict[tuple[str, str, float], dict[str, dict]] = {}
    for entry in entries:
        cell = found.setdefault((entry["model"], entry["method"], entry["sparsity"]), {})
        if entry["kl"] is not None:
            cell[entry["allocator"]] = entry
    return found


def markdown(entries: list[dict]) -> str:
    """Return one table per model: per cell the test KL (perplexity) of every allocator, the best in bold."""
    cells = by_cell(entries)
    tables = []
    for model in dict.fromkeys(model for model, _, _ in cells):
        own = {key[1:]: rows for key, rows in cells.items() if key[0] == model}
        heads = [f"{method} {100 * sparsity:g} %" for method, sparsity in own]
        lines = [
            f"| {model} | " + " | ".join(heads) + " | forward tokens |",
            "|---|" + "---|" * (len(own) + 1),
        ]
        for allocator in [name for name in ALLOCATORS if any(e["allocator"] == name for e in entries)]:
            tokens = [
                rows[allocator]["forward_tokens"] + rows[allocator]["sensitivity_tokens"]
                for rows in own.values() if allocator in rows
            ]  # fmt: skip
            mean = f"{statistics.mean(tokens):,.0f}" if tokens else ""
            lines.append(
                f"| {allocator} | "
                + " | ".join(_text(rows, allocator) for rows in own.values())
                + f" | {mean} |"
            )
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _options(spec: str | dict) -> str:
    """Return the options of an allocator but those that only say what it is."""
    named = {} if isinstance(spec, str) else {k: v for k, v in spec.items() if k not in ("name", "surrogate")}
    return ", ".join(f"{key} {value}" for key, value in named.items())


def _text(rows: dict[str, dict], allocator: str) -> str:
    if allocator not in rows:
        return "failed"
    entry, best = rows[allocator], min(rows.values(), key=lambda e: e["kl"])
    spread = "" if entry["kl_spread"] is None else f" ±{entry['kl_spread']:.3f}"
    text = f"{entry['kl']:.3f}{spread} ({entry['perplexity']:.2f})"
    if entry is best:
        return f"**{text}**"
    return text + (" =" if is_tie(entry, best) else "")


def verdicts(entries: list[dict]) -> tuple[list[str], list[str]]:
    """Return the cells where search is neither best nor within noise, and those where it is behind uniform."""
    behind_best, behind_uniform = [], []
    for (model, method, sparsity), rows in by_cell(entries).items():
        name = f"{model} {method} {100 * sparsity:g} %"
        if "search" not in rows:
            behind_best.append(f"{name}: search failed")
            continue
        best = min(rows.values(), key=lambda e: e["kl"])
        if not is_tie(rows["search"], best):
            behind_best.append(
                f"{name}: search {rows['search']['kl']:.4f}, {best['allocator']} {best['kl']:.4f}"
            )
        if "uniform" in rows and rows["search"]["kl"] > rows["uniform"]["kl"]:
            behind_uniform.append(name)
    return behind_best, behind_uniform


def sensitivity_tokens(allocator: str, texts: dict) -> int:
    """Return the forward tokens of the sensitivities that an allocator of the table reads, of all calibration samples."""
    import torch

    from msp_plugin.data.calibration import CalibrationSet
    from msp_plugin.passes.gradients import BACKWARD
    from msp_plugin.plugins.manager import Plugins

    count, plugins = texts["calibration"]["samples"], Plugins()
    one = torch.zeros(texts["calibration"]["tokens"] // count, dtype=torch.int64)
    data, built = CalibrationSet((one,) * count, ""), plugins.build("allocators", ALLOCATORS[allocator])
    read = (plugins.build("estimators", name).forward_tokens(data) for name in built.sensitivities)
    return sum(read) + (BACKWARD * data.tokens if "fisher" in built.errors else 0)


def taken_over(entries: list[dict], cells: dict[tuple[str, str, str], dict], earlier: dict) -> list[dict]:
    """Return the entries with those of an earlier table whose cell is measured and whose allocator is not.

    Raises:
        ValueError: a cell's texts are not those that the earlier table has of its model.
    """
    for cell, record in cells.items():
        if record["texts"] != earlier["texts"][cell[0]]:
            raise ValueError(f"{cell}: other texts than those of the earlier table")
    known = {(e["model"], e["method"], e["sparsity"]) for e in entries}
    have = {(e["model"], e["method"], e["sparsity"], e["allocator"]) for e in entries}
    return entries + [
        {"sensitivity_tokens": sensitivity_tokens(e["allocator"], earlier["texts"][e["model"]]), **e, "earlier": True}
        for e in earlier["cells"]
        if (cell := (e["model"], e["method"], e["sparsity"])) in known and (*cell, e["allocator"]) not in have
    ]  # fmt: skip


def apart(entries: list[dict], earlier: dict) -> float | None:
    """Return the median difference of the KL of rows that were measured again from what they were, as a share.

    Of allocators that have no seed, as the others' rows are means; None if there is none.
    """
    before = {(e["model"], e["method"], e["sparsity"], e["allocator"]): e for e in earlier["cells"]}
    pairs = [
        (e["kl"], before[key]["kl"]) for e in entries
        if e["kl_spread"] is None and (key := (e["model"], e["method"], e["sparsity"], e["allocator"])) in before
    ]  # fmt: skip
    return statistics.median(abs(now / then - 1) for now, then in pairs) if pairs else None


def write(cells: dict[tuple[str, str, str], dict], out: Path, earlier: dict | None = None) -> int:
    """Write allocators.json and allocators.md; return 1 if search is behind uniform anywhere."""
    from msp_plugin.records.statistics import rank_correlation

    entries, said = summary(cells), ""
    if earlier:
        change = apart(entries, earlier)
        entries = taken_over(entries, cells, earlier)
        kept = ", ".join(dict.fromkeys(e["allocator"] for e in entries if e.get("earlier")))
        said = (
            f" The rows of {kept} are an earlier run's, on the same texts and maybe another CPU, where products round "
            "otherwise"
        )
        if change is not None:
            said += f"; rows of allocators without a seed that were measured again changed by {100 * change:.1f} % (median)"
        said += "."
    behind_best, behind_uniform = verdicts(entries)
    lines = [
        "# Allocators on one level database",
        "",
        "Made by `python integration/allocator_table.py`. Test KL to the dense model in nats per token (test "
        "perplexity in parentheses), after llm-compressor pruned the model to the allocation with errors "
        "propagated. Mean and sample standard deviation over three seeds; where no deviation stands, it is one "
        "run (of allocators that use no seed, if all seeds ran). "
        "EvoPress runs a quarter of its schedule scaled to the model (14 generations of 64), with its token "
        "ladder divided by 8. At 87.5 % the menu has 1:16 and 1:32 "
        "beside the default levels, whose sparsest is 1:8. Bold: "
        "least KL of the cell; `=`: within twice the spread of it. Forward tokens: what the allocator put "
        "through the model, mean over the cells: candidates, and the sensitivities that it reads, a backward pass "
        "counting as two forward passes; the level database, which all measure with, is not in it. The search text "
        "has 12,288 tokens, on which atp, msp, evopress and search measure candidates, the replace-one KL on 4,096 "
        "of them; search looks at 4,096 more, its hold-out. Options: "
        + "; ".join(f"{name} {_options(spec)}" for name, spec in ALLOCATORS.items() if _options(spec))
        + "; all others are the defaults."
        + said,
        "",
        markdown(entries),
        "",
        "Search is neither best nor within noise of the best in: "
        + ("; ".join(behind_best) or "no cell")
        + ".",
        "Search is behind uniform in: " + (", ".join(behind_uniform) or "no cell") + ".",
        "",
        "Does the ranking survive the final pruning? Spearman's rank correlation, over all allocations of a "
        "cell, of the test KL with the level database's weights (what a search measures) and after the final "
        "pruning:",
        "",
        "| cell | different allocations | correlation |",
        "|---|---|---|",
    ]
    correlations = []
    for cell in cells:
        pairs = [p for e in entries if (e["model"], e["method"], f"{e['sparsity']:g}") == (cell[0], cell[1], f"{float(cell[2]):g}")
                 for p in e["pairs"]]  # fmt: skip
        pairs = sorted(set(map(tuple, pairs)))  # allocations that several found count once
        rho = rank_correlation(pairs)
        correlations.append({"cell": cell, "allocations": len(pairs), "spearman": rho})
        lines.append(f"| {cell[0]} {cell[1]} {100 * float(cell[2]):g} % | {len(pairs)} | {rho:.3f} |")
    wanted = [(m, p, s) for m in MODELS for p in METHODS for s in SPARSITIES]
    missing = [f"{m} {p} {100 * float(s):g} %" for m, p, s in wanted if (m, p, s) not in cells]
    if missing:
        lines += ["", "Cells not measured: " + ", ".join(missing) + "."]
    first = next(iter(cells.values()))
    out.mkdir(parents=True, exist_ok=True)
    (out / "allocators.md").write_text("\n".join(lines) + "\n")
    payload = {
        "machine": first["machine"], "versions": first["versions"],
        "texts": {model: record["texts"] for (model, _, _), record in cells.items()},
        "cells": entries, "correlations": correlations,
    }  # fmt: skip
    (out / "allocators.json").write_text(json.dumps(payload, indent=1, sort_keys=True) + "\n")
    print("\n".join(lines))
    return 1 if behind_uniform else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("allocator-cells"), help="finished cells")
    parser.add_argument("--out", type=Path, default=Path("integration/results"))
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", default=list(SPARSITIES))
    parser.add_argument("--allocators", nargs="+", default=list(ALLOCATORS), choices=list(ALLOCATORS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--join", action="store_true", help="run nothing: make the table of all cells in --work"
    )
    parser.add_argument(
        "--earlier",
        type=Path,
        help="allocators.json whose rows of allocators that --work lacks are taken over",
    )
    parser.add_argument(
        "--quick", action="store_true", help="qwen2, two methods, 75 %%, one seed, three allocators"
    )
    args = parser.parse_args()
    if args.quick:
        args.models, args.methods, args.sparsities, args.seeds = (
            ["qwen2"],
            ["sparsegpt", "magnitude"],
            ["0.75"],
            [0],
        )
        args.allocators = ["uniform", "owl", "search"]
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.join:
        for sparsity in args.sparsities:
            for method in args.methods:
                for model in args.models:
                    path = args.work / f"{model}-{method}-{sparsity}.json"
                    run_cell(path, (model, method, sparsity), args.seeds, args.allocators, args.cache)
    paths = {tuple(path.stem.split("-")): path for path in sorted(args.work.glob("*.json"))}
    cells = {
        (model, method, sparsity): json.loads(paths[model, method, sparsity].read_text())
        for model in MODELS for method in (*METHODS, "magnitude") for sparsity in SPARSITIES
        if (model, method, sparsity) in paths
    }  # fmt: skip
    return write(cells, args.out, json.loads(args.earlier.read_text()) if args.earlier else None)


if __name__ == "__main__":
    raise SystemExit(main())
