"""Tokens per second of a smaller model against the dense one and the one with zeros, in transformers.

    python integration/structure_speed.py MODEL          # writes results/structure_speed.md and .json

The same share of KV heads and of channels is zeroed in every block, those of the least magnitude: this measures speed, not
quality. The zeros are exported ``--to small`` and verified; then all three continue a prompt greedily through the KV cache in one
process, in turns, so that a busy machine is busy for all. Medians over the turns, in wall and in CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from database_cost import RESULTS, machine

import msp_plugin
from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import export_checkpoint
from msp_plugin.checkpoint.smaller import Small
from msp_plugin.structure.halves import ATTENTION, find_halves
from msp_plugin.verify.base import Subject, run_checks
from msp_plugin.verify.logits import Logits
from msp_plugin.verify.round_trip import RoundTrip
from msp_plugin.verify.structure import Structure


def zero_least(model, heads: int, channels: int) -> None:
    """Zero so many KV heads and channels of each block, those of the least sum of squares."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for half in find_halves(model):
            output = weights[f"{half.output}.weight"]
            columns = output.view(output.shape[0], half.groups, half.columns)
            scores = columns.float().pow(2).sum(dim=(0, 2))
            for layer in half.inputs:
                scores += weights[f"{layer}.weight"].float().pow(2).view(half.groups, -1).sum(dim=1)
            columns[:, scores.argsort()[: heads if half.kind == ATTENTION else channels]] = 0


def seconds(model, ids: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Return the wall and CPU seconds of a greedy continuation."""
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        model.generate(
            ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(arguments: argparse.Namespace, folder: Path) -> dict:
    """Return the checks' rows and, by model, parameters and the seconds of each turn."""
    models = {"dense": msp_plugin.load(arguments.model, arguments.dtype)}
    zeros = msp_plugin.load(arguments.model, arguments.dtype)
    zero_least(zeros, arguments.heads, arguments.channels)
    zeros.save_pretrained(folder / "zeros")
    export_checkpoint(folder / "zeros", Small(), folder / "small")
    subject = Subject(Checkpoint.open(folder / "small"), Checkpoint.open(folder / "zeros"))
    checks = run_checks(subject, [Structure(), RoundTrip(), Logits()])
    models |= {"zeros": zeros, "small": msp_plugin.load(folder / "small", arguments.dtype)}
    words = models["dense"].config.vocab_size
    ids = torch.randint(0, words, (1, arguments.prompt), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(arguments.turns + 1):
        for name, model in models.items():
            taken = seconds(model, ids, arguments.tokens if turn else 2)
            if turn:  # the first one warms up
                times[name].append(taken)
    return {
        "machine": machine(),
        "arguments": {k: v for k, v in vars(arguments).items() if k != "out"},
        "checks": {r.check: {f.item: [f.state, f.found] for f in r.findings} for r in checks},
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "seconds": times,
    }


def report(found: dict) -> str:
    """Return the table."""
    tokens, dense = found["arguments"]["tokens"], found["seconds"]["dense"]
    lines = [
        "# A smaller model in transformers\n",
        f"`python integration/structure_speed.py` on {found['machine']['processor']}, transformers {found['machine']['transformers']}, {found['arguments']['dtype']}, "
        f"{found['arguments']['threads']} threads, batch 1, {tokens} greedy tokens behind {found['arguments']['prompt']}, medians "
        f"of {found['arguments']['turns']} turns in one process, in which the models take turns.\n",
        "| model | parameters | tokens per second | to dense | tokens per CPU second | to dense |",
        "|---|---|---|---|---|---|",
    ]
    for name, times in found["seconds"].items():
        wall, cpu = (statistics.median(t[i] for t in times) for i in (0, 1))
        ratios = [statistics.median(d[i] / t[i] for d, t in zip(dense, times, strict=True)) for i in (0, 1)]
        lines.append(
            f"| {name} | {found['parameters'][name]:,} | {tokens / wall:.1f} | {ratios[0]:.2f} | {tokens / cpu:.1f} "
            f"| {ratios[1]:.2f} |"
        )
    lines.append("\nThe checks of the smaller model against the one with zeros:\n")
    for check, rows in found["checks"].items():
        lines += [f"- {check}, {item}: {state}, {text}" for item, (state, text) in rows.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--heads", type=int, default=1, help="KV heads that each attention loses")
    parser.add_argument("--channels", type=int, default=608, help="channels that each MLP loses")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    (arguments.out / "structure_speed.json").write_text(json.dumps(found, indent=2) + "\n")
    (arguments.out / "structure_speed.md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
