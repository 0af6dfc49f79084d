"""What a level database of widths costs against one pruning run of llm-compressor, in one run of this script.

    python integration/structure_cost.py            # writes results/structure_cost.md and .json
    python integration/structure_cost.py --quick    # two blocks, eight samples, writes nothing

A Llama of 97 M random weights and 64 x 512 random tokens, float32. Ours: for each structured method, a database of all levels of
the menu ``width``, written to disk, with its passes over the samples. Theirs: one uniform SparseGPT 2:4 `oneshot`, nothing saved.
Each in a process of its own; CPU and wall seconds are those of the work, after imports and the making of the model, peak memory
is that of the process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from database_cost import RESULTS, in_process, machine, make_data, make_model, measured, prune_uniformly

ONESHOT = "oneshot, SparseGPT 2:4"
#: The scores of llm_pruner differ in what they make of the same gradients.
METHODS = ("obs", "flap", "llm_pruner")


def work_of(part: str, blocks: int, samples: int, folder: str) -> Callable[[], None]:
    """Return what a part does, with everything imported and made that is not to be measured."""
    from msp_plugin.database.build import build_database
    from msp_plugin.database.store import LevelDatabase
    from msp_plugin.models.layers import prunable_layers
    from msp_plugin.plan.menus import DEFAULT_QUANTUM, parse_menu
    from msp_plugin.plugins.manager import Plugins
    from msp_plugin.structure.groups import with_groups

    model, data = make_model(blocks), make_data(samples)
    if part == ONESHOT:
        return lambda: prune_uniformly(model, data, 1, folder)
    pruner = Plugins().build("pruners", {"name": part})
    database = LevelDatabase(Path(folder), {"bench": "structure_cost"}, parse_menu(["width"]))
    table = with_groups(model, prunable_layers(model, granularity="half"), DEFAULT_QUANTUM)

    def build() -> None:
        build_database(database, model, table, pruner, data)

    return build


def main() -> None:
    """Measure all parts, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="two blocks and eight samples; nothing is written"
    )
    parser.add_argument("--part", choices=(ONESHOT, *METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if given.quick:
        given.blocks, given.samples = 2, 8
    if given.part:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measured(work_of(given.part, given.blocks, given.samples, folder))))
        return
    size = ["--blocks", str(given.blocks), "--samples", str(given.samples)]
    rows = {
        part: in_process(__file__, ["--part", part, *size], given.threads) for part in (ONESHOT, *METHODS)
    }
    lines = [
        "| | CPU s | of oneshot | wall s | peak GB | of it before the work |",
        "|---|---|---|---|---|---|",
    ]
    for part, row in rows.items():
        lines.append(
            f"| {part} | {row['cpu']:.1f} | {row['cpu'] / rows[ONESHOT]['cpu']:.2f} | {row['wall']:.1f} | "
            f"{row['peak_gb']:.2f} | {row['before_gb']:.2f} |"
        )
    print("\n".join(lines))
    if not given.quick:
        record = {
            "machine": machine(),
            "blocks": given.blocks,
            "samples": given.samples,
            "threads": given.threads,
            "parts": rows,
        }
        (RESULTS / "structure_cost.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        head = [
            "# What a level database of widths costs",
            "",
            "Made by `python integration/structure_cost.py`:",
        ]
        head += [*__doc__.split("\n\n")[-1].split("\n"), f"Threads: {given.threads}. {machine()}", ""]
        page = "\n".join([*head, *lines]) + "\n"
        (RESULTS / "structure_cost.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
