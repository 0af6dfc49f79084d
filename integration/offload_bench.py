"""Time and memory of a search on a model in memory, and on the same model offloaded to disk.

    python integration/offload_bench.py            # 100 M and 300 M, writes results/offload.md and .json
    python integration/offload_bench.py --quick    # a model of 11 M, writes nothing

Llamas of random weights in float32, 8 x 256 random tokens for a Wanda database of four levels and as many for the
search, which stops after its seeds. Offloaded, all but the last norm is on disk: transformers'
device_map, whose hooks read each weight from the checkpoint when its layer runs. What a search may hold of pruned
weights and of Fisher diagonals, 4 GiB each, is set to an eighth of the model for both, so that it matters at these
sizes. Each case is a process of its own that loads the model from disk. Memory is what the process has beyond its
imports, sampled every 10 ms: anonymous memory, and all that is resident, mapped files included, which the system
may drop. Both have to find the same allocation with the same loss, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from database_cost import RESULTS, in_process, machine, make_data, make_model
from growth import SIZES

LEVELS = ("3:4", "2:4", "1:4", "1:8")
SEARCH = {"name": "search", "tokens": 1024, "holdout": 1024, "rounds": 0, "seeds": 4}
WAYS = ("in memory", "on disk")
PLACES = {
    "model.embed_tokens": "disk", "model.layers": "disk", "lm_head": "disk", "model.norm": "cpu",
    "model.rotary_emb": "cpu",
}  # fmt: skip


class Peak:
    """The most memory that the process has while the block runs, in bytes."""

    def __enter__(self) -> Peak:
        self.anonymous = self.resident = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            anonymous, resident = memory()
            self.anonymous, self.resident = max(self.anonymous, anonymous), max(self.resident, resident)
            if self._done.wait(0.01):
                return


def memory() -> tuple[int, int]:
    """Return the bytes of this process that are anonymous, and all that are resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {
        key: int(value.split()[0]) for key, value in (line.split(":", 1) for line in lines) if "kB" in value
    }
    return 1024 * kilobytes["RssAnon"], 1024 * kilobytes["VmRSS"]


