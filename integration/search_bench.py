"""What a search costs: our search against EvoPress at equal quality, prefix reuse, and the exact solver.

Both searches run on the same level database and the same search text. Every incumbent of both, that is
what each would have returned if it had been stopped then, is measured on hold-out text that neither saw, not
even for stopping. EvoPress runs its full schedule scaled to the model: 400 generations of 64 for the 224
layers of a 7B model are 57 for 32 units, and its token ladder 2,048 / 16,384 / 65,536 is divided by 8 as the
samples are (256 tokens instead of 2,048).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

#: Of 64 calibration samples: the seeds of a search need no more, and each counts as three forward passes, twice.
FISHER = {"name": "fisher", "samples": 16}
EVOPRESS = {"name": "evopress", "generations": 57, "tokens_per_selection": (256, 2048, 8192), "tokens": 12288}
SEARCH = {"name": "search", "tokens": 12288, "holdout": 4096}
#: The same search, which ends later: what its default saves, and what that costs.
PATIENT = {**SEARCH, "patience": 3}


def bench_model(model_name: str, method: str, sparsity: str, cache: str | None):
    """Return (measurements, problem, hold-out that no search sees) of a demo model."""
    from msp_plugin.data.samples import TextSplit, load_split
    from msp_plugin.data.search_text import SearchText
    from msp_plugin.demo import demo_model_path, demo_text
    from msp_plugin.models.layers import prunable_layers
    from msp_plugin.models.load import load_model
    from msp_plugin.models.source import load_tokenizer
    from msp_plugin.plan.budget import AllocationProblem
    from msp_plugin.plan.fractions import parse_sparsity
    from msp_plugin.plan.menus import DEFAULT_LEVELS, parse_menu
    from msp_plugin.plugins.manager import Plugins
    from msp_plugin.search.measurements import Measurements

    path = demo_model_path(model_name)
    model, text = load_model(path, "float32"), demo_text().for_model(path)
    samples = load_split(load_tokenizer(path), text, SearchText(12288 + 4096 + 16384)).pruning
    calibration, rest = samples.samples[:64], type(samples)(samples.samples[64:], "search")
    rest, unseen = rest.cut(16384)
    search, holdout = rest.cut(4096)
    table, menu = prunable_layers(model), parse_menu(DEFAULT_LEVELS)
    plugins = Plugins()
    measurements = Measurements(
        model, table, menu, plugins.build("pruners", method), TextSplit(
            type(samples)(calibration, "calibration"), search, holdout), {"fisher": plugins.build("estimators", FISHER)}, cache,
    )  # fmt: skip
    return measurements, AllocationProblem(table, menu, parse_sparsity(sparsity)), unseen


def search_trail(
    measurements, problem, unseen, spec: dict, seed: int
) -> tuple[list[tuple[int, float]], float, float]:
    """Return (forward tokens and loss on unseen text of each incumbent, that of uniform, seconds).

    The tokens are those that measured candidates and, before them, those of the sensitivities.
    """
    from msp_plugin.plugins.manager import Plugins
    from msp_plugin.search.candidate_loss import CandidateLoss
    from msp_plugin.search.candidate_weights import CandidateWeights

    result, record = measurements.allocate(Plugins().build("allocators", spec), problem, seed)
    with CandidateWeights(measurements.model, measurements.database, problem) as weights:
        loss = CandidateLoss(weights, unseen, reuse=False).prepare()
        held = {choice: loss(choice) for choice in dict.fromkeys(c for _, c in result.incumbents)}
        held.setdefault(result.choice, loss(result.choice))
        uniform = loss(problem.uniform())
    before = record.sensitivity_tokens
    points = [(before + tokens, held[choice]) for tokens, choice in result.incumbents]
    return [*points, (before + record.forward_tokens, held[result.choice])], uniform, record.seconds


def add_peers(record: dict, cell: tuple[str, str, str], seeds: list[int], cache: str | None) -> None:
    """Run EvoPress' full schedule with some seeds, and write the results into a record that has runs of ours."""
    measurements, problem, unseen = bench_model(*cell, cache)
    ours = [e for e in record["searches"] if cell_of(e) == cell]
    for seed in seeds:
        trail, _, seconds = search_trail(measurements, problem, unseen, EVOPRESS, seed)
        row = dict(zip(("model", "method", "sparsity"), cell, strict=True))
        row |= {
            "seed": seed,
            "loss": trail[-1][1],
            "tokens": trail[-1][0],
            "seconds": seconds,
            "trail": trail,
        }
        if seed == ours[0]["seed"]:
            ours[0]["trails"]["evopress"] = trail
            for entry in ours:
                entry |= compared(trail, entry["trails"]["search"])
                entry["seconds"]["evopress"] = seconds
        else:
            others = [e for e in record["peers"] if (cell_of(e), e["seed"]) != (cell, seed)]
            record["peers"] = sorted([*others, row], key=lambda e: (*cell_of(e), e["seed"]))
        print(json.dumps({key: value for key, value in row.items() if key != "trail"}), flush=True)


