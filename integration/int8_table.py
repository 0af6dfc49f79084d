"""Values in int8 beside values as they are: bytes and quality of packed runs, and the time of one product.

    python integration/int8_table.py RUN ... [--threads 1]

Each RUN is a directory that `msp demo` or `msp prune` wrote. It is packed in bfloat16, as most models are, with either
kind of values; perplexity and KL are those of float32 products on the demo's test text. Times are the least of 40 calls.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from msp_plugin.checkpoint.export import export_checkpoint
from msp_plugin.checkpoint.load import load
from msp_plugin.checkpoint.packed_export import Bitmask
from msp_plugin.data.samples import Text
from msp_plugin.formats import bitmask
from msp_plugin.formats.bitmask_int8 import quantize
from msp_plugin.models.source import load_tokenizer
from msp_plugin.passes.losses import mean_kl, perplexity
from msp_plugin.plan.levels import Level
from msp_plugin.pruning.masks import nm_mask
from msp_plugin.serving.cpu.kernel import PackedWeight, choose, linear, pack_dense
from msp_plugin.serving.cpu.memory import in_huge_pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        "| run | dense | values as they are | in int8 | largest error | rounded to zero | perplexity | KL |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for run in arguments.runs:
        with tempfile.TemporaryDirectory() as scratch:
            print(row_of(run, Path(scratch)), flush=True)
    print(
        f"\n4096 x 4096, {arguments.threads} threads, milliseconds\n\n| level, tokens | as they are | int8 |\n|---|---|---|"
    )
    for level in ("2:4", "2:8"):
        for tokens in (1, 4, 16):
            plain, int8 = times(level, tokens)
            print(f"| {level}, {tokens} | {1e3 * plain:.2f} | {1e3 * int8:.2f} |", flush=True)


def row_of(run: Path, scratch: Path) -> str:
    """Return the row of a run: bytes of its packed layers, and what int8 costs."""
    source = scratch / "bfloat16"
    shutil.copytree(run, source)
    (source / "export.json").unlink(missing_ok=True)
    for file in source.glob("*.safetensors"):
        save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    plain = export_checkpoint(source, Bitmask(), scratch / "plain")
    int8 = export_checkpoint(source, Bitmask(values="int8"), scratch / "int8")
    text = Text("demo:test", samples=32, length=128).read(load_tokenizer(run), "demo:test", 32, at_least=1)
    before, after = load(source, "float32"), load(scratch / "int8", "float32")
    cells = [
        run.name,
        f"{plain.dense_bytes:,}",
        *(f"{m.packed_bytes:,} ({m.packed_bytes / m.dense_bytes:.3f})" for m in (plain, int8)),
        f"{max(int8.quantization_errors.values()):.4f}",
        f"{sum(int8.rounded_to_zero.values())}",
        f"{perplexity(before, text):.3f} -> {perplexity(after, text):.3f}",
        f"{mean_kl(before, after, text):.2g}",
    ]
    return f"| {' | '.join(cells)} |"


def times(level: str, tokens: int) -> tuple[float, float]:
    """Return the least seconds of a product with bfloat16 values, and with int8 ones, taken in turns."""
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    weight = (weight * nm_mask(weight.abs(), Level.parse(level))).bfloat16()
    values, scale = quantize(weight)
    stored = bitmask.pack(values)
    forms = [
        in_huge_pages(pack_dense(weight)),
        in_huge_pages(PackedWeight(stored.values, stored.bitmask, stored.row_offsets, 4096, scale.float())),
    ]
    x, kernel = torch.randn(tokens, 4096).bfloat16(), choose(torch.bfloat16).kernel
    turns = [[seconds(lambda form=form: linear(x, form, kernel)) for form in forms] for _ in range(40)]
    plain, int8 = (min(column) for column in zip(*turns, strict=True))
    return plain, int8


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