def search(way: str, model: Path, folder: str) -> dict[str, object]:
    """Return seconds, memory and the result of a database and a search of a model that lies in a folder."""
    import torch
    from transformers import AutoModelForCausalLM

    from msp_plugin.data.samples import TextSplit
    from msp_plugin.models.layers import prunable_layers
    from msp_plugin.plan.budget import AllocationProblem
    from msp_plugin.plan.fractions import parse_sparsity
    from msp_plugin.plan.menus import parse_menu
    from msp_plugin.plugins.manager import Plugins
    from msp_plugin.search import measurements as measure
    from msp_plugin.search import unit_errors
    from msp_plugin.search.measurements import Measurements

    torch.set_num_threads(2)
    plugins, data = Plugins(), make_data(16, 256)
    pruner = plugins.build("pruners", "wanda")
    before = memory()
    options = {"device_map": PLACES, "offload_folder": f"{folder}/away"} if way == "on disk" else {}
    loaded = AutoModelForCausalLM.from_pretrained(model, **options).eval()
    if way == "in memory":  # and not mapped from the checkpoint, which the system could drop
        for parameter in loaded.parameters():
            parameter.data = parameter.data.clone()
    size = sum(p.nbytes for p in loaded.parameters())
    measure.CandidateWeights = partial(measure.CandidateWeights, held_bytes=size // 8)
    unit_errors.fisher_errors = partial(unit_errors.fisher_errors, diagonal_bytes=size // 8)
    calibration, rest = data.cut(8 * 256)
    part, holdout = rest.cut(4 * 256)
    table, menu = prunable_layers(loaded), parse_menu(["dense", *LEVELS])
    measurements = Measurements(
        loaded, table, menu, pruner, TextSplit(calibration, part, holdout),
        {"fisher": plugins.build("estimators", {"name": "fisher", "samples": 2})}, folder,
    )  # fmt: skip
    found: dict[str, object] = {"parameters": size // 4, "model_gb": size / 1e9}

    def step(name: str, work) -> object:
        cpu, wall = time.process_time(), time.perf_counter()
        with Peak() as peak:
            result = work()
        found[f"{name}_cpu"], found[f"{name}_wall"] = time.process_time() - cpu, time.perf_counter() - wall
        found[f"{name}_anonymous_gb"] = (peak.anonymous - before[0]) / 1e9
        found[f"{name}_resident_gb"] = (peak.resident - before[1]) / 1e9
        return result

    problem = AllocationProblem(table, menu, parse_sparsity("0.6"))
    step("database", lambda: measurements.database)
    result, record = step(
        "search", lambda: measurements.allocate(plugins.build("allocators", SEARCH), problem, 0)
    )
    found |= {"choice": list(result.choice), "loss": result.loss, "forward_tokens": record["forward_tokens"]}
    return found


def lines_of(cases: dict[str, dict[str, dict]]) -> list[str]:
    """Return the table of seconds and memory."""
    lines = [
        "| model | weights | model, GB | where | database, wall s | anonymous GB | search, CPU s | wall s "
        "| anonymous GB | resident GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size, ways in cases.items():
        lines += [
            f"| {size} | {row['parameters'] / 1e6:.0f} M | {row['model_gb']:.2f} | {way} "
            f"| {row['database_wall']:.0f} | {row['database_anonymous_gb']:.2f} | {row['search_cpu']:.0f} "
            f"| {row['search_wall']:.0f} | {row['search_anonymous_gb']:.2f} | {row['search_resident_gb']:.2f} |"
            for way, row in ways.items()
        ]
    return lines


def text_of(cases: dict[str, dict[str, dict]]) -> str:
    """Return what the table says."""

    def ratios(above: str, below: str, what: str) -> str:
        found = [ways[above][what] / ways[below][what] for ways in cases.values()]
        return f"{min(found):.1f} to {max(found):.1f}"

    return (
        f"On disk the search takes {ratios('in memory', 'on disk', 'search_anonymous_gb')} times less memory of its own, with "
        f"the same result, and {ratios('on disk', 'in memory', 'search_cpu')} times the CPU seconds: a backward pass runs "
        "the blocks twice, and pruned weights that are not held are unpacked again. What is resident beyond that is mapped "
        "from the checkpoint and the database. The machine was shared, so the wall seconds are rough."
    )


def run(size: str) -> dict[str, dict]:
    """Return what both ways need for a model, after their results were compared."""
    with tempfile.TemporaryDirectory() as folder:
        in_process(__file__, ["--make", size, "--folder", folder])
        found = {way: in_process(__file__, ["--way", way, "--folder", folder]) for way in WAYS}
    here, there = ({key: row[key] for key in ("choice", "loss", "forward_tokens")} for row in found.values())
    if here != there:
        raise SystemExit(f"{size}: the search found {there} offloaded, {here} in memory")
    return {way: {key: value for key, value in row.items() if key != "choice"} for way, row in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a model of 11 M alone; nothing is written")
    parser.add_argument("--sizes", nargs="*", default=("100 M", "300 M"))
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_model(*SIZES[args.make]).save_pretrained(args.folder / "model")
        print(json.dumps({}))
        return 0
    if args.way:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(search(args.way, args.folder / "model", folder)))
        return 0
    record = {"machine": machine(), "cases": {s: run(s) for s in (("11 M",) if args.quick else args.sizes)}}
    lines = lines_of(record["cases"])
    if not args.quick:
        (RESULTS / "offload.json").write_text(json.dumps(record, indent=1) + "\n")
        head = ["# Searches of offloaded models", "", "Made by `python integration/offload_bench.py`:"]
        head += [" ".join(__doc__.split("\n\n")[-1].split()), "", f"{record['machine']}", ""]
        (RESULTS / "offload.md").write_text("\n".join([*head, *lines, "", text_of(record["cases"])]) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
