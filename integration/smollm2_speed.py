"""How soon a search on SmolLM2-135M has a good answer, against an earlier revision of this repository in the same run.

    python integration/smollm2.py --out smollm2 --text wiki.valid.tokens
    python integration/smollm2_speed.py --model smollm2                 # --dtype float32 on a CPU without bfloat16

Both run ``msp allocate`` at 62.5 % from nothing, at the same time, on the same samples, search text and hold-out; the
earlier one, which did not end by itself, up to ``--tokens`` forward tokens. Each writes down its CPU seconds whenever it
has measured a candidate on the whole hold-out. What counts is when the least KL so far reaches 95 % of what the
earlier revision won over uniform in the end. The figures go to results/smollm2_speed.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
#: The revision that the goals of speed were set for.
REVISION = "9202e35"
SEARCH, HOLDOUT, GOAL = 16_384, 8_192, 1 / 3


def traced(trace: Path, arguments: list[str]) -> None:
    """Run the command with these arguments; each loss on the whole hold-out becomes a line of ``trace``."""
    try:
        from msp_plugin.search.candidate_loss import CandidateLoss
    except ImportError:  # where it was then
        from msp_plugin.candidates import CandidateLoss
    from msp_plugin.cli import main

    measure = CandidateLoss.__call__

    def measured(self, choice, samples=None):
        loss = measure(self, choice, samples)
        if samples is None and sum(self.lengths) == HOLDOUT:
            with trace.open("a", encoding="utf-8") as file:
                file.write(json.dumps([time.process_time(), loss]) + "\n")
        return loss

    CandidateLoss.__call__ = measured
    sys.argv = ["msp", *arguments]
    main()


def start(
    code: Path, work: Path, name: str, model: Path, options: argparse.Namespace, most: int
) -> subprocess.Popen:
    """Start one search with the package in ``code``; ``most`` forward tokens, 0 for the default."""
    folder, text = work / name, model / "text"
    folder.mkdir(parents=True)
    command = [
        sys.executable, __file__, "--trace", str(folder / "trace.jsonl"), "allocate", str(model / "model"), "-s", "0.625",
        "--data", str(text / "calibration.txt"), "--search-data", str(text / "search.txt"), "--samples", str(options.samples),
        "--length", "512", "--dtype", options.dtype, "--set", f"allocator.tokens={SEARCH}", "--set",
        f"allocator.holdout={HOLDOUT}", "--cache", str(folder / "cache"), "--out", str(folder / "allocation.json"),
    ]  # fmt: skip
    command += ["--set", f"allocator.max_tokens={most}"] if most else []
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(code)})


def trail(folder: Path) -> list[tuple[float, float]]:
    """Return (CPU seconds, least KL on the hold-out so far) of a search; the first is uniform's or a seed's."""
    found: list[tuple[float, float]] = []
    for line in (folder / "trace.jsonl").read_text(encoding="utf-8").splitlines():
        seconds, loss = json.loads(line)
        found.append((seconds, min(loss, found[-1][1]) if found else loss))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("smollm2"), help="directory that smollm2.py made")
    parser.add_argument("--work", type=Path, default=Path("smollm2/speed"), help="a new directory")
    parser.add_argument("--revision", default=REVISION)
    parser.add_argument("--tokens", type=int, default=920_000, help="of the earlier search")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    root = Path(__file__).parents[1]
    archive = subprocess.run(
        ["git", "-C", str(root), "archive", options.revision, "msp_plugin"],
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    earlier = options.work / "earlier-code"
    earlier.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(earlier, filter="data")
    codes = {"earlier": earlier, "now": root}
    running = {
        name: start(
            code.resolve(), options.work, name, options.model, options, options.tokens * (name == "earlier")
        )
        for name, code in codes.items()
    }
    failed = [name for name, process in running.items() if process.wait()]
    if failed:
        print(f"the search failed: {', '.join(failed)}")
        return 2
    trails = {name: trail(options.work / name) for name in codes}
    uniform, won = trails["earlier"][0][1], trails["earlier"][0][1] - trails["earlier"][-1][1]
    goal = uniform - 0.95 * won
    reached = {name: next((s for s, loss in points if loss <= goal), None) for name, points in trails.items()}
    record = {
        "revision": options.revision, "tokens": options.tokens, "samples": options.samples, "dtype": options.dtype,
        "uniform": uniform, "goal": goal, "least": {name: points[-1][1] for name, points in trails.items()},
        "cpu_seconds_to_goal": reached, "cpu_seconds": {name: points[-1][0] for name, points in trails.items()},
        "trails": trails,
    }  # fmt: skip
    RESULTS.joinpath("smollm2_speed.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in record.items() if key != "trails"}, indent=1))
    return int(reached["now"] is None or reached["now"] > GOAL * reached["earlier"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trace"]:
        traced(Path(sys.argv[2]), sys.argv[3:])
    else:
        raise SystemExit(main())
