"""How much faster two processes recover a model than one, each with one thread, and how near the results are.

    python integration/recover_ranks.py
    python integration/recover_ranks.py --model smollm2/model --samples 16 --tokens 8192   # of integration/smollm2.py

A model in float32 with the two smallest of every four weights set to zero is recovered by each method with samples of 256
tokens of the demo corpus, by one process, by two that torchrun starts, over gloo, and twice at once by one process each: what
those take more than one alone is the machine's, not the method's. Seconds are of the method alone, and so are CPU seconds, of
the process that used most: on a machine that is busy otherwise only those tell. Two free cores are needed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from database_cost import RESULTS, machine

#: What two processes should reach, in the speed of one.
GOAL = 1.6
DEMO = "qwen2"
METHODS = {
    "blockwise": {"epochs": 2},
    "masked_lora": {"tokens": 0, "step_tokens": 4096, "learning_rate": 2e-3, "evaluations": 2},
}


def work(method: str, given: argparse.Namespace) -> None:
    """Recover as one of the processes; the first one prints its figures as JSON."""
    import torch

    from msp_plugin.data.samples import Text, load_split
    from msp_plugin.demo import demo_model_path
    from msp_plugin.models.layers import prunable_layers
    from msp_plugin.models.load import load_model
    from msp_plugin.models.source import load_tokenizer
    from msp_plugin.plan.levels import Level
    from msp_plugin.plugins.manager import Plugins
    from msp_plugin.pruning.masks import nm_mask
    from msp_plugin.recovery.base import RecoveryInputs
    from msp_plugin.recovery.masks import Masks
    from msp_plugin.recovery.shared import mean_kl
    from msp_plugin.recovery.step import RecoveryText
    from msp_plugin.runtime.memory import freed_memory_kept
    from msp_plugin.runtime.ranks import join

    ranks, source = join(), demo_model_path(given.model) if given.model == DEMO else Path(given.model)
    original, model = load_model(source, "float32"), load_model(source, "float32")
    layers = [layer.name for layer in prunable_layers(model).layers]
    with torch.no_grad():
        for name in layers:
            weight = model.get_submodule(name).weight
            weight.masked_fill_(~nm_mask(weight.abs(), Level.parse("2:4")), 0)
    text = Text("demo:calibration", test="demo:test", samples=given.samples, length=256, test_samples=16)
    split = load_split(load_tokenizer(source), text)
    parts = RecoveryText.of(split.pruning, split.test)
    options = METHODS[method] | ({"tokens": given.tokens} if "tokens" in METHODS[method] else {})
    recovery = Plugins().build("recoveries", {"name": method, **options})
    folder = ranks.on_rank_zero(lambda: Path(tempfile.mkdtemp()))
    inputs = RecoveryInputs(
        model, Masks.of(model, layers), parts.data, parts.holdout, original, folder, ranks=ranks
    )
    began, used = time.perf_counter(), time.process_time()
    with freed_memory_kept():  # as in msp recover
        recovery.recover(inputs)
    seconds, cpu = time.perf_counter() - began, max(ranks.gather(lambda: time.process_time() - used))
    kl = mean_kl(original, model, parts.test, ranks)
    if ranks.rank == 0:
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "kl": kl}))


def measure(method: str, given: argparse.Namespace, ranks: int, copies: int = 1) -> dict[str, Any]:
    """Return the figures of a recovery by some processes, or of the slowest of several at once."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, __file__, "--work", method, "--model", given.model]
    command += ["--samples", str(given.samples), "--tokens", str(given.tokens)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(copies)
    ]
    printed = [each.communicate()[0] for each in started]
    if any(each.returncode for each in started):
        raise SystemExit("a recovery failed")
    found: list[dict[str, Any]] = [json.loads(text.splitlines()[-1]) for text in printed]
    return max(found, key=lambda figures: figures["seconds"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--model", default=DEMO, help=f"{DEMO}, which is a demo model, or a directory")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=40_000, help="of masked_lora")
    parser.add_argument("--work", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write a page in results/")
    given = parser.parse_args()
    if given.work:
        work(given.work, given)
        return 0
    lines = [
        "| method | processes | seconds | CPU seconds of a process | KL to the dense model |",
        "|---|---|---|---|---|",
    ]
    speeds = []
    for method in given.methods:
        rows = [measure(method, given, 1), measure(method, given, 2), measure(method, given, 1, copies=2)]
        lines += [
            f"| `{method}` | {processes} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {row['kl']:.5f} |"
            for processes, row in zip(("1", "2", "1, twice at once"), rows, strict=True)
        ]
        one, two, both = (row["seconds"] for row in rows)
        speeds.append(one / two)
        print(
            f"{method}: {one / two:.2f} times as fast, by CPU seconds {rows[0]['cpu_seconds'] / rows[1]['cpu_seconds']:.2f}; "
            f"two at once: {2 * one / both:.2f}"
        )
    print(*lines, sep="\n")
    if given.write:
        page = RESULTS / f"recover_ranks{'' if given.model == DEMO else '_smollm2'}.md"
        about = " ".join(__doc__.split("\n\n")[-1].split())
        head = f"# Recovery by two processes\n\nMade by `python integration/recover_ranks.py {' '.join(sys.argv[1:])}`: {about}\n\n"
        head += f"Model {given.model}, {given.samples} samples, {given.tokens:,} tokens for `masked_lora`. {machine()}\n\n"
        page.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    return 0 if min(speeds) >= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
