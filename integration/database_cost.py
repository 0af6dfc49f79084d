"""What a level database costs against one pruning run of llm-compressor, in one run of this script.

    python integration/database_cost.py            # writes results/database_cost.md and .json
    python integration/database_cost.py --quick    # two blocks, eight samples, writes nothing

A Llama of 97 M random weights and 64 x 512 random tokens, float32, two threads. Ours: a SparseGPT database of six
levels, written to disk. Theirs: one uniform SparseGPT 2:4 `oneshot`, nothing saved, with samples one by one, which is
llm-compressor's default (with --batched, in batches of eight too). The floor: what no database can do without, one forward pass
over the blocks and the products of the Hessians. Each in a process of its own; CPU and wall seconds are those of
the work, after imports and the making of the model, peak memory is that of the process. The parts run in turn,
--repeats times (3); the figures are medians, the ratios' ranges are over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LEVELS = ("3:4", "2:4", "3:8", "1:4", "1:8", "1:16")
PARTS = ("ours", "oneshot", "oneshot, batch 8", "floor: forward pass", "floor: Hessian products")
RESULTS = Path(__file__).parent / "results"


def make_model(blocks: int, hidden: int = 768, intermediate: int = 2048, dtype: str = "float32"):
    """Return a Llama of random weights with 8,000 tokens and heads of 64, in eval mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=8000, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=False, dtype=dtype,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def make_data(samples: int, length: int = 512, vocabulary: int = 8000):
    """Return a CalibrationSet of random tokens."""
    import torch

    from msp_plugin.data.calibration import CalibrationSet

    ids = torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(1))
    return CalibrationSet(tuple(row.clone() for row in ids), "random tokens")


def build(model, data, levels: tuple[str, ...], folder: str) -> None:
    """Build a SparseGPT database of the model in a folder."""
    from msp_plugin.database.build import build_database
    from msp_plugin.database.store import LevelDatabase
    from msp_plugin.models.layers import prunable_layers
    from msp_plugin.plan.menus import parse_menu
    from msp_plugin.pruning.sparsegpt import SparseGPT

    database = LevelDatabase(Path(folder), {"bench": "database_cost"}, parse_menu(list(levels)))
    build_database(database, model, prunable_layers(model), SparseGPT(), data)


def prune_uniformly(model, data, batch: int, folder: str) -> None:
    """Prune the model to 2:4 by llm-compressor, as its users do."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from torch.utils.data import DataLoader

    from msp_plugin.demo import demo_model_path
    from msp_plugin.models.source import load_tokenizer

    loader = DataLoader([{"input_ids": sample} for sample in data.samples], batch_size=batch)
    recipe = SparseGPTModifier(
        sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"]
    )
    model.config.save_pretrained(folder)
    model.name_or_path = model.config._name_or_path = folder  # oneshot reads the config from there
    tokenizer = load_tokenizer(demo_model_path("llama"))  # oneshot asks for one; it reads nothing
    oneshot(model=model, recipe=recipe, dataset=loader, processor=tokenizer)


def multiply_hessians(model, data) -> None:
    """Do the products of the Hessians of all inputs, by the host's own function, on inputs of their shape."""
    import torch
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import accumulate_hessian, make_empty_hessian

    from msp_plugin.database.build import BATCH_TOKENS
    from msp_plugin.models.layers import prunable_layers
    from msp_plugin.plan.units import shared_inputs

    for unit in shared_inputs(prunable_layers(model)):
        module = model.get_submodule(unit.layers[0].name)
        hessian, count = make_empty_hessian(module), 0
        for ids in data.batches(BATCH_TOKENS):
            inputs = torch.full((*ids.shape, module.in_features), 0.5)
            hessian, count = accumulate_hessian(inputs, module, hessian, count)


