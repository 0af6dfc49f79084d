"""Evaluate the demo model, a pruned run and its packed form with `msp eval`, and hold the numbers together.

    python integration/eval_demo.py [--run DEMO_RUN] [--work DIR]

Run it where msp_plugin is installed with its extras llmcompressor and eval. The task is which_line_follows
(integration/tasks): four candidates, one is the line that follows. Fails unless

- the dense model is above chance by more than three standard errors;
- the packed form of the run gives exactly the numbers of the run: tasks, perplexity, fingerprint of the weights;
- asking the same again gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TASKS = Path(__file__).resolve().parent / "tasks"
TASK = "which_line_follows"
CHANCE = 0.25
TEXT = ("--data", "demo:test", "--samples", "16", "--length", "256")


def msp(*arguments: str | Path) -> str:
    """Run ``msp`` of this environment and return what it printed; stop if it failed."""
    command = [sys.executable, "-m", "msp_plugin", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"msp {' '.join(map(str, arguments))}\nended with {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def evaluated(model: str | Path, *more: str | Path) -> dict[str, Any]:
    """Return the record of an evaluation, from stdout, which must hold nothing else."""
    return json.loads(
        msp("eval", model, "--tasks", TASK, "--task-dir", TASKS, "--dtype", "float32", "--json", *more)
    )


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Return what must not depend on the form of a checkpoint."""
    metrics = record["tasks"][TASK]["metrics"]
    return {
        "fingerprint": record["model"]["fingerprint"],
        "dtype": record["model"]["dtype"],
        "items": record["tasks"][TASK]["fingerprint"],
        "perplexity": [text["value"] for text in record["perplexity"]],
        "metrics": {m["name"]: (m["value"], m["stderr"]) for m in metrics},
    }


def make_run(path: Path) -> None:
    """Prune the demo model without a search and without calibration."""
    msp(
        "prune", "demo:qwen2", "-s", "0.625", "--method", "magnitude", "--allocator", "uniform", "--levels",
        "dense,2:4,2:8", "--data", "demo:calibration", "--samples", "4", "--length", "64", "--test-samples", "0",
        "--dtype", "float32", "--out", path,
    )  # fmt: skip


def show(record: dict[str, Any]) -> None:
    print(f"{TASK}, {record['tasks'][TASK]['samples']} items, chance {CHANCE}")
    print(f"{'':<10}{'dense':>18}{'pruned':>18}{'difference':>19}")
    for m in record["tasks"][TASK]["metrics"]:
        dense = f"{m['reference']:.4f} ± {m['reference_stderr']:.4f}"
        pruned = f"{m['value']:.4f} ± {m['stderr']:.4f}"
        more = f"{m['difference']:+.4f} ± {m['difference_stderr']:.4f}"
        print(f"{m['name']:<10}{dense:>18}{pruned:>18}{more:>19}")
    text = record["perplexity"][0]
    print(
        f"{'perplexity':<10}{text['reference']:>18.4f}{text['value']:>18.4f}   KL {text['kl']:.4f} nats per token"
    )


def check(run: Path, work: Path) -> None:
    original = json.loads((run / "run.json").read_text())["model"]["source"]
    pruned = evaluated(run, "--reference", original, *TEXT)
    show(pruned)
    dense = next(m for m in pruned["tasks"][TASK]["metrics"] if m["name"] == "acc")
    sigmas = (dense["reference"] - CHANCE) / dense["reference_stderr"]
    print(f"dense is {sigmas:.1f} standard errors above chance")
    assert sigmas > 3, "the dense model answers by chance"
    msp("export", run, "--to", "sparse24", "--out", work / "packed")
    packed = evaluated(work / "packed", *TEXT)
    assert packed["model"]["source"] != pruned["model"]["source"]
    assert numbers(packed) == numbers(pruned), (numbers(packed), numbers(pruned))
    print("packed and dense form give the same numbers")
    files = [work / "first.json", work / "second.json"]
    for file in files:
        evaluated(work / "packed", "--limit", "10", "--num-fewshot", "1", "--out", file)
    assert files[0].read_bytes() == files[1].read_bytes()
    print("asked again, the same bytes")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, help="a finished `msp demo`; the demo model is pruned if it is not given"
    )
    parser.add_argument("--work", type=Path, help="where the export goes; a temporary directory by default")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads would take the cores of the others
    with tempfile.TemporaryDirectory(prefix="msp-eval-demo-") as temporary:
        work = (options.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        run = options.run.absolute() if options.run else work / "run"
        if not options.run:
            make_run(run)
        check(run, work)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
