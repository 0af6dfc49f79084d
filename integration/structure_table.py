"""Structured methods and allocations against each other, at equal parameters of the prunable layers.

Each row prunes a model by one method and one allocation, and measures it on text that neither saw. Results go to
results/structure.json and .md after each row; what is there is not run again. ``--lora`` trains LoRA adapters of some rows'
models afterwards, as LLM-Pruner does, and runs such rows that are there without them again; ``--long`` measures perplexity at
another length as well.

    python integration/structure_table.py --model qwen2
    python integration/structure_table.py --model smollm2 --shares 0.2 --lora 250000 --long 512  # of integration/smollm2.py
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DEMO = ("llama", "qwen2")
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
    recovered: bool = False
    after: str = ""  # a recovery that is a part of the method

    @property
    def method_name(self) -> str:
        """The method with its score, and what belongs to it."""
        name = " ".join(str(value) for value in self.method.values())
        return f"{name}, {self.after}" if self.after else name


def rows(search: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of a table.

    Args:
        search: options of the search.
    """
    uniform = {"name": "uniform"}
    for taylor in SCORES:
        yield Row("uniform width", {"name": "llm_pruner", "taylor": taylor}, "width", uniform, True)
    yield Row("uniform width", {"name": "flap"}, "width", uniform, after="mean_update")  # its bias
    for name in ("flap", "obs", "l2", "random"):
        yield Row("uniform width", {"name": name}, "width", uniform, name in ("l2", "random"))
    leave_one_out = {"name": "knapsack", "surrogate": "kl", "tokens": search["tokens"]}
    yield Row("depth by leave-one-out", {"name": "magnitude"}, "depth", leave_one_out)
    yield Row("depth by block influence", {"name": "magnitude"}, "depth", {"name": "depth"})
    yield Row(
        "depth by Shapley value", {"name": "magnitude"}, "depth", {"name": "depth", "metric": "shapley"}
    )
    evopress = {
        "name": "evopress",
        "tokens_per_selection": [1024, 4096],
        "offspring": 16,
        "survivors": [4, 1],
    }
    spent = {"max_tokens": search["max_tokens"]} if "max_tokens" in search else {}
    yield Row("depth by EvoPress", {"name": "magnitude"}, "depth", {**evopress, **spent})
    yield Row("depth by search", {"name": "magnitude"}, "depth", {"name": "search", **search})
    for name, levels, allocator in SEARCHES:
        for method in ({"name": "llm_pruner", "taylor": "first"}, {"name": "obs"}):
            yield Row(name, method, levels, {"name": allocator, **search}, name == "mixed by search")
    first = {"name": "llm_pruner", "taylor": "first"}
    for times in (1, 10) if spent else ():
        name = "mixed by policy gradient" + (f", {times} times the tokens" if times > 1 else "")
        yield Row(
            name, first, "mixed", {"name": "policy_gradient", "max_tokens": times * spent["max_tokens"]}
        )


@dataclass(frozen=True)
class Subject:
    """A model with its text.

    Args:
        model: directory or name of a demo model.
        quantum: number that channels come in multiples of.
        texts: sources of calibration, search and test text.
    """

    model: str
    dtype: str
    quantum: int
    texts: tuple[str, str, str]

    @classmethod
    def of(cls, name: str) -> Subject:
        """Return a demo model, or one that smollm2.py has made in a directory."""
        from msp_plugin.demo import demo_model_path

        if name in DEMO:  # their MLPs have 384 channels
            texts = ("demo:calibration", "demo:search", "demo:test")
            return cls(str(demo_model_path(name)), "float32", 16, texts)
        parts = (str(Path(name) / "text" / f"{part}.txt") for part in ("calibration", "search", "test"))
        return cls(str(Path(name) / "model"), "auto", 64, tuple(parts))

    def measure(self, share: str, row: Row, sizes: argparse.Namespace) -> dict[str, Any]:
        """Return the figures of one row."""
        from msp_plugin import Text, prune, recover

        text = Text(
            self.texts[0], search=self.texts[1], test=self.texts[2], samples=sizes.samples, length=sizes.length,
            test_samples=sizes.test_samples,
        )  # fmt: skip
        options: dict[str, Any] = {} if row.levels == "depth" else {"quantum": self.quantum}
        folder = Path(tempfile.mkdtemp(dir=sizes.cache))
        start = time.monotonic()
        run = prune(
            self.model, text, folder / "run", dtype=self.dtype, baseline=False, cache=str(sizes.cache), sparsity=share,
            method=row.method, levels=[row.levels], allocator=row.allocator, **options,
        )  # fmt: skip
        assert run is not None
        record, result, quality = run.record, folder / "run", "mixed"
        if row.after:
            whole = replace(text, search=None)
            biased = recover(result, whole, folder / "after", original=self.model, method=row.after)
            assert biased is not None
            record, result, quality = biased.record, folder / "after", "recovered"
        seconds = round(time.monotonic() - start, 1)
        allocation = json.loads((folder / "run" / "allocation.json").read_text(encoding="utf-8"))
        figures = {
            "dense": record.perplexity["dense"],
            "perplexity": record.perplexity[quality],
            "long": self.long_perplexity(result, sizes),
            "zeros": allocation["budget"]["zeros"],
            "weights": allocation["budget"]["weights"],
            "levels": {unit["name"]: unit["level"] for unit in allocation["units"]},
            "search_tokens": run.record.search.forward_tokens,
            "sensitivity_tokens": run.record.search.sensitivity_tokens,
            "seconds": seconds,
        }
        if sizes.lora and row.recovered:
            lora = {"name": "lora", "tokens": sizes.lora, "learning_rate": sizes.lora_rate}
            text = replace(text, search=None, samples=sizes.lora_samples)
            mended = recover(folder / "run", text, folder / "mended", original=self.model, method=lora)
            assert mended is not None
            figures |= {
                "recovered": mended.record.perplexity["recovered"],
                "recovered_long": self.long_perplexity(folder / "mended", sizes),
                "recovery_seconds": mended.record.stages[-1].seconds,
            }
        shutil.rmtree(folder)
        return figures

    def long_perplexity(self, run: Path, sizes: argparse.Namespace) -> float | None:
        """Return the perplexity of a checkpoint on as much test text, cut into samples of ``--long`` tokens."""
        if not sizes.long:
            return None
        import torch
        from transformers import AutoTokenizer

        import msp_plugin
        from msp_plugin.data.sources import load_texts
        from msp_plugin.data.tokenize import tokenize
        from msp_plugin.passes.losses import perplexity

        tokenizer, source = AutoTokenizer.from_pretrained(self.model), self.texts[2]
        samples = sizes.length * sizes.test_samples // sizes.long
        text = tokenize(tokenizer, load_texts(source), samples=samples, length=sizes.long, source=source)
        with torch.inference_mode():
            return perplexity(msp_plugin.load(run).eval(), text)


