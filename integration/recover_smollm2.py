"""Recover SmolLM2-135M: the share of the loss that comes back, seconds and peak memory, after a search and after uniform.

    python integration/recover_smollm2.py --work smollm2                    # all cells, hours on two cores
    python integration/recover_smollm2.py --work smollm2 --cells 5/8:search:blockwise 3/4:search:masked_lora
    python integration/recover_smollm2.py --work smollm2 --pruned 5/8:search=old/run --set masked_lora.learning_rate=1e-3

``--work`` is a directory that integration/smollm2.py has made. A cell is SPARSITY:ALLOCATION:METHOD: a pruned model, of
which each one is made once by `msp prune`, or given by ``--pruned``, and one `msp recover` of it in a process of its
own. METHOD may name several, joined by ``+``, each of which goes on from the one before it. Finished cells are not run
again, and a cell that was stopped goes on. A table's allocation serves too, marked * in the table:

    msp prune smollm2/model -s 0.75 --allocation "compared/sparsegpt-0.75-layer/search.json" --data smollm2/text/calibration.txt \\
        --search-data smollm2/text/search.txt --test-data smollm2/text/test.txt --samples 64 --length 512 --out pruned
    python integration/recover_smollm2.py --work smollm2 --cells 3/4:search:blockwise --pruned 3/4:search=pruned

Options of ``--set`` make another cell. results/recover_smollm2.json and .md
are written after each cell.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from database_cost import RESULTS, machine

ALLOCATIONS = {"uniform": ["--allocator", "uniform"], "search": []}
#: In the order of what they tell; a trained method reads about as much text as there is.
CELLS = (
    "5/8:search:blockwise", "5/8:uniform:blockwise", "3/4:search:blockwise", "3/4:search:masked_lora",
    "3/4:uniform:blockwise", "3/4:uniform:masked_lora", "5/8:search:masked_lora", "3/4:search:blockwise+masked_lora",
    "1/2:search:blockwise", "1/2:uniform:blockwise",
)  # fmt: skip
#: Methods that reconstruct the dense model's hidden states; all others train on text.
RECONSTRUCTIONS = ("blockwise", "weight_update")
NAME = "recover_smollm2"


def msp(arguments: list[str], out: Path) -> dict[str, Any]:
    """Run `msp` if its directory is not there; return its record, with its seconds and its peak GiB where it ran here.

    A stopped command goes on, and its seconds are then of the last part alone.
    """
    cost = out.with_name(f"{out.name}.cost.json")
    if not (out / "run.json").is_file():
        start = time.monotonic()
        child = subprocess.Popen([sys.executable, "-m", "msp_plugin", *arguments, "--out", str(out)])
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"msp {' '.join(arguments)} failed")
        seconds = round(time.monotonic() - start, 1)
        cost.write_text(json.dumps({"seconds": seconds, "peak_gib": usage.ru_maxrss / 2**20}))
    known = json.loads(cost.read_text()) if cost.is_file() else {}
    return json.loads((out / "run.json").read_text()) | {"cost": known}


class Cells:
    """The cells, each measured once.

    Args:
        given: options of the command line.
    """

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.model, text = given.work / "model", given.work / "text"
        self.dtype = json.loads((self.model / "config.json").read_text(encoding="utf-8"))["dtype"]
        self.out = given.out or given.work / "recover"
        self.out.mkdir(parents=True, exist_ok=True)
        self.search = ["--search-data", str(text / "search.txt")]
        self.texts = ["--data", str(text / "calibration.txt"), "--test-data", str(text / "test.txt")]
        self.texts += ["--length", given.length, "--test-samples", given.test_samples]
        self.pruned = {cell: Path(path) for cell, _, path in (p.partition("=") for p in given.pruned)}

    def sparse(self, sparsity: str, allocation: str) -> Path:
        """Return the directory of a pruned model, which is made if nobody has."""
        known = self.pruned.get(f"{sparsity}:{allocation}")
        out = known or self.out / f"{sparsity.replace('/', '-')}-{allocation}"
        options = [*ALLOCATIONS[allocation], *(self.search if allocation == "search" else [])]
        options += ["--samples", self.given.samples, "--no-baseline"]
        msp(["prune", str(self.model), "-s", sparsity, *options, *self.texts], out)
        return out

    def row(self, cell: str) -> dict[str, Any]:
        """Return the figures of a cell: perplexities, KL, the share that came back, and what the recovery cost."""
        sparsity, allocation, methods = cell.split(":")
        run, name = self.sparse(sparsity, allocation), f"{sparsity.replace('/', '-')}-{allocation}"
        stages, costs = [], []
        for method in methods.split("+"):
            options = [pair for pair in self.given.set if pair.startswith(f"{method}.")]
            name = "-".join([name, method, *(o.partition(".")[2].replace("/", "_") for o in options)])
            record = msp(self._recover(run, method, options), self.out / name)
            run, costs = self.out / name, [*costs, record["cost"]]
            stages.append(record["stages"][-1])
        values = record["perplexity"]
        before = next(stage for stage in record["stages"] if stage["name"] == "prune")
        dense, sparse, recovered = map(math.log, (values["dense"], before["perplexity"], values["recovered"]))
        return {
            "sparsity": sparsity, "allocation": allocation, "given": f"{sparsity}:{allocation}" in self.pruned, "method": methods, "cell": name,
            "dense": values["dense"], "pruned": before["perplexity"], "recovered": values["recovered"],
            "taken_back": (sparse - recovered) / (sparse - dense),
            "kl_pruned": before["kl"], "kl_recovered": stages[-1]["kl"],
            "seconds": sum(stage["seconds"] for stage in stages),
            "peak_gib": max((cost.get("peak_gib", math.nan) for cost in costs), default=math.nan),
            "tokens": sum(stage["recovery"]["tokens"] for stage in stages),
            "stages": [stage["recovery"] for stage in stages], "machine": machine(), "dtype": self.dtype,
        }  # fmt: skip

    def _recover(self, run: Path, method: str, options: list[str]) -> list[str]:
        """Return the arguments of a recovery of a run."""
        trained = method not in RECONSTRUCTIONS
        if trained and not any(pair.startswith(f"{method}.tokens=") for pair in options):
            options = [*options, f"{method}.tokens={self.given.tokens}"]
        sets = [part for pair in options for part in ("--set", pair)]
        samples = self.given.trained_samples if trained else self.given.samples
        start = ["recover", str(run), "--original", str(self.model), "--method", method, "--samples", samples]
        return [*start, *sets, *self.texts]


def markdown(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the page."""
    yield from (
        "# Recovery of SmolLM2-135M-Instruct",
        "",
        "Made by `python integration/recover_smollm2.py`.",
        "",
    )
    yield "Calibration, search and test text are disjoint parts of one text. *Taken back* is the share of the loss over"
    yield "dense, in log perplexity on the test text, that the recovery takes back. Seconds and peak memory are of `msp recover`"
    yield "alone, tokens pass through the blocks of the model (a backward pass counts as two forward passes), except that a"
    yield "trained method counts the dense model's passes too. * pruned on 64 samples of 512 tokens; behind search, to the"
    yield "allocation of the last search of [smollm2.md](smollm2.md) at that sparsity. No seconds: the run was paused."
    yield "† in float32, on a processor without instructions for bfloat16; all others in bfloat16."
    yield ""
    yield "| zeros | allocation | recovery | dense | pruned | recovered | taken back | KL, pruned | KL, recovered | seconds | peak GiB | tokens |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        figures = (
            row["sparsity"], row["allocation"] + " *" * row["given"] + " †" * (row.get("dtype") == "float32"), row["cell"].partition(f"{row['allocation']}-")[2],
            *(f"{row[name]:.2f}" for name in ("dense", "pruned", "recovered")), f"{100 * row['taken_back']:.0f} %",
            *(f"{row[name]:.3f}" for name in ("kl_pruned", "kl_recovered")),
            "" if row["seconds"] is None else f"{row['seconds']:.0f}",
            f"{row['peak_gib']:.2f}", f"{row['tokens']:,}",
        )  # fmt: skip
        yield f"| {' | '.join(figures)} |"


