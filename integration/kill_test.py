"""Kill a run at random moments, start it again each time, and compare what comes out with an undisturbed run.

Each round has a cache of its own. In it the same command is started and killed (SIGKILL) after a random time
until it comes to its end; then its files are compared with those of the undisturbed run, byte by byte, run.json
without its times. Rounds follow until there were as many kills as asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

#: Kills of which a record is written.
ENOUGH = 50
TIMES = ("seconds", "total_seconds")
OPTIONS = (
    "-s", "0.75", "--length", "64", "--samples", "24", "--test-samples", "4", "--levels", "dense,2:4,1:4,1:8",
    "--dtype", "float32", "--set", "allocator.tokens=512", "--set", "allocator.holdout=128", "--set",
    "allocator.rounds=4", "--data", "demo:calibration", "--search-data", "demo:search", "--test-data", "demo:test",
)  # fmt: skip


def start(model: str, method: str, folder: Path) -> subprocess.Popen:
    """Start the run of a folder: its cache and its output are in there."""
    command = [
        sys.executable, "-m", "msp_plugin", "prune", model, "-m", method, "--out", str(folder / "out"),
        *OPTIONS,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "MSP_CACHE": str(folder / "cache")}
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def contents(out: Path) -> dict[str, bytes]:
    """Return the bytes of a run's files, of run.json without its times."""
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    record = json.loads(files["run.json"])
    for part in (record, record["search"], *record["stages"]):
        for name in TIMES:
            part.pop(name, None)
    files["run.json"] = json.dumps(record, sort_keys=True).encode()
    return files


def last_step(folder: Path) -> str:
    """Return the last step that the log names."""
    lines = (folder / "log.txt").read_text(errors="replace").replace("\r", "\n").splitlines()
    steps = [line.partition("  ")[0].partition(":")[0].strip() for line in lines if line.strip()]
    return steps[-1][:40] if steps else "start"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--model", default="demo:qwen2")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, kills, rounds = random.Random(args.seed), 0, 0  # noqa: S311
    with tempfile.TemporaryDirectory() as root:
        reference = Path(root) / "reference"
        reference.mkdir()
        began = time.monotonic()
        if start(args.model, args.method, reference).wait():
            print((reference / "log.txt").read_text())
            return 1
        whole = time.monotonic() - began
        expected = contents(reference / "out")
        print(f"undisturbed: {whole:.1f} s, {len(expected)} files", flush=True)
        steps: Counter[str] = Counter()
        while kills < args.kills:
            rounds += 1
            folder = Path(root) / f"round-{rounds}"
            folder.mkdir()
            while not (folder / "out").exists():
                run = start(args.model, args.method, folder)
                try:
                    code = run.wait(rng.uniform(0.15, 1.0) * whole)
                except subprocess.TimeoutExpired:
                    run.send_signal(signal.SIGKILL)
                    run.wait()
                    kills += 1
                    steps[last_step(folder)] += 1
                    continue
                if code:
                    print((folder / "log.txt").read_text()[-3000:])
                    return 1
            found = contents(folder / "out")
            differ = sorted(k for k in found.keys() | expected if found.get(k) != expected.get(k))
            beside = sorted(p.name for p in folder.iterdir() if p.name not in ("out", "cache", "log.txt"))
            print(
                f"round {rounds}: {kills} kills so far, {differ or 'equal bytes'} {beside or ''}", flush=True
            )
            if differ or beside:
                return 1
    lines = [
        f"{kills} kills in {rounds} rounds, every run ended with the bytes of the undisturbed one.",
        "Killed during: " + ", ".join(f"{step} {count}" for step, count in steps.most_common()) + ".",
    ]
    print(*lines, sep="\n")
    if kills >= ENOUGH:
        about = " ".join(__doc__.split("\n\n")[1].split())
        head = [
            "# Kills",
            "",
            f"Made by `python integration/kill_test.py`, {args.model} with {args.method}: {about}",
            "",
        ]
        (Path(__file__).parent / "results" / "kills.md").write_text("\n".join([*head, *lines]) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
