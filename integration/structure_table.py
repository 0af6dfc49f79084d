"""Structured methods and allocations against each other, at equal parameters of the prunable layers.

Each row prunes a demo model by one method and one allocation, and measures it on text that neither saw. Results go to
results/structure.json and .md after each row; what is there is not run again.

    python integration/structure_table.py --model qwen2 --small
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
#: Channels that widths come in; the demo models' MLPs have 384.
QUANTUM = 16
SCORES = ("first", "second", "mixed", "vector")
#: Rows beside the uniform ones: name, levels, allocator.
SEARCHES = (("width by search", "width", "search"), ("mixed by search", "mixed", "search"))


@dataclass(frozen=True)
class Row:
    """One pruned model: what makes it, and its name in the table."""

    allocation: str
    method: dict[str, Any]
    levels: str
    allocator: dict[str, Any]

    @property
    def method_name(self) -> str:
        """The method with its score."""
        return " ".join(str(value) for value in self.method.values())


def rows(search: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of a table.

    Args:
        search: options of the search.
    """
    methods = [{"name": "llm_pruner", "taylor": taylor} for taylor in SCORES]
    methods += [{"name": name} for name in ("flap", "obs", "l2", "random")]
    yield from (Row("uniform width", method, "width", {"name": "uniform"}) for method in methods)
    leave_one_out = {"name": "knapsack", "surrogate": "kl", "tokens": search["tokens"]}
    yield Row("depth by leave-one-out", {"name": "magnitude"}, "depth", leave_one_out)
    yield Row("depth by search", {"name": "magnitude"}, "depth", {"name": "search", **search})
    for name, levels, allocator in SEARCHES:
        for method in ({"name": "llm_pruner", "taylor": "first"}, {"name": "obs"}):
            yield Row(name, method, levels, {"name": allocator, **search})


def measure(model: str, share: str, row: Row, sizes: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Return the figures of one row."""
    from msp_plugin import Text, prune
    from msp_plugin.demo import demo_model_path

    text = Text(
        "demo:calibration",
        test="demo:test",
        samples=sizes.samples,
        length=sizes.length,
        test_samples=sizes.test_samples,
    )
    out = Path(tempfile.mkdtemp(dir=cache)) / "run"
    start = time.monotonic()
    widths = {} if row.levels == "depth" else {"quantum": QUANTUM}
    run = prune(
        demo_model_path(model), text, out, dtype="float32", baseline=False, cache=str(cache),
        sparsity=share, method=row.method, levels=[row.levels], allocator=row.allocator, **widths,
    )  # fmt: skip
    assert run is not None
    record, allocation = run.record, json.loads((out / "allocation.json").read_text(encoding="utf-8"))
    shutil.rmtree(out.parent)
    return {
        "dense": record.perplexity["dense"],
        "perplexity": record.perplexity.get("mixed") or record.perplexity.get("result"),
        "zeros": allocation["budget"]["zeros"],
        "weights": allocation["budget"]["weights"],
        "levels": {unit["name"]: unit["level"] for unit in allocation["units"]},
        "search_tokens": record.search.forward_tokens,
        "sensitivity_tokens": record.search.sensitivity_tokens,
        "seconds": round(time.monotonic() - start, 1),
    }


def write(record: dict[str, Any]) -> None:
    """Write the results and their tables."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "structure.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Structured methods and allocations at equal parameters", "",
        "`python integration/structure_table.py`: test perplexity of demo models without recovery; the share of the "
        "prunable weights that is gone is the same in each column. Tokens: forward tokens of candidates and "
        "sensitivities, a backward pass counting as two forward ones, at the last share; seconds: the whole run, at all shares.",
    ]  # fmt: skip
    for name, table in record["tables"].items():
        shares = sorted({key.split(" | ")[0] for key in table["rows"]}, key=float)
        lines += ["", f"## {name}", "", f"{table['about']} Dense: {table['dense']:.2f}.", ""]
        lines.append(
            f"| allocation | method | {' | '.join(f'{100 * float(s):g} %' for s in shares)} | tokens | seconds |"
        )
        lines.append("|---|---|" + "---|" * (len(shares) + 2))
        kinds = dict.fromkeys(key.split(" | ", 1)[1] for key in table["rows"])
        for kind in kinds:
            found = [table["rows"].get(f"{share} | {kind}") for share in shares]
            cells = [f"{cell['perplexity']:.2f}" if cell else "" for cell in found]
            there = [cell for cell in found if cell]
            tokens = (there[-1]["search_tokens"] or 0) + (there[-1]["sensitivity_tokens"] or 0)
            seconds = sum(cell["seconds"] for cell in there)
            lines.append(f"| {kind} | {' | '.join(cells)} | {tokens:,.0f} | {seconds:,.0f} |")
    (RESULTS / "structure.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Measure what is missing of a model's table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen2", choices=("llama", "qwen2"))
    parser.add_argument("--shares", nargs="+", default=["0.1", "0.2", "0.3"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--test-samples", type=int, default=128)
    parser.add_argument(
        "--small", action="store_true", help="fewer and shorter samples, and a shorter search"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "msp_plugin" / "structure_table"
    )
    sizes = parser.parse_args()
    search: dict[str, Any] = {"tokens": 8192, "holdout": 4096}
    if sizes.small:
        sizes.samples, sizes.length, sizes.test_samples = 32, 64, 48
        search = {"tokens": 640, "holdout": 384, "max_tokens": 50_000}
    sizes.cache.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "structure.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"tables": {}}
    about = (
        f"{sizes.samples} calibration and {sizes.test_samples} test samples of {sizes.length} tokens; search: "
        f"{', '.join(f'{key} {value:,}' for key, value in search.items())}; quantum {QUANTUM}."
    )
    name = f"{sizes.model}{', small' if sizes.small else ''}"
    table = record["tables"].setdefault(name, {"about": about, "dense": math.nan, "rows": {}})
    if table["about"] != about:
        raise SystemExit(f"results/structure.json holds {name} with other settings: {table['about']}")
    for row in rows(search):
        for share in sizes.shares:
            key = f"{share} | {row.allocation} | {row.method_name}"
            if key not in table["rows"]:
                found = measure(sizes.model, share, row, sizes, sizes.cache)
                table["dense"] = found.pop("dense")
                table["rows"][key] = found
                write(record)


if __name__ == "__main__":
    main()
