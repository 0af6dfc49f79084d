"""What one whole `msp prune` costs on a large model: the command itself, from the checkpoint to the saved result.

    python integration/whole_run.py                  # a Llama of 1 B random weights, about a quarter of an hour
    python integration/whole_run.py --size "11 M"    # writes nothing

`msp prune` in float32 with SparseGPT at 62.5 %, the levels 2:4 and 1:4, 8 calibration samples of 256 tokens of the
demo corpus, a search of at most two rounds, and perplexities before and after; no uniform run beside it. The model
has the demo's tokenizer. Peak memory is the largest resident set of the process, mapped files with it; by step,
sampled every 50 ms, what of it is anonymous and what is pages of mapped files, which the system may drop.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from database_cost import RESULTS, machine, make_model
from growth import SIZES

OPTIONS = (
    "-s", "0.625", "--method", "sparsegpt", "--levels", "2:4,1:4", "--dtype", "float32", "--samples", "8",
    "--length", "256", "--test-samples", "4", "--set", "allocator.tokens=1024", "--set", "allocator.holdout=1024",
    "--set", "allocator.rounds=2", "--data", "demo:calibration", "--search-data", "demo:search", "--test-data",
    "demo:test", "--no-baseline",
)  # fmt: skip


class Steps:
    """A command that runs, and the most memory that each of its steps took, in bytes: anonymous, of mapped files.

    A step ends with its line of progress; what follows the last one is ``end``.
    """

    def __init__(self, command: list[str], env: dict[str, str]):
        self.peaks: dict[str, list[int]] = {}
        self._now = [0, 0]
        self._process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stderr:
            sys.stderr.write(line)
            if step := re.fullmatch(r"(\w[^%|]*): \d+ of \d+ done in .*", line.strip()):
                self._end(step[1])

    def _end(self, step: str) -> None:
        now, self._now = self._now, [0, 0]
        before = self.peaks.get(step, [0, 0])
        self.peaks[step] = [max(pair) for pair in zip(before, now, strict=True)]

    def wait(self) -> tuple[int, resource.struct_rusage]:
        """Return the exit status and what the process used."""
        status = Path(f"/proc/{self._process.pid}/status")
        while True:
            ended, code, used = os.wait4(self._process.pid, os.WNOHANG)
            if ended:
                self._end("end")
                return code, used
            held = dict(re.findall(r"(Rss(?:Anon|File)):\s+(\d+)", status.read_text()))
            found = [1024 * int(held.get(name, 0)) for name in ("RssAnon", "RssFile")]
            self._now = [max(pair) for pair in zip(self._now, found, strict=True)]
            time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1 B", choices=list(SIZES))
    args = parser.parse_args()
    from msp_plugin.demo import demo_model_path
    from msp_plugin.models.source import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "model", Path(folder) / "out"
        model = make_model(*SIZES[args.size])
        model.save_pretrained(source)
        load_tokenizer(demo_model_path("llama")).save_pretrained(source)
        weights = sum(p.numel() for p in model.parameters())
        del model
        command = [sys.executable, "-m", "msp_plugin", "prune", str(source), *OPTIONS, "--out", str(out)]
        began = time.perf_counter()
        steps = Steps(command, {**os.environ, "MSP_CACHE": str(Path(folder) / "cache")})
        status, used = steps.wait()
        wall = time.perf_counter() - began
        if status:
            return 1
        run = json.loads((out / "run.json").read_text())
        bytes_of = {
            name: sum(file.stat().st_size for file in (Path(folder) / name).rglob("*") if file.is_file())
            for name in ("model", "cache", "out")
        }
    record = {
        "machine": machine(), "weights": weights, "options": OPTIONS, "wall": wall,
        "cpu": used.ru_utime + used.ru_stime, "peak_gb": used.ru_maxrss * 1024 / 1e9,
        "disk_gb": {name: size / 1e9 for name, size in bytes_of.items()},
        "pruning_seconds": run["seconds"], "search_seconds": run["search"]["seconds"],
        "sparsity": run["sparsity"], "forward_tokens": run["search"]["forward_tokens"],
        "steps_gb": {step: [size / 1e9 for size in pair] for step, pair in steps.peaks.items()},
    }  # fmt: skip
    disk = ", ".join(f"{name} {size:.1f}" for name, size in record["disk_gb"].items())
    lines = [
        f"{weights / 1e6:.0f} M weights of {4 * weights / 1e9:.2f} GB: {wall:.0f} s, {record['cpu']:.0f} CPU s, "
        f"peak {record['peak_gb']:.2f} GB; on disk in GB: {disk}. "
        f"The search measured {record['forward_tokens']:,} forward tokens in {record['search_seconds']:.0f} s.",
        "", "| step | anonymous GB | mapped GB |", "|---|---|---|",
        *(f"| {step} | {pair[0]:.2f} | {pair[1]:.2f} |" for step, pair in record["steps_gb"].items()),
    ]  # fmt: skip
    print(*lines, sep="\n")
    if args.size == "1 B":
        (RESULTS / "whole_run.json").write_text(json.dumps(record, indent=1) + "\n")
        about = " ".join(__doc__.split("\n\n")[-1].split())
        head = [
            "# A whole run",
            "",
            f"Made by `python integration/whole_run.py`: {about}",
            "",
            str(machine()),
            "",
        ]
        (RESULTS / "whole_run.md").write_text("\n".join([*head, *lines]) + "\n")
    return 0 if record["peak_gb"] <= 16 else 1


if __name__ == "__main__":
    raise SystemExit(main())
