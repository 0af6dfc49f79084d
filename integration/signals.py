"""Stop `msp run`, `allocate`, `compare`, `prune` and `export` at every step and at random times.

    python integration/signals.py [--times 6] [--seed 0] [--only run,export]

Each command runs on a demo model in a process of its own and gets SIGINT or SIGTERM after each line of progress that it
prints, and at random times before its end. It must end within --grace seconds with 130 or 143, leave no output and no
temporary file, and the same command must work afterwards on the same cache. Exit code 1 if one did not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
MODEL = "demo:qwen2"
RECIPE = """\
sparsity_stage:
  sparsity_modifiers:
    MixedSparsityModifier:
      {sparsity: 0.75, method: wanda, cache: CACHE, allocator: {name: search, tokens: 128, holdout: 64}}
"""


def commands(folder: Path) -> dict[str, list[str]]:
    """The arguments of every command; each writes ``out`` in the folder."""
    text, cache, out = str(folder / "text.txt"), str(folder / "cache"), ["--out", str(folder / "out")]
    data = ["--data", text, "--samples", "8", "--length", "64"]
    search = ["--set", "search.tokens=128", "--set", "search.holdout=64", "--cache", cache]
    own = [part.replace("search.", "allocator.") for part in search]
    return {
        "run": ["run", str(folder / "recipe.yaml"), "--model", MODEL, *data, "--test-samples", "2", *out],
        "allocate": ["allocate", MODEL, "-s", "0.75", "-m", "wanda", *data, *own, *out],
        "compare": ["compare", MODEL, "-s", "0.75", "--methods", "wanda", "--allocators", "uniform,search", *data,
                    "--test-samples", "2", *search, *out],
        "prune": ["prune", MODEL, "-s", "0.75", "-m", "wanda", *data, "--test-samples", "2", "--no-baseline", *own, *out],
        "export": ["export", str(folder / "run"), "--to", "dense", *out],
    }  # fmt: skip


def prepare(folder: Path) -> None:
    """Write what the commands read."""
    (folder / "text.txt").write_text("while True:\n    x = x + 1\n" * 300)
    (folder / "recipe.yaml").write_text(RECIPE.replace("CACHE", str(folder / "cache")))
    command = [
        "prune", MODEL, "-s", "0.5", "-m", "magnitude", "--levels", "2:4", "--allocator", "uniform", "--data",
        str(folder / "text.txt"), "--samples", "4", "--length", "64", "--test-samples", "0", "--out", str(folder / "run"),
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "msp_plugin", *command], check=True, capture_output=True)


class Process:
    """A command that runs; its lines of progress with the seconds at which they came."""

    def __init__(self, arguments: list[str], folder: Path):
        self.began = time.monotonic()
        temporary = folder / "tmp"
        temporary.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "msp_plugin", *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stderr:
            self.lines.append((time.monotonic() - self.began, line.rstrip()))

    def stop(self, number: signal.Signals, after: float | int, grace: float) -> tuple[int | None, float]:
        """Send a signal after a count of lines (int) or seconds (float); return exit code and seconds until then."""
        while self._process.poll() is None:
            if len(self.lines) >= after if isinstance(after, int) else time.monotonic() - self.began >= after:
                break
            time.sleep(0.005)
        sent = time.monotonic()
        if self._process.poll() is None:
            self._process.send_signal(number)
        return self.wait(grace), time.monotonic() - sent

    def wait(self, seconds: float) -> int | None:
        """Return the exit code; None if it had to be killed."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            code = None
        self._reader.join()
        return code


def left(folder: Path) -> list[str]:
    """What a stopped command must not leave."""
    known = {"text.txt", "recipe.yaml", "run", "cache", "tmp"}
    found = [p.name for p in folder.iterdir() if p.name not in known]
    found += [str(p.relative_to(folder)) for p in folder.rglob("*.partial")]
    return found + [
        f"tmp/{p.name}" for p in (folder / "tmp").iterdir() if not p.name.startswith("torchinductor")
    ]


def sweep(
    name: str, arguments: list[str], folder: Path, times: int, grace: float, choice: random.Random
) -> list[str]:
    """Return what went wrong with a command."""
    wrong = []

    def clear(cache: bool = True) -> None:
        for path in (folder / "out", *([folder / "cache"] if cache else [])):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    whole = Process(arguments, folder)
    if whole.wait(600) != 0:
        return [f"{name}: does not run: {whole.lines[-5:]}"]
    seconds, steps = time.monotonic() - whole.began, len(whole.lines)
    moments = [*range(1, steps), *(choice.uniform(0.0, seconds) for _ in range(times))]
    print(f"{name}: {seconds:.1f} s, {steps} lines", flush=True)
    for i, after in enumerate(moments):
        clear()
        number = list(CODES)[i % 2]
        process = Process(arguments, folder)
        code, took = process.stop(number, after, grace)
        late = code in (0, -number, CODES[number])  # Python itself was ending
        finished = late and (folder / "out").exists() and not list(folder.rglob("*.partial"))
        traceback = [line for _, line in process.lines if "Traceback" in line]
        lost = code == 0 and took > seconds / 2
        where = f"{name}: {number.name} after {after if isinstance(after, int) else f'{after:.2f} s'}"
        if lost:
            wrong.append(f"{where}: the signal was lost, it ended after {took:.1f} s")
        if not finished:
            remains = left(folder)
            early = code == -number and not process.lines  # while Python itself starts
            if (code != CODES[number] and not early) or remains or traceback:
                wrong.append(
                    f"{where}: exit code {code} after {took:.1f} s, left {remains}, {process.lines[-3:]}"
                )
        print(
            f"  {where}: {code}, {took:.2f} s{'' if not wrong or where not in wrong[-1] else '  WRONG'}",
            flush=True,
        )
    clear(cache=False)
    again = Process(arguments, folder)
    if again.wait(600) != 0:
        wrong.append(f"{name}: does not run after it was stopped: {again.lines[-5:]}")
    clear()
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=6, help="random moments for each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--grace", type=float, default=15.0, help="seconds in which a stopped command must end"
    )
    parser.add_argument("--only", help="comma list of commands")
    given = parser.parse_args()
    wrong, choice = [], random.Random(given.seed)  # noqa: S311
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for command, arguments in commands(folder).items():
            if given.only is None or command in given.only.split(","):
                wrong += sweep(command, arguments, folder, given.times, given.grace, choice)
    print(json.dumps(wrong, indent=2))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
