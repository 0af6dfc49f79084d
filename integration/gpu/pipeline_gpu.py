"""The pipeline on a GPU: a level database and a search on large models of random weights, and the results against a CPU's.

    python integration/gpu/pipeline_gpu.py --out results.json
    python integration/gpu/pipeline_gpu.py --device cpu --sizes "11 M"      # what a machine without one can try

For each size, in bfloat16 (float32 on a CPU): a SparseGPT database of six levels and one of 2:4 alone, each with
64 x 512 random tokens; one uniform SparseGPT 2:4 `oneshot` of llm-compressor on the same model and text; and a search
of three rounds on the first database. Seconds, and the peak of the memory that torch had allocated on the device.

Correctness, the demo model in float32: sensitivities, the share of equal mask bits of the database, and the losses of
uniform and of the returned allocation, on the device against the CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from database_cost import LEVELS, make_data, prune_uniformly

#: Blocks, hidden and intermediate size, heads, heads of keys and values, tokens of the vocabulary.
SIZES = {
    "11 M": (2, 384, 1024, 6, 6, 8000),
    "1 B": (19, 2048, 5632, 32, 32, 8000),
    "8 B": (32, 4096, 14336, 32, 8, 128256),
}
SEARCH = {"name": "search", "rounds": 3, "tokens": 4096, "holdout": 2048}
FISHER = {"name": "fisher", "samples": 8}


def make_model(size: str, device: str):
    """Return a Llama of random weights on a device, in eval mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    blocks, hidden, intermediate, heads, pairs, vocabulary = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=pairs, tie_word_embeddings=False,
    )  # fmt: skip
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def measurements_of(model, data, method: str, levels: tuple[str, ...], cache: str):
    """Return Measurements of a model: the first half of the text calibrates, the rest measures."""
    from msp_plugin.data.samples import TextSplit
    from msp_plugin.models.layers import prunable_layers
    from msp_plugin.plan.menus import parse_menu
    from msp_plugin.plugins.manager import Plugins
    from msp_plugin.search.measurements import Measurements

    plugins, (calibration, rest) = Plugins(), data.cut(data.tokens - 6144)
    search, holdout = rest.cut(2048)
    return Measurements(
        model, prunable_layers(model), parse_menu(["dense", *levels]), plugins.build("pruners", method),
        TextSplit(calibration, search, holdout), {"fisher": plugins.build("estimators", FISHER)}, cache,
    )  # fmt: skip


def timed(work: Callable[[], Any], device: str) -> dict[str, float | None]:
    """Return seconds, and on a GPU the peak of the allocated memory in GB, of some work."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return {"seconds": time.perf_counter() - began, "peak_gb": peak}


def costs(size: str, device: str, samples: int) -> dict[str, Any]:
    """Return what the parts of a run cost on a model of random weights."""
    from msp_plugin.plan.budget import AllocationProblem
    from msp_plugin.plan.fractions import parse_sparsity
    from msp_plugin.plugins.manager import Plugins

    model = make_model(size, device)
    data = make_data(samples + 12, 512)
    found: dict[str, Any] = {"weights": sum(p.numel() for p in model.parameters())}
    with tempfile.TemporaryDirectory() as folder:
        one = measurements_of(model, data, "sparsegpt", ("2:4",), f"{folder}/one")
        found["database, one level"] = timed(lambda: one.database, device)
        held = measurements_of(model, data, "sparsegpt", LEVELS, f"{folder}/six")
        found["database, six levels"] = timed(lambda: held.database, device)
        problem = AllocationProblem(held.table, held.menu, parse_sparsity("0.75"))
        allocator = Plugins().build("allocators", SEARCH)
        found["search"] = timed(lambda: held.allocate(allocator, problem, 0), device)
        calibration = type(data)(data.samples[:samples], "random tokens")
        found["oneshot, 2:4"] = timed(lambda: prune_uniformly(model, calibration, 1, folder), device)
    return found


def correctness(device: str) -> dict[str, Any]:
    """Return how far the demo model's results on a device are from those on the CPU."""
    import torch

    from msp_plugin.data.samples import load_split
    from msp_plugin.data.search_text import SearchText
    from msp_plugin.demo import demo_model_path, demo_text
    from msp_plugin.models.load import load_model
    from msp_plugin.models.source import load_tokenizer
    from msp_plugin.plan.budget import AllocationProblem
    from msp_plugin.plan.fractions import parse_sparsity
    from msp_plugin.plugins.manager import Plugins

    path, results = demo_model_path("qwen2"), {}
    text = load_split(load_tokenizer(path), demo_text().for_model(path), SearchText(24576)).pruning
    for where in ("cpu", device):
        model = load_model(path, "float32").to(where)
        with tempfile.TemporaryDirectory() as folder:
            held = measurements_of(model, text, "sparsegpt", LEVELS, folder)
            problem = AllocationProblem(held.table, held.menu, parse_sparsity("0.75"))
            result, _ = held.allocate(Plugins().build("allocators", SEARCH), problem, 0)
            masks = [
                (held.database.weight(layer.name, level.name) != 0).cpu()
                for layer in held.table.layers
                for level in held.menu
                if not level.is_dense
            ]
            results[where] = (torch.tensor(held.sensitivity("fisher")), masks, result)
    (a, masks_a, one), (b, masks_b, other) = results["cpu"], results[device]
    equal = sum(int((p == q).sum()) for p, q in zip(masks_a, masks_b, strict=True))
    return {
        "largest relative difference of a sensitivity": float(((a - b).abs() / a.abs()).max()),
        "equal mask bits": equal / sum(mask.numel() for mask in masks_a),
        "uniform loss": [one.uniform_loss, other.uniform_loss],
        "loss": [one.loss, other.loss],
        "units with equal levels": sum(x == y for x, y in zip(one.choice, other.choice, strict=True)),
        "units": len(one.choice),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--sizes", nargs="*", default=["1 B", "8 B"], choices=list(SIZES))
    parser.add_argument("--samples", type=int, default=64, help="of 512 tokens, for the database")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    import torch

    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    record: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "correctness": correctness(args.device),
    }
    print(json.dumps(record["correctness"], indent=1), flush=True)
    for size in args.sizes:
        record[size] = costs(size, args.device, args.samples)
        print(size, json.dumps(record[size], indent=1), flush=True)
        if args.out:  # a later size may not fit
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    near = record["correctness"]["equal mask bits"] > 0.99
    return 0 if near else 1


if __name__ == "__main__":
    raise SystemExit(main())
