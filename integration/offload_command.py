"""What `--offload` saves in memory, step by step of a whole run.

    python integration/offload_command.py                  # a Llama of 300 M random weights
    python integration/offload_command.py --size "11 M"    # writes nothing

What `msp prune` does, in float32 with Wanda at 75 %, four levels and a search that stops after its seeds and one
round, on the demo corpus; the model has the demo's tokenizer. What a run may hold of pruned weights and of Fisher
diagonals, and what it writes into one file, 4 GiB each, is set to an eighth of the model for both, so that it matters at this size. Each way is a process
of its own. Anonymous memory beyond its imports, sampled every 10 ms: mapped files, which the system may drop, are not
in it, so in memory the weights are copied from the mapped checkpoint. Both must write the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from database_cost import RESULTS, in_process, machine, make_model
from growth import SIZES
from offload_bench import memory

WAYS = ("in memory", "on disk")
LINE = {
    "sparsity": 0.75, "method": "wanda", "levels": ["3:4", "2:4", "1:4", "1:8"],
    "estimators": {"fisher": {"samples": 2}},
    "allocator": {"name": "search", "tokens": 1024, "holdout": 1024, "rounds": 1, "seeds": 4},
}  # fmt: skip
STEPS = ("perplexity, saving", "pruning", "sensitivity", "level database", "K-FAC error", "search")


class Steps:
    """The most anonymous memory of the process in each step, in bytes; called with what a run reports."""

    def __init__(self) -> None:
        self.now, self.peaks = "", {}
        threading.Thread(target=self._watch, daemon=True).start()

    def __call__(self, step: str, done: int, total: int, note: str = "") -> None:
        self.now = next((name for name in STEPS if name.partition(",")[0] in step), "others")

    def _watch(self) -> None:
        while True:
            step, anonymous = self.now, memory()[0]
            self.peaks[step] = max(self.peaks.get(step, 0), anonymous)
            time.sleep(0.01)


def prune_one_way(way: str, source: Path, folder: Path) -> dict[str, object]:
    """Return seconds, a digest of the results, and the anonymous memory [GB] of each step of a run."""
    os.environ["MSP_CACHE"] = str(folder / f"{way} cache")
    import llmcompressor  # noqa: F401
    import torch

    from msp_plugin.checkpoint import source as sources
    from msp_plugin.data.samples import Text
    from msp_plugin.hosts import builtin
    from msp_plugin.runs.prune import prune
    from msp_plugin.runtime.context import RunContext
    from msp_plugin.search import measurements as measure

    torch.set_num_threads(2)
    own, held = sources.load, sum(file.stat().st_size for file in source.glob("*.safetensors")) // 8

    def load(*arguments, **options):
        model = own(*arguments, **options)
        if way == "in memory":
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        return model

    sources.load = load
    builtin.SHARD_BYTES = held
    measure.CandidateWeights = partial(measure.CandidateWeights, held_bytes=held)
    before, began, steps, out = memory()[0], time.perf_counter(), Steps(), folder / way
    text = Text("demo:calibration", "demo:search", "demo:test", 8, 256, 2)
    context = RunContext(progress=steps)
    prune(source, text, out, dtype="float32", offload=way == "on disk", context=context, **LINE)
    digest = hashlib.sha256()
    for file in (*sorted(out.glob("*.safetensors")), out / "allocation.json"):
        digest.update(file.read_bytes())
    gb = {step: (peak - before) / 1e9 for step, peak in steps.peaks.items() if step}
    return {"seconds": time.perf_counter() - began, "digest": digest.hexdigest(), "anonymous_gb": gb}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="300 M", choices=list(SIZES))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(prune_one_way(args.way, args.folder / "model", args.folder)))
        return 0
    size = args.size
    from msp_plugin.demo import demo_model_path
    from msp_plugin.models.source import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model"
        model = make_model(*SIZES[size])
        model.save_pretrained(source)
        load_tokenizer(demo_model_path("llama")).save_pretrained(source)
        weights = sum(p.numel() for p in model.parameters())
        del model
        rows = {way: in_process(__file__, ["--way", way, "--in", folder]) for way in WAYS}
    equal = len({row["digest"] for row in rows.values()}) == 1
    peak = {way: max(row["anonymous_gb"].values()) for way, row in rows.items()}
    lines = [
        f"Anonymous GB at the peak of each step, {weights / 1e6:.0f} M weights of {4 * weights / 1e9:.2f} GB:", "",
        "| step | in memory | on disk |", "|---|---|---|",
        *(
            f"| {step} | " + " | ".join(f"{rows[way]['anonymous_gb'].get(step, 0):.2f}" for way in WAYS) + " |"
            for step in STEPS
        ),
        f"| all | {peak[WAYS[0]]:.2f} | {peak[WAYS[1]]:.2f} |",
        f"| seconds | {rows[WAYS[0]]['seconds']:.0f} | {rows[WAYS[1]]['seconds']:.0f} |",
        "", f"Weights and allocation.json: {'equal to the byte' if equal else 'NOT EQUAL'}.",
    ]  # fmt: skip
    print("\n".join(lines))
    if size == "300 M":
        record = {"machine": machine(), "weights": weights, "rows": rows, "equal": equal}
        (RESULTS / "offload_command.json").write_text(json.dumps(record, indent=1) + "\n")
        about = " ".join(__doc__.split("\n\n")[-1].split())
        head = ["# What --offload saves", "", f"Made by `python integration/offload_command.py`: {about}", ""]
        (RESULTS / "offload_command.md").write_text("\n".join([*head, *lines]) + "\n")
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
