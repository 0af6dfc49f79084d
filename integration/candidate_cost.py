"""What measuring a candidate costs against a bare forward pass of the same batches.

    python integration/candidate_cost.py           # writes results/candidate_cost.md and .json

On a Llama of 97 M random weights and on the demo Llama, float32: the KL of two candidates that differ in a few units,
alternating, no activations reused and all weights held, against ``model(ids).logits`` of the same weights. Interleaved;
medians of CPU and wall seconds over the repeats, for several sizes of a batch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from database_cost import RESULTS, machine, make_data, make_model

LEVELS = ("dense", "2:4", "1:4")


def measure(model, data, batches: list[int], repeats: int, folder: str) -> list[dict]:
    """Return per size of a batch, in tokens, the median seconds of a bare pass and of a candidate."""
    import torch

    from msp_plugin.database.build import build_database
    from msp_plugin.database.store import LevelDatabase
    from msp_plugin.models.layers import prunable_layers
    from msp_plugin.plan.budget import AllocationProblem
    from msp_plugin.plan.fractions import parse_sparsity
    from msp_plugin.plan.menus import parse_menu
    from msp_plugin.pruning.magnitude import Magnitude
    from msp_plugin.search.candidate_loss import CandidateLoss
    from msp_plugin.search.candidate_weights import CandidateWeights

    table, menu = prunable_layers(model), parse_menu(list(LEVELS))
    database = LevelDatabase(Path(folder), {"bench": "candidate_cost", "units": table.names}, menu)
    build_database(database, model, table, Magnitude(), data)
    first = (1,) * len(table)
    second = tuple(2 if u % 10 == 3 else 1 for u in range(len(table)))

    @torch.no_grad()
    def bare() -> None:
        for ids in data.batches(size):
            _ = model(ids, use_cache=False).logits

    def timed(work) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        return time.process_time() - cpu, time.perf_counter() - wall

    found = []
    with CandidateWeights(model, database, AllocationProblem(table, menu, parse_sparsity("0.5"))) as weights:
        for size in batches:
            loss = CandidateLoss(weights, data, "kl", size, reuse=False).prepare()
            times: dict[str, list[tuple[float, float]]] = {"bare": [], "candidate": []}
            for number in range(repeats + 2):
                choice = (first, second)[number % 2]
                times["candidate"].append(timed(lambda choice=choice, loss=loss: loss(choice)))
                times["bare"].append(timed(bare))
            row = {"batch_tokens": size}
            for name, pairs in times.items():
                for kind, values in zip(("cpu", "wall"), zip(*pairs[2:], strict=True), strict=True):
                    row[f"{name}_{kind}"] = statistics.median(values)
            found.append(row)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the demo model alone; nothing is written")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    import torch

    from msp_plugin.demo import demo_model_path
    from msp_plugin.models.load import load_model

    torch.set_num_threads(args.threads)
    cases = {"demo Llama, 32 x 256 tokens": (load_model(demo_model_path("llama"), "float32"), 32, 256)}
    if not args.quick:
        cases["97 M, 4 x 512 tokens"] = (make_model(12), 4, 512)
    lines = [
        "| model and text | tokens of a batch | bare, CPU s | candidate, CPU s | ratio CPU | ratio wall |",
        "|---|---|---|---|---|---|",
    ]
    record: dict = {"machine": machine() | {"threads": args.threads}, "cases": {}}
    for name, (model, samples, length) in cases.items():
        vocabulary = model.config.vocab_size
        data = make_data(samples, length, vocabulary)
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(model, data, [length, 2 * length, 4 * length], args.repeats, folder)
        record["cases"][name] = rows
        lines += [
            f"| {name} | {r['batch_tokens']} | {r['bare_cpu']:.3f} | {r['candidate_cpu']:.3f} "
            f"| {r['candidate_cpu'] / r['bare_cpu']:.3f} | {r['candidate_wall'] / r['bare_wall']:.3f} |"
            for r in rows
        ]
    print("\n".join(lines))
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "candidate_cost.json").write_text(json.dumps(record, indent=1) + "\n")
        head = ["# What measuring a candidate costs", "", "Made by `python integration/candidate_cost.py`:"]
        head += [" ".join(__doc__.split("\n\n")[-1].split()), "", f"{record['machine']}", ""]
        (RESULTS / "candidate_cost.md").write_text("\n".join([*head, *lines]) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    raise SystemExit(main())