def write(row: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Put a row into the results, in the place of an older one of the same cell; return all rows."""
    path = folder / f"{NAME}.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    rows = [other for other in rows if other["cell"] != row["cell"]] + [row]
    rows.sort(key=lambda r: (share_of(r["sparsity"]), r["allocation"], r["cell"]))
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (folder / f"{NAME}.md").write_text("\n".join(markdown(rows)) + "\n", encoding="utf-8")
    return rows


def share_of(text: str) -> float:
    """Return a share such as ``5/8`` or ``0.625``."""
    above, _, below = text.partition("/")
    return float(above) / float(below or 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="where the runs go; default: WORK/recover")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the table goes")
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--pruned", nargs="+", default=[], help="SPARSITY:ALLOCATION=DIR of pruned models")
    parser.add_argument("--samples", default="128", help="of the pruning, and of a reconstruction")
    parser.add_argument("--trained-samples", default="600", help="of a method that trains on text")
    parser.add_argument("--tokens", type=int, default=250_000, help="of a method that trains on text")
    parser.add_argument("--length", default="256")
    parser.add_argument("--test-samples", default="64")
    parser.add_argument("--set", nargs="+", default=[], help="options of a recovery, METHOD.option=value")
    given = parser.parse_args()
    if unknown := [c for c in given.cells if c.count(":") != 2 or c.split(":")[1] not in ALLOCATIONS]:
        parser.error(f"no cell: {', '.join(unknown)}")
    cells = Cells(given)
    for cell in given.cells:
        rows = write(cells.row(cell), given.results)
        print("\n".join(markdown(rows)), flush=True)


if __name__ == "__main__":
    main()
