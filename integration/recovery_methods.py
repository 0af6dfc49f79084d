"""The trained recovery methods against each other: equal tokens, equal counts of trained numbers.

Each demo model is pruned to 75 %, recovered by each method with the same text, and measured on text that neither saw.
Results go to results/recovery_methods.json and .md after each run; what is there is not run again. Columns: the share
of the loss, in log perplexity over the dense model, that the method took back.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
#: Of a layer of m x n weights masked LoRA of rank 16 trains 16 (m + n) numbers; the others get as many in all.
RANK = 16
MODELS = ("llama", "qwen2")


def options(method: str, shapes: dict[str, tuple[int, int]]) -> dict:
    """Return the options with which a method trains as many numbers as masked LoRA of RANK."""
    numbers = sum(RANK * (out + width) for out, width in shapes.values())
    if method == "masked_lora":
        return {"name": method, "rank": RANK, "alpha": 2 * RANK}
    if method == "masked_lora, ist":
        return {"name": "masked_lora", "rank": RANK, "alpha": 2 * RANK, "layers": "ist"}
    if method == "spp":
        outs, widths = (sum(side) for side in zip(*shapes.values(), strict=True))
        most = min(out for out, _ in shapes.values())
        return {"name": method, "groups": min(most, round((numbers - outs) / widths))}
    if method == "sparse_delta":
        return {"name": method, "values": float(numbers)}
    return {"name": method}


#: By method, the learning rates that are tried with a tenth of the tokens; the best is used.
RATES = {
    "masked_lora": (4e-3, 8e-3, 1.6e-2),
    "masked_lora, ist": (8e-3, 1.6e-2),
    "spp": (1e-2, 3e-2),
    "sparse_delta": (3e-3, 1e-2),
    "full": (1e-3, 3e-3),
}


def pruned(model: str, sparsity: str, allocator: str, folder: Path) -> Path:
    """Return the directory of a demo model that is pruned by SparseGPT, made where it is missing."""
    from msp_plugin import prune
    from msp_plugin.demo import demo_model_path, demo_text

    out = folder / f"{model}-{sparsity}-{allocator}"
    if not (out / "run.json").is_file():
        shutil.rmtree(out, ignore_errors=True)
        prune(demo_model_path(model), demo_text(), out, sparsity=sparsity, allocator=allocator,
              method="sparsegpt", dtype="float32", cache=str(folder / "cache"), baseline=False)  # fmt: skip
    return out


def recovered(model: str, sparse: Path, spec: dict, tokens: int, folder: Path) -> dict:
    """Return what one recovery gives: perplexities, seconds, share taken back."""
    from msp_plugin import Text
    from msp_plugin.demo import demo_model_path
    from msp_plugin.runs.recover import recover

    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    samples = max(64, -(-tokens // 256))
    text = Text("demo:train", test="demo:test", samples=samples, length=256, test_samples=128)
    start = time.monotonic()
    run = recover(sparse, text, out, original=demo_model_path(model), dtype="float32",
                  method={**spec, "tokens": tokens}, cache=str(folder / "cache"))  # fmt: skip
    record = run.record.to_dict()
    values = record["perplexity"]
    stage = record["stages"][-1]
    dense, after = math.log(values["dense"]), math.log(values["recovered"])
    before = math.log(next(s["perplexity"] for s in record["stages"] if s["name"] == "prune"))
    shutil.rmtree(out, ignore_errors=True)
    return {
        "dense": values["dense"],
        "pruned": math.exp(before),
        "recovered": values["recovered"],
        "share": (before - after) / (before - dense),
        "kl": stage.get("kl"),
        "seconds": stage["seconds"],
        "all_seconds": round(time.monotonic() - start, 1),
        "curve": stage["recovery"]["curve"],
        "notes": stage["recovery"].get("notes", []),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def shapes_of(sparse: Path) -> dict[str, tuple[int, int]]:
    """Return (out, in) of each layer of a pruned model."""
    from msp_plugin.models.layers import prunable_layers
    from msp_plugin.models.load import load_model

    return {
        layer.name: (layer.out_features, layer.in_features)
        for layer in prunable_layers(load_model(sparse)).layers
    }


def trained_numbers(spec: dict, shapes: dict[str, tuple[int, int]]) -> int:
    """Return how many numbers of the layers a method trains; for ``full`` all surviving weights, about a quarter."""
    outs, widths = (sum(side) for side in zip(*shapes.values(), strict=True))
    return {
        "masked_lora": lambda: RANK * (outs + widths),
        "spp": lambda: spec["groups"] * widths + outs,
        "sparse_delta": lambda: int(spec["values"]),
        "full": lambda: sum(out * width for out, width in shapes.values()) // 4,
    }[spec["name"]]()


def write(record: dict) -> None:
    """Write the results and their table."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "recovery_methods.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Trained recovery methods on the demo models", "",
        "75 % zeros by SparseGPT; test text disjoint from all other text; loss: KL to the dense model. The learning rate "
        "was chosen with a tenth of the tokens, or given. Share: of the loss in log perplexity over dense that came back.", "",
        "| model | allocation | tokens | method | trained numbers | learning rate | dense | pruned | recovered | share | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in record["rows"]:
        if row["rate_search"]:
            continue
        lines.append(
            f"| {row['model']} | {row['allocator']} | {row['tokens']:,} | {row['method']} | {row['numbers']:,} "
            f"| {row['rate']:g} | {row['dense']:.2f} | {row['pruned']:.2f} | {row['recovered']:.2f} "
            f"| {100 * row['share']:.0f} % | {row['seconds']:.0f} |"
        )
    (RESULTS / "recovery_methods.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--allocators", nargs="+", default=["search", "uniform"])
    parser.add_argument("--sparsity", default="0.75")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--step-tokens", type=int, default=2048)
    parser.add_argument("--rate", type=float, help="use this learning rate and try no others")
    parser.add_argument("--folder", type=Path, required=True, help="where pruned models and the cache lie")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    path = RESULTS / "recovery_methods.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}

    def row_of(model: str, allocator: str, method: str, rate: float, tokens: int, rate_search: bool) -> dict:
        key = {"model": model, "allocator": allocator, "method": method, "rate": rate, "tokens": tokens,
               "step_tokens": args.step_tokens, "rate_search": rate_search}  # fmt: skip
        for row in record["rows"]:
            if all(row[name] == value for name, value in key.items()):
                return row
        sparse = pruned(model, args.sparsity, allocator, args.folder)
        shapes = shapes_of(sparse)
        spec = options(method, shapes) | {
            "learning_rate": rate,
            "step_tokens": args.step_tokens,
            "evaluation_tokens": 8192,
            "norms": True,
        }
        row = (
            key
            | {"numbers": trained_numbers(spec, shapes)}
            | recovered(model, sparse, spec, tokens, args.folder)
        )
        record["rows"].append(row)
        write(record)
        print(json.dumps({name: value for name, value in row.items() if name != "curve"}), flush=True)
        return row

    for model in args.models:
        for allocator in args.allocators:
            for method in args.methods:
                rates = (args.rate,) if args.rate else RATES[method]
                if len(rates) > 1:
                    few = max(10 * args.step_tokens, args.tokens // 10)
                    tried = [row_of(model, args.allocators[0], method, rate, few, True) for rate in rates]
                    rates = (max(tried, key=lambda row: row["share"])["rate"],)
                row_of(model, allocator, method, rates[0], args.tokens, False)


if __name__ == "__main__":
    main()
