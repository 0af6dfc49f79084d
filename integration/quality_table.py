"""Dense, uniform and mixed sparsity on the demo models: the table of the README.

    python integration/quality_table.py --out integration/results

For every demo model, method, sparsity and seed: the same recipe with the uniform and with the searched
allocation, both pruned by the method through llm-compressor with errors propagated, both scored on
the same test text. A seed changes the calibration samples, the search samples and the search. Writes
quality.json (every run) and quality.md (mean and range over the seeds); models can be run side by
side, each with an --out of its own, and joined with --join. Full run: about an hour on two cores; --quick (one model, one seed) is what CI runs. Exit code 1 if mixed is behind uniform
anywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from statistics import mean

METHODS = ("sparsegpt", "wanda", "magnitude")
SPARSITIES = (0.625, 0.75)


def run_one(model: str, method: str, sparsity: float, seed: int, cache: Path) -> dict:
    """Return the row of one run: perplexities, share taken back, cost of the search."""
    from msp_plugin.demo import demo_model_path, demo_text
    from msp_plugin.hosts.llm_compressor.recipe import our_line, read_recipe
    from msp_plugin.pipeline import run_recipe

    recipe = read_recipe(files("msp_plugin.demo") / "recipe.yaml")
    our_line(recipe).update(method=method, sparsity=sparsity, seed=seed, cache=str(cache))
    text = dataclasses.replace(demo_text(), seed=seed)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as out:
        run = run_recipe(recipe, demo_model_path(model), text, Path(out) / "run", dtype="float32")
    q, s = run.record["perplexity"], run.record["search"]
    dense, uniform, mixed = (math.log(q[k]) for k in ("dense", "uniform", "mixed"))
    return {
        "model": model, "method": method, "sparsity": sparsity, "seed": seed, **q,
        "achieved": run.record["sparsity"]["achieved"], "exact": run.record["sparsity"]["exact"],
        "taken_back": (uniform - mixed) / (uniform - dense), "search_loss": s["loss"],
        "search_uniform_loss": s["uniform_loss"], "forward_tokens": s["forward_tokens"],
        "search_seconds": s["seconds"], "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """Return the Markdown table: means over the seeds, with the range of the share taken back."""
    lines = [
        "| model | method | zeros | dense | uniform | mixed | taken back (range) | mixed <= uniform |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["method"], row["sparsity"]), []).append(row)
    for (model, method, sparsity), group in groups.items():
        back = [100 * r["taken_back"] for r in group]
        ahead = sum(r["mixed"] <= r["uniform"] for r in group)
        lines.append(
            f"| {model} | {method} | {100 * sparsity:g} % | {mean(r['dense'] for r in group):.2f} "
            f"| {mean(r['uniform'] for r in group):.2f} | {mean(r['mixed'] for r in group):.2f} "
            f"| {mean(back):.0f} % ({min(back):.0f} to {max(back):.0f}) | {ahead} of {len(group)} |"
        )
    return "\n".join(lines)


def run_all(args: argparse.Namespace) -> list[dict]:
    """Return the rows of all runs; the runs of one model share a level database per method and seed."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for model in args.models:
            for seed in args.seeds:
                for method in args.methods:
                    for sparsity in args.sparsities:
                        rows.append(run_one(model, method, sparsity, seed, Path(cache)))
                        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("integration/results"))
    parser.add_argument("--models", nargs="+", default=["llama", "qwen2"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--join", nargs="+", type=Path, help="run nothing: join the results of these directories"
    )
    parser.add_argument("--quick", action="store_true", help="qwen2, every method, 75 %%, one seed")
    args = parser.parse_args()
    if args.quick:
        args.models, args.sparsities, args.seeds = ["qwen2"], [0.75], [0]
    import torch

    if args.join:
        rows = [r for path in args.join for r in json.loads((path / "quality.json").read_text())["rows"]]
    else:
        rows = run_all(args)
    rows.sort(key=lambda r: (r["model"], METHODS.index(r["method"]), r["sparsity"], r["seed"]))
    args.out.mkdir(parents=True, exist_ok=True)
    machine = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
    (args.out / "quality.json").write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")
    text = (
        "# Test perplexity of dense, uniform and mixed sparsity\n\n"
        f"Made by `python integration/quality_table.py`; {machine['machine']}, Python {machine['python']}, "
        f"torch {machine['torch']}; {len({r['seed'] for r in rows})} seed(s), means. "
        "*Taken back*: the share of uniform's loss increase over dense that mixed does not have.\n\n"
        f"{table(rows)}\n"
    )
    (args.out / "quality.md").write_text(text)
    print(text)
    behind = [r for r in rows if r["mixed"] > r["uniform"]]
    for row in behind:
        print(f"BEHIND UNIFORM: {row}")
    return 1 if behind else 0


if __name__ == "__main__":
    raise SystemExit(main())
