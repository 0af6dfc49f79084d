"""Kill recoveries at random moments, start them again each time, and compare what comes out with undisturbed ones.

A demo model is pruned once. For each method the same `msp recover` is started and killed (SIGKILL) after a random time
until it comes to its end, in rounds with a cache of their own; then its files are compared with those of an undisturbed
run, byte by byte, run.json and log.jsonl without their times. Rounds follow until there were as many kills as asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from kill_test import contents, last_step

#: Kills of each method of which a record is written.
ENOUGH = 10
TEXT = (
    "--data", "demo:calibration", "--test-data", "demo:test", "--samples", "24", "--length", "64",
    "--test-samples", "4", "--dtype", "float32",
)  # fmt: skip
METHODS = {
    "blockwise": ("blockwise.epochs=2",),
    "masked_lora": (
        "masked_lora.tokens=12000",
        "masked_lora.step_tokens=512",
        "masked_lora.learning_rate=2e-3",
    ),
}


def timeless(out: Path) -> dict[str, bytes]:
    """Return the bytes of a run's files, of run.json and log.jsonl without their times."""
    files = contents(out)
    lines = map(json.loads, files.get("log.jsonl", b"").splitlines())
    kept = [{k: v for k, v in line.items() if not k.endswith(("_runtime", "_per_second"))} for line in lines]
    return {**files, "log.jsonl": json.dumps(kept).encode()}


def start(arguments: list[str], folder: Path) -> subprocess.Popen:
    """Start `msp` with the cache of a folder, and with its log there."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "MSP_CACHE": str(folder / "cache")}
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "msp_plugin", *arguments], stdout=log, stderr=log, env=environment
    )


def finished(arguments: list[str], folder: Path) -> float:
    """Run `msp` to its end; return its seconds."""
    folder.mkdir()
    began = time.monotonic()
    if start(arguments, folder).wait():
        raise SystemExit((folder / "log.txt").read_text())
    return time.monotonic() - began


def recovery(method: str, model: str, run: Path, folder: Path) -> list[str]:
    """Return the arguments of a recovery to the directory ``out`` of a folder."""
    options = [part for option in METHODS[method] for part in ("--set", option)]
    what = ["recover", str(run), "--original", model, "--method", method, *TEXT, *options]
    return [*what, "--out", str(folder / "out")]


def killed(arguments: list[str], folder: Path, whole: float, rng: random.Random, steps: Counter[str]) -> int:
    """Start a recovery and kill it at random moments until it has ended; return the count of kills."""
    folder.mkdir()
    kills = 0
    while not (folder / "out").exists():
        run = start(arguments, folder)
        try:
            code = run.wait(rng.uniform(0.2, 1.0) * whole)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            kills += 1
            steps[last_step(folder)] += 1
            continue
        if code:
            raise SystemExit((folder / "log.txt").read_text()[-3000:])
    return kills


def measure(method: str, given: argparse.Namespace, run: Path, root: Path) -> str:
    """Return the line of the result of a method.

    Raises:
        SystemExit: a recovery ended with other bytes.
    """
    rng, kills, rounds, steps = random.Random(given.seed), 0, 0, Counter[str]()  # noqa: S311
    reference = root / method
    whole = finished(recovery(method, given.model, run, reference), reference)
    expected = timeless(reference / "out")
    print(f"{method}, undisturbed: {whole:.1f} s, {len(expected)} files", flush=True)
    while kills < given.kills:
        rounds += 1
        folder = root / f"{method}-{rounds}"
        kills += killed(recovery(method, given.model, run, folder), folder, whole, rng, steps)
        found = timeless(folder / "out")
        differ = sorted(k for k in found.keys() | expected if found.get(k) != expected.get(k))
        left = list((folder / "cache" / "recovery").iterdir())
        print(
            f"{method}, round {rounds}: {kills} kills so far, {differ or 'equal bytes'} {left or ''}",
            flush=True,
        )
        if differ or left:
            raise SystemExit(1)
    during = ", ".join(f"{step} {count}" for step, count in steps.most_common())
    return f"`{method}`: {kills} kills in {rounds} rounds, every one ended with the bytes of the undisturbed run; killed during: {during}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=ENOUGH, help="of each method, at least")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--model", default="demo:qwen2")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pruning = ["prune", given.model, "-s", "0.75", "--allocator", "uniform", "--no-baseline", *TEXT]
        run = root / "pruned"
        finished([*pruning, "--out", str(run / "out")], run)
        lines = [measure(method, given, run / "out", root) for method in given.methods]
    print(*lines, sep="\n")
    if given.kills >= ENOUGH and list(METHODS) == given.methods:
        about = " ".join(__doc__.split("\n\n")[1].split())
        head = f"# Kills of recoveries\n\nMade by `python integration/recover_kills.py`, {given.model}: {about}\n\n"
        body = "".join(f"- {line}\n" for line in lines)
        (Path(__file__).parent / "results" / "recover_kills.md").write_text(head + body, encoding="utf-8")


if __name__ == "__main__":
    main()
