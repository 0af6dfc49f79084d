"""What `msp prune --offload` saves in memory: the whole command on a model in memory and on disk.

    python integration/offload_command.py                  # a Llama of 300 M random weights
    python integration/offload_command.py --size "11 M"    # writes nothing

Wanda at 75 % with four levels and a search that stops after its seeds and one round, on the demo corpus; the model has
the demo's tokenizer. Anonymous memory of the process, sampled every 20 ms, without what importing everything takes
(`msp plugins`): mapped files, which the system may drop, are not in it. Both must write the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from database_cost import RESULTS, machine, make_model
from growth import SIZES

OPTIONS = [
    "-s", "0.75", "-m", "wanda", "--levels", "3:4,2:4,1:4,1:8", "--dtype", "float32", "--data", "demo:calibration",
    "--search-data", "demo:search", "--test-data", "demo:test", "--samples", "8", "--length", "256", "--test-samples", "2",
    "--set", "allocator.tokens=1024", "--set", "allocator.holdout=1024", "--set", "allocator.max_tokens=1",
    "--set", "allocator.seeds=4", "--set", "fisher.samples=2",
]  # fmt: skip


def run(*arguments: object) -> tuple[float, float]:
    """Run ``msp`` and return (GB of anonymous memory at its peak, seconds)."""
    began, peak = time.monotonic(), 0
    command = [sys.executable, "-m", "msp_plugin", *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak = max(peak, int(line.split()[1]))
            time.sleep(0.02)
        if process.returncode:
            said.seek(0)
            raise SystemExit(said.read()[-2000:])
    return peak * 1024 / 1e9, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="300 M", choices=list(SIZES))
    size = parser.parse_args().size
    from msp_plugin.demo import demo_model_path
    from msp_plugin.models import load_tokenizer

    before, rows, written = run("plugins", "--json")[0], {}, set()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model"
        model = make_model(*SIZES[size])
        model.save_pretrained(source)
        load_tokenizer(demo_model_path("llama")).save_pretrained(source)
        weights = sum(p.numel() for p in model.parameters())
        del model
        for way, more in (("in memory", []), ("--offload", ["--offload"])):
            out = Path(folder) / way
            peak, seconds = run("prune", source, *OPTIONS, "--cache", f"{out} cache", "--out", out, *more)
            rows[way] = {"anonymous_gb": peak - before, "seconds": seconds}
            digest = hashlib.sha256()
            for file in (*sorted(out.glob("*.safetensors")), out / "allocation.json"):
                digest.update(file.read_bytes())
            written.add(digest.hexdigest())
    lines = [
        f"| `msp prune`, {weights / 1e6:.0f} M weights, {4 * weights / 1e9:.2f} GB | anonymous GB at the peak | seconds |",
        "|---|---|---|",
        *(f"| {way} | {row['anonymous_gb']:.2f} | {row['seconds']:.0f} |" for way, row in rows.items()),
        "", f"Weights and allocation.json: {'equal to the byte' if len(written) == 1 else 'NOT EQUAL'}.",
    ]  # fmt: skip
    print("\n".join(lines))
    if size == "300 M":
        record = {"machine": machine(), "weights": weights, "rows": rows, "equal": len(written) == 1}
        (RESULTS / "offload_command.json").write_text(json.dumps(record, indent=1) + "\n")
        head = ["# What --offload saves", "", "Made by `python integration/offload_command.py`:"]
        head += [" ".join(__doc__.split("\n\n")[-1].split()), "", f"{record['machine']}", ""]
        (RESULTS / "offload_command.md").write_text("\n".join([*head, *lines]) + "\n")
    return 0 if len(written) == 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