def write(record: dict[str, Any]) -> None:
    """Write the results and their tables."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "structure.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Structured methods and allocations at equal parameters", "",
        "`python integration/structure_table.py`: test perplexity of pruned models; the share of the prunable weights that is "
        "gone is the same in each column. Tokens: forward tokens of candidates and sensitivities, a backward pass counting "
        "as two forward ones, at the last share; seconds: the pruning with its search, at all shares.",
    ]  # fmt: skip
    for name, table in record["tables"].items():
        lines += ["", f"## {name}", "", table["about"] + table.get("lora", ""), "", *table_lines(table)]
    (RESULTS / "structure.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def table_lines(table: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of one model."""
    found = table["rows"]
    shares = sorted({key.split(" | ")[0] for key in found}, key=float)
    recovered, long = (any(row.get(key) for row in found.values()) for key in ("recovered", "long"))
    columns = []
    for share in shares:
        columns.append((share, "perplexity", f"{100 * float(share):g} %"))
        if recovered:
            columns.append((share, "recovered", "after LoRA"))
        if long:
            columns.append((share, "long", f"at {table['long_length']}"))
        if recovered and long:
            columns.append((share, "recovered_long", f"after LoRA, at {table['long_length']}"))
    yield f"| allocation | method | {' | '.join(title for *_, title in columns)} | tokens | seconds |"
    yield "|---|---|" + "---|" * (len(columns) + 2)
    for kind in dict.fromkeys(key.split(" | ", 1)[1] for key in found):
        values = [found.get(f"{share} | {kind}", {}).get(name) for share, name, _ in columns]
        cells = [f"{value:.2f}" if value else "" for value in values]
        there = [row for key, row in found.items() if key.split(" | ", 1)[1] == kind]
        tokens = (there[-1]["search_tokens"] or 0) + (there[-1]["sensitivity_tokens"] or 0)
        seconds = sum(row["seconds"] for row in there)
        yield f"| {kind} | {' | '.join(cells)} | {tokens:,.0f} | {seconds:,.0f} |"


def main() -> None:
    """Measure what is missing of a model's table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen2", help="llama, qwen2, or a directory that smollm2.py made")
    parser.add_argument("--shares", nargs="+", default=["0.1", "0.2", "0.3"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--test-samples", type=int, default=128)
    parser.add_argument("--search-tokens", type=int, default=0, help="of each search; 0: its default")
    parser.add_argument("--lora", type=int, default=0, help="tokens of a LoRA recovery; 0: none")
    parser.add_argument("--lora-samples", type=int, default=1000)
    parser.add_argument("--lora-rate", type=float, default=2e-3, help="its learning rate, for a small model")
    parser.add_argument("--long", type=int, default=0, help="second length at which perplexity is measured")
    parser.add_argument("--only", default="", help="part of the names of the rows to measure")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "msp_plugin" / "structure_table"
    )
    sizes = parser.parse_args()
    search: dict[str, Any] = {"tokens": 8192, "holdout": 4096}
    if sizes.search_tokens:
        search["max_tokens"] = sizes.search_tokens
    sizes.cache.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "structure.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"tables": {}}
    subject = Subject.of(sizes.model)
    settings = (
        f"{sizes.samples} calibration and {sizes.test_samples} test samples of {sizes.length} tokens; search: "
        f"{', '.join(f'{key} {value:,}' for key, value in search.items())}; quantum {subject.quantum}."
    )
    name = sizes.model if sizes.model in DEMO else "SmolLM2-135M-Instruct"
    table = record["tables"].setdefault(name, {"settings": settings, "rows": {}})
    if table["settings"] != settings:
        raise SystemExit(f"results/structure.json holds {name} with other settings: {table['settings']}")
    for row in rows(search):
        for share in sizes.shares:
            key = f"{share} | {row.allocation} | {row.method_name}"
            there = table["rows"].get(key, {})
            asked = "recovered" if sizes.lora and row.recovered else "perplexity"
            # Qwen2's config has no place for FLAP's bias
            left_out = name == "qwen2" if row.after else "policy gradient" in key and name not in DEMO
            if asked not in there and sizes.only in key and not left_out:
                found = subject.measure(share, row, sizes)
                if "long_length" not in table and sizes.long:
                    table |= {"long_length": sizes.long}
                dense = found.pop("dense")
                table["about"] = f"{settings} Dense: {dense:.2f}."
                if sizes.lora:
                    table["lora"] = f" LoRA: {sizes.lora:,} tokens, learning rate {sizes.lora_rate:g}."
                table["rows"][key] = found
                write(record)


if __name__ == "__main__":
    main()