def cell_of(entry: dict) -> tuple[str, str, str]:
    """Return (model, method, sparsity) of an entry."""
    return entry["model"], entry["method"], entry["sparsity"]


def compared(peer: list[tuple[int, float]], ours: list[tuple[int, float]]) -> dict:
    """Return what an entry says of a run of EvoPress and one of ours."""
    return {
        "evopress": peer[-1][1], "search": ours[-1][1], "evopress_tokens": peer[-1][0], "search_tokens": ours[-1][0],
        "reached_tokens": next((tokens for tokens, value in ours if value <= peer[-1][1]), None),
    }  # fmt: skip


def mean_reaches(trails: list[list[tuple[int, float]]], target: float) -> int | None:
    """Return the least tokens after which runs, each stopped then, had a mean loss of at most the target."""
    for stop in sorted({tokens for trail in trails for tokens, _ in trail}):
        # what a run would have returned; before its first incumbent there is only uniform
        if (
            statistics.mean([t for t in trail if t[0] <= stop or t is trail[0]][-1][1] for trail in trails)
            <= target
        ):
            return stop
    return None


def peer_lines(record: dict) -> list[str]:
    """Return the table of the cells in which EvoPress has run with several seeds."""
    cells = dict.fromkeys(map(cell_of, record.get("peers", [])))
    if not cells:
        return []

    def shares(reached: int | None, tokens: float) -> str:
        return "never" if reached is None else f"1/{tokens / reached:.1f}"

    lines = [
        "", "EvoPress' result depends on its seed as well. Its mean over seeds, and the share of its tokens after which "
        "ours, each stopped then, are as good: the mean of ours, and each seed of ours.", "",
        "| model | method | zeros | EvoPress by seed | mean | search by seed | mean | mean reached after | share "
        "| by seed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for cell in cells:
        same = [e for e in record["searches"] if cell_of(e) == cell]
        more = [e for e in record["peers"] if cell_of(e) == cell]
        finals = [same[0]["evopress"], *(e["loss"] for e in more)]
        tokens = statistics.mean([same[0]["evopress_tokens"], *(e["tokens"] for e in more)])
        mean, ours = statistics.mean(finals), [e["search"] for e in same]
        trails = [e["trails"]["search"] for e in same]
        reached = mean_reaches(trails, mean)
        lines.append(
            f"| {cell[0]} | {cell[1]} | {100 * float(cell[2]):g} % | {', '.join(f'{v:.4f}' for v in finals)} "
            f"| {mean:.4f} | {', '.join(f'{v:.4f}' for v in ours)} | {statistics.mean(ours):.4f} "
            f"| {'' if reached is None else f'{reached:,}'} | {shares(reached, tokens)} "
            f"| {', '.join(shares(mean_reaches([trail], mean), tokens) for trail in trails)} |"
        )
    return lines


def search_cost(
    model: str, method: str, sparsity: str, seeds: list[int], cache: str | None, earlier: list[dict]
) -> list[dict]:
    """Return one entry per seed of our search: forward tokens to the final loss of EvoPress on unseen text.

    EvoPress runs with the first seed: its full schedule takes a quarter of an hour even here. Its trail is
    taken from an earlier record where there is one.
    """
    measurements, problem, unseen = bench_model(model, method, sparsity, cache)

    def trail(spec: dict, seed: int) -> tuple[list[tuple[int, float]], float, float]:
        return search_trail(measurements, problem, unseen, spec, seed)

    known = [e for e in earlier if cell_of(e) == (model, method, sparsity)]
    known = [e for e in known if e["seed"] == seeds[0] and "evopress" in e["trails"]]
    if known:
        peer, uniform = known[0]["trails"]["evopress"], known[0]["uniform"]
        peer_seconds = known[0]["seconds"]["evopress"]
    else:
        peer, uniform, peer_seconds = trail(EVOPRESS, seeds[0])
    found = []
    for seed in seeds:
        ours, _, seconds = trail(SEARCH, seed)
        patient = trail(PATIENT, seed)[0][-1]
        entry = {
            "model": model, "method": method, "sparsity": sparsity, "seed": seed, "uniform": uniform,
            **compared(peer, ours), "patient": patient[1], "patient_tokens": patient[0],
            "seconds": {"evopress": peer_seconds, "search": seconds},
            "trails": {"search": ours} | ({"evopress": peer} if seed == seeds[0] else {}),
        }  # fmt: skip
        found.append(entry)
        print(json.dumps({key: value for key, value in entry.items() if key != "trails"}), flush=True)
    return found


def prefix_reuse(model: str, cache: str | None, candidates: int = 40) -> dict:
    """Return the time of candidates with and without reuse; candidates that each move one unit by one level."""
    import numpy as np

    from msp_plugin.search.candidate_loss import CandidateLoss
    from msp_plugin.search.candidate_weights import CandidateWeights

    measurements, problem, _ = bench_model(model, "sparsegpt", "0.75", cache)
    rng, now = np.random.default_rng(0), problem.uniform()
    moves = []
    while len(moves) < candidates:
        unit = int(rng.integers(len(now)))
        level = now[unit] + int(rng.choice([-1, 1]))
        if 0 <= level < len(problem.menu):
            moves.append((*now[:unit], level, *now[unit + 1 :]))
    with CandidateWeights(measurements.model, measurements.database, problem) as weights:
        losses = {
            reuse: CandidateLoss(weights, measurements.text.search, reuse=reuse).prepare()
            for reuse in (True, False)
        }
        losses[True].set_incumbent(now)
        times: dict[bool, list[float]] = {True: [], False: []}
        worst = 0.0
        for reuse in (True, False):
            losses[reuse](now)
        for choice in moves:  # interleaved, so that whatever else runs slows both
            values = []
            for reuse in (True, False):
                start = time.perf_counter()
                values.append(losses[reuse](choice))
                times[reuse].append(time.perf_counter() - start)
            worst = max(worst, abs(values[0] - values[1]))
    ratios = [b / a for a, b in zip(times[True], times[False], strict=True)]
    return {
        "model": model, "candidates": candidates, "tokens": measurements.text.search.tokens,
        "seconds_with": statistics.median(times[True]), "seconds_without": statistics.median(times[False]),
        "speedup_all": sum(times[False]) / sum(times[True]), "speedup_median": statistics.median(ratios),
        "largest_difference": worst,
    }  # fmt: skip


def solver(repeats: int = 5) -> dict:
    """Return the seconds of an exact solution for Llama-3-8B's 224 layers and 9 levels."""
    import numpy as np

    from msp_plugin.plan.budget import AllocationProblem
    from msp_plugin.plan.menus import parse_menu
    from msp_plugin.plan.units import Layer, Unit, UnitTable

    shapes = {
        "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096), "gate": (14336, 4096),
        "up": (14336, 4096), "down": (4096, 14336),
    }  # fmt: skip
    units = [
        Unit(f"{block}.{name}", block, (Layer(f"{block}.{name}", *shape),))
        for block in range(32) for name, shape in shapes.items()
    ]  # fmt: skip
    menu = parse_menu("dense,14:16,12:16,10:16,8:16,6:16,4:16,2:16,1:16")
    rng, times = np.random.default_rng(0), []
    for _ in range(repeats):
        from fractions import Fraction

        start = time.perf_counter()
        problem = AllocationProblem(UnitTable(tuple(units)), menu, Fraction(3, 4))
        problem.solve(rng.exponential(1.0, (len(units), len(menu))))
        times.append(time.perf_counter() - start)
    return {
        "layers": len(units),
        "levels": len(menu),
        "seconds": statistics.median(times),
        "worst": max(times),
    }


def markdown(record: dict) -> str:
    """Return the tables."""
    lines = [
        "# What a search costs",
        "",
        "Made by `python integration/search_bench.py`, then, for the second table, with `--peer-seeds 1 2`; "
        f"{record['machine']}. KL in nats per token on text that "
        "neither search saw. *Reached*: forward tokens after which what our search would have returned was as "
        "good as EvoPress' final allocation; a backward pass counts as two forward passes, the tokens that only "
        "tell when to stop are counted, and so are the sensitivities that it starts from (of 16 samples, where the default is 128); the level "
        "database, which both need, is not. *Patience 3*: the same search with `patience: 3` instead of 1."
        + record.get("said", ""),
        "",
        "| model | method | zeros | seed | uniform | EvoPress (tokens) | search (tokens) | reached | share "
        "| patience 3 (tokens) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for e in record["searches"]:
        reached = e["reached_tokens"]
        share = "" if reached is None else f"1/{e['evopress_tokens'] / reached:.1f}"
        lines.append(
            f"| {e['model']} | {e['method']} | {100 * float(e['sparsity']):g} % | {e['seed']} | {e['uniform']:.4f} "
            f"| {e['evopress']:.4f} ({e['evopress_tokens']:,}) | {e['search']:.4f} ({e['search_tokens']:,}) "
            f"| {'never' if reached is None else f'{reached:,}'} | {share} "
            f"| {e['patient']:.4f} ({e['patient_tokens']:,}) |"
        )
    lines += peer_lines(record)
    lines += ["", "Prefix reuse, candidates that move one random unit by one level, interleaved:", ""]
    for e in record["prefix"]:
        lines.append(
            f"- {e['model']}: {e['seconds_without'] / e['seconds_with']:.2f} times as fast by medians, "
            f"{e['speedup_all']:.2f} over all {e['candidates']} (median {e['seconds_with']:.3f} s against "
            f"{e['seconds_without']:.3f} s, {e['tokens']:,} tokens); losses differ by at most {e['largest_difference']:.1e}."
        )
    s = record["solver"]
    lines += [
        "",
        f"Exact solver, {s['layers']} layers (Llama-3-8B's shapes), {s['levels']} levels: {s['seconds']:.3f} s "
        f"(worst of five: {s['worst']:.3f} s).",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("integration/results"))
    parser.add_argument("--models", nargs="+", default=["llama", "qwen2"])
    parser.add_argument("--methods", nargs="+", default=["sparsegpt", "wanda"])
    parser.add_argument("--sparsity", default="0.75")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="EvoPress runs with the first"
    )
    parser.add_argument("--cache")
    parser.add_argument("--earlier", type=Path, help="search.json whose runs of EvoPress are taken over")
    parser.add_argument("--quick", action="store_true", help="prefix reuse and solver only")
    parser.add_argument(
        "--peer-seeds",
        nargs="+",
        type=int,
        help="only run EvoPress, with these seeds, for the record in --out",
    )
    args = parser.parse_args()
    import torch

    if args.peer_seeds:
        path = args.out / "search.json"
        record = json.loads(path.read_text())
        record["said"] = " EvoPress' runs are newer than ours."
        for model in args.models:
            for method in args.methods:
                add_peers(record, (model, method, args.sparsity), args.peer_seeds, args.cache)
                path.write_text(json.dumps(record, indent=1) + "\n")
        (args.out / "search.md").write_text(markdown(record))
        return 0

    before = json.loads(args.earlier.read_text()) if args.earlier else {"searches": []}
    earlier = before["searches"]
    said = f" EvoPress' runs are an earlier record's ({before['machine']})." if earlier else ""
    record = {
        "said": said,
        "peers": before.get("peers", []),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "solver": solver(),
        "prefix": [prefix_reuse(model, args.cache) for model in args.models],
        "searches": [],
    }
    if not args.quick:
        for model in args.models:
            for method in args.methods:
                record["searches"] += search_cost(
                    model, method, args.sparsity, args.seeds, args.cache, earlier
                )  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "search.json").write_text(json.dumps(record, indent=1) + "\n")
    text = markdown(record)
    (args.out / "search.md").write_text(text)
    print(text)
    slow = [
        e for e in record["searches"]
        if e["reached_tokens"] is None or e["reached_tokens"] > e["evopress_tokens"] / 5
    ]  # fmt: skip
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