def work_of(part: str, blocks: int, samples: int, folder: str) -> Callable[[], None]:
    """Return what a part does, with everything imported and made that is not to be measured."""
    import torch

    from msp_plugin.database.build import BATCH_TOKENS

    torch.set_num_threads(2)
    model, data = make_model(blocks), make_data(samples)

    @torch.no_grad()
    def forward() -> None:
        for ids in data.batches(BATCH_TOKENS):
            model.model(ids, use_cache=False)

    return {
        PARTS[0]: lambda: build(model, data, LEVELS, folder),
        PARTS[1]: lambda: prune_uniformly(model, data, 1, folder),
        PARTS[2]: lambda: prune_uniformly(model, data, 8, folder),
        PARTS[3]: forward,
        PARTS[4]: torch.no_grad()(lambda: multiply_hessians(model, data)),
    }[part]


def measured(work: Callable[[], None]) -> dict[str, float]:
    """Return CPU and wall seconds of some work, and the peak memory of the process before and after it in GB."""

    def cpu() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    before, start, began = peak(), cpu(), time.perf_counter()
    work()
    return {"cpu": cpu() - start, "wall": time.perf_counter() - began, "peak_gb": peak(), "before_gb": before}


def in_process(script: str, arguments: list[str], threads: int = 2) -> dict[str, float]:
    """Run a script in a process of its own and return the JSON of its last line."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, script, *arguments], env=env, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, str]:
    """Return what the figures depend on: processor, torch, llm-compressor."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": f"{platform.machine()} {name}, {os.cpu_count()} logical cores",
        **{package: version(package) for package in ("torch", "transformers", "llmcompressor")},
    }


def table(turns: list[dict[str, dict[str, float]]]) -> list[str]:
    """Return the lines of the result: seconds, memory, and ours over each of the others."""
    lines = ["| | CPU s | wall s | peak GB | of it before the work |", "|---|---|---|---|---|"]
    for part in turns[0]:
        row = {key: statistics.median(turn[part][key] for turn in turns) for key in turns[0][part]}
        lines.append(
            f"| {part} | {row['cpu']:.1f} | {row['wall']:.1f} | {row['peak_gb']:.2f} | {row['before_gb']:.2f} |"
        )

    def over(key: str, *parts: str) -> str:
        ratios = sorted(turn[PARTS[0]][key] / sum(turn[part][key] for part in parts) for turn in turns)
        spread = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if len(ratios) > 1 else ""
        return f"{statistics.median(ratios):.2f}{spread}"

    lines.append("")
    for part in PARTS[1:3]:
        if part in turns[0]:
            lines.append(
                f"Database of {len(LEVELS)} levels over one {part}: CPU {over('cpu', part)}, wall {over('wall', part)}, "
                f"peak memory {over('peak_gb', part)}."
            )
    lines.append(f"Database over the floor: CPU {over('cpu', *PARTS[3:])}.")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="two blocks and eight samples; nothing is written"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--batched", action="store_true", help="oneshot in batches of eight samples too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    if args.quick:
        args.blocks, args.samples, args.repeats = 2, 8, 1
    if args.part:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measured(work_of(args.part, args.blocks, args.samples, folder))))
        return 0
    size = ["--blocks", str(args.blocks), "--samples", str(args.samples)]
    parts = [part for part in PARTS if args.batched or part != PARTS[2]]
    turns = [
        {part: in_process(__file__, ["--part", part, *size]) for part in parts} for _ in range(args.repeats)
    ]
    lines = table(turns)
    print("\n".join(lines))
    if not args.quick:
        record = {
            "machine": machine(),
            "blocks": args.blocks,
            "samples": args.samples,
            "levels": LEVELS,
            "turns": turns,
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "database_cost.json").write_text(json.dumps(record, indent=1) + "\n")
        head = ["# What a level database costs", "", "Made by `python integration/database_cost.py`:"]
        head += [" ".join(__doc__.split("\n\n")[-1].split()), "", f"{record['machine']}", ""]
        (RESULTS / "database_cost.md").write_text("\n".join([*head, *lines]) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
