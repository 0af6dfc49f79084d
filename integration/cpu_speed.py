"""Products with packed weights on a CPU against torch's dense product, and whole models against their dense form.

    python integration/cpu_speed.py [--out integration/results/cpu_speed] [--quick]

Each ratio is of one process: dense and packed calls alternate. Two times are kept of each: the least wall time, and
the median CPU time of the process. Nothing else may run on the machine: a thread that waits for one that has lost its
core makes a step of many small products much longer. Packed weights lie in huge pages, as served ones do. The
roofline is the bytes of the packed weight over the rate at which this machine copies memory, measured in the same
process. Models: SmolLM2 (--model) pruned by magnitude, and a random Llama. Matrices, and models, that a run does not
measure stay as the results have them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear as dense_linear

from msp_plugin.serving.bench import BenchOptions, bench, processor
from msp_plugin.serving.cpu.kernel import KERNELS, choose, linear, pack_dense
from msp_plugin.serving.cpu.memory import in_huge_pages

SHAPES = ((4096, 4096), (4096, 14336), (1536, 576))
LEVELS = ((2, 4), (3, 8), (2, 8), (1, 8))
BATCHES = (1, 2, 4, 8, 16, 64, 512)
#: Least ratio to dense by batch, at 2:4 and beyond.
GOALS = {1: (1.5, 2.0), 2: (1.5, 2.0), 4: (1.5, 2.0)}
LEAST = 0.9
#: Names of models in the table; any other source is SmolLM2.
NAMES = {"random": "random Llama, 1 B"}
#: Least ratio to dense of a whole model's decoding at batch 1.
DECODING = {"2:4": 1.3, "3:8": 1.5, "2:8": 1.8}


def pruned(rows: int, columns: int, kept: int, of: int, dtype: torch.dtype) -> torch.Tensor:
    """Return random weights that keep ``kept`` of every ``of``."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns // of, of, generator=generator)
    places = torch.rand(weight.shape, generator=generator).topk(kept, dim=-1).indices
    return (
        torch.zeros_like(weight).scatter_(-1, places, weight.gather(-1, places)).view(rows, columns).to(dtype)
    )


def copy_rate() -> float:
    """Return bytes read and written per second when 256 MiB are copied."""
    source = torch.ones(2**28, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = alternating({"copy": lambda: target.copy_(source)}, 5)["copy"]
    return 2 * source.numel() / min(wall for wall, _ in times)


def alternating(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Return (wall, CPU) seconds of each call, one call after the other in turn; the first turn does not count."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            wall, used = time.perf_counter(), time.process_time()
            call()
            used, wall = time.process_time() - used, time.perf_counter() - wall
            if turn:
                times[name].append((wall, used))
    return times


def measure_matrix(
    shape: tuple[int, int],
    level: tuple[int, int],
    batches: tuple[int, ...],
    kernels: list[str],
    seconds: float,
) -> list[dict[str, Any]]:
    """Return a row for each batch and kernel: milliseconds, and dense over packed."""
    rate, rows = copy_rate(), []
    weight = pruned(*shape, *level, torch.bfloat16)
    dense, packed = torch.randn(shape).to(torch.bfloat16), in_huge_pages(pack_dense(weight))
    for batch in batches:
        x = torch.randn(batch, shape[1]).to(torch.bfloat16)
        calls: dict[str, Callable[[], object]] = {"dense": lambda x=x: dense_linear(x, dense)}
        calls |= {k: lambda x=x, k=k: linear(x, packed, k) for k in kernels}
        once = sum(min(wall for wall, _ in t) for t in alternating(calls, 1).values())
        times = alternating(calls, max(3, min(40, int(seconds / once))))
        least = {name: min(wall for wall, _ in t) for name, t in times.items()}
        used = {name: statistics.median(u for _, u in t) for name, t in times.items()}
        for kernel in kernels:
            rows.append(
                {
                    "shape": list(shape), "level": f"{level[0]}:{level[1]}", "batch": batch, "kernel": kernel,
                    "threads": torch.get_num_threads(), "dense_ms": 1e3 * least["dense"],
                    "packed_ms": 1e3 * least[kernel], "ratio": least["dense"] / least[kernel],
                    "cpu_ratio": used["dense"] / used[kernel], "turns": len(times[kernel]),
                    "roofline_ms": 1e3 * packed.bytes / rate, "dense_roofline_ms": 1e3 * dense.nbytes / rate,
                    "load": os.getloadavg()[0],
                }
            )  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def prune_model(source: str, out: Path, kept: int, of: int) -> None:
    """Write a model pruned by magnitude to out/dense, and packed in the bitmask format to out/packed.

    ``source`` may be "random".
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from msp_plugin.checkpoint.export import export_checkpoint
    from msp_plugin.checkpoint.packed_export import Bitmask

    if source == "random":  # 1.0 B weights, 0.97 B of them in linears of the blocks
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
            num_key_value_heads=4, vocab_size=8192, dtype=torch.bfloat16,
        )  # fmt: skip
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with torch.no_grad():
        for block in model.model.layers:
            for module in block.modules():
                if isinstance(module, torch.nn.Linear):
                    groups = module.weight.view(len(module.weight), -1, of)
                    places = groups.abs().topk(kept, dim=-1).indices
                    groups.mul_(torch.zeros_like(groups).scatter_(-1, places, 1.0))
    model.save_pretrained(out / "dense")
    export_checkpoint(out / "dense", Bitmask(), out / "packed")


def share_of_linears(path: Path) -> dict[str, float]:
    """Return milliseconds of one decoding step of a packed model, and of its packed linears alone."""
    from msp_plugin.serving.cpu.linear import PackedLinear
    from msp_plugin.serving.load import load

    model = load(path, packed=True, checksums=False)
    linears = [m for m in model.modules() if isinstance(m, PackedLinear)]
    inputs = {m.in_features: torch.randn(1, m.in_features).to(model.dtype) for m in linears}
    with torch.no_grad():
        out = model(torch.tensor([[1, 2, 3]]), use_cache=True)
        token = torch.tensor([[4]])
        calls: dict[str, Callable[[], object]] = {
            "step": lambda: model(token, past_key_values=out.past_key_values, use_cache=True),
            "linears": lambda: [m(inputs[m.in_features]) for m in linears],
        }
        times = alternating(calls, 7)
    used = {name: 1e3 * statistics.median(u for _, u in t) for name, t in times.items()}
    return {"step_cpu_ms": used["step"], "linears_cpu_ms": used["linears"]}


def measure_model(
    source: str, level: tuple[int, int], options: BenchOptions, vllm: Path | None, rounds: int
) -> dict[str, Any]:
    """Return ``msp bench`` of a model at one level, what share of a step its packed linears take, and vLLM's speeds."""
    with tempfile.TemporaryDirectory() as scratch:
        dense, packed = Path(scratch) / "dense", Path(scratch) / "packed"
        prune_model(source, Path(scratch), *level)
        found = {**bench(packed, options).to_dict(), **share_of_linears(packed)}
        if vllm:
            command = [
                str(vllm / "bin/python"), str(Path(__file__).parent / "vllm/speed.py"), f"dense={dense}", f"packed={packed}",
                "--prompt", str(options.prompt), "--tokens", "65", "--rounds", str(rounds),
            ]  # fmt: skip
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found["vllm"] = json.loads(done.stdout)["speeds"]["packed"]["1"]
        return {**found, "model": NAMES.get(source, "SmolLM2-135M"), "level": f"{level[0]}:{level[1]}"}


def markdown(results: dict[str, Any]) -> str:
    """Return the results as tables."""
    machine = results["machine"]
    lines = [
        "# Packed weights on a CPU", "",
        f"`python integration/cpu_speed.py` on {machine['processor']}, torch {machine['torch']}; the load average was "
        f"{machine['load'][0]:.1f} at the start and {machine['load'][1]:.1f} at the end (other work on two cores "
        "disturbs wall times). Ratios are dense over packed, above 1 faster than torch's dense bfloat16 product in "
        "the same process: of the least wall times, and of the medians of CPU time. Roofline: bytes over the rate at "
        f"which the machine copies ({machine['copy_rate'] / 1e9:.1f} GB/s read and written).", "",
        "| shape | level | batch | threads | kernel | dense ms | packed ms | ratio | CPU-time ratio | roofline ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in results["matrices"]:
        lines.append(
            f"| {r['shape'][0]} x {r['shape'][1]} | {r['level']} | {r['batch']} | {r['threads']} | {r['kernel']} | "
            f"{r['dense_ms']:.2f} | {r['packed_ms']:.2f} | {r['ratio']:.2f} | {r['cpu_ratio']:.2f} | {r['roofline_ms']:.2f} |"
        )
    lines += [
        "", "| model | level | decode, packed | decode, dense | ratio | prefill ratio | bytes ratio | resident over "
        "bytes | packed linears' share of a step | vLLM: decode ratio | vLLM: prefill ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for m in results["models"]:
        served = [f"{m['vllm'][step]['ratio']:.2f}" if "vllm" in m else "" for step in ("decode", "prefill")]
        lines.append(
            f"| {m['model']} | {m['level']} | {m['own']['decode']:.1f} tokens/s | {m['other']['decode']:.1f} tokens/s | "
            f"{m['ratios']['decode']:.2f} | {m['ratios']['prefill']:.2f} | {m['ratios']['bytes']:.2f} | "
            f"{m['own']['resident'] / m['own']['bytes']:.3f} | {m['linears_cpu_ms'] / m['step_cpu_ms']:.2f} | "
            f"{' | '.join(served)} |"
        )
    lines += ["", f"Below their goals: {', '.join(results['below']) or 'none'}.", ""]
    return "\n".join(lines)


def below(results: dict[str, Any]) -> list[str]:
    """Return the cells of the machine's own kernel, and the models, that are under the goals."""
    found = []
    for m in results["models"]:
        ratios = {"transformers": m["ratios"]["decode"]}
        ratios |= {"vLLM": m["vllm"]["decode"]["ratio"]} if "vllm" in m else {}
        found += [f"{m['model']} {m['level']} in {k}" for k, v in ratios.items() if v < DECODING[m["level"]]]
    for r in results["matrices"]:
        goal = GOALS.get(r["batch"], (LEAST, LEAST))[r["level"] != "2:4" and r["level"] != "3:8"]
        if r["kernel"] == choose(torch.bfloat16).kernel and r["shape"] != [1536, 576] and r["ratio"] < goal:
            found.append(
                f"{r['shape'][0]} x {r['shape'][1]} {r['level']} batch {r['batch']} ({r['threads']} threads)"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_speed")
    parser.add_argument("--model", help="SmolLM2's directory, which smollm2.py has made: its model")
    parser.add_argument("--random", action="store_true", help="a random Llama of 1 B weights too")
    parser.add_argument(
        "--vllm", type=Path, help="the environment of vLLM, with msp_plugin in it: models there as well"
    )
    parser.add_argument("--rounds", type=int, default=2, help="of each model's measurement in vLLM")
    parser.add_argument(
        "--levels", nargs="+", default=list(DECODING), choices=list(DECODING), help="of models"
    )
    parser.add_argument("--matrices", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each cell")
    parser.add_argument("--quick", action="store_true", help="fewer cells")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    own, load_before, matrices = choose(torch.bfloat16).kernel, os.getloadavg()[0], []
    shapes, levels, batches = SHAPES, LEVELS, BATCHES
    if arguments.quick:
        shapes, levels, batches = SHAPES[:1], LEVELS[::2], (1, 4, 16, 64, 512)
    if not arguments.matrices:
        shapes = ()
    for threads, shape, level in itertools.product(arguments.threads, shapes, levels):
        torch.set_num_threads(threads)
        matrices += measure_matrix(shape, level, batches, [own], arguments.seconds)
    others = [k for k in KERNELS if k != own and torch.ops.msp_plugin.cpu_supports(k)]
    torch.set_num_threads(max(arguments.threads))
    if arguments.matrices:
        matrices += measure_matrix(SHAPES[0], (2, 4), (1, 4, 16), others, arguments.seconds)
    write_results(arguments.out, matrices, [], load_before)
    sources = [*([arguments.model] if arguments.model else []), *(["random"] if arguments.random else [])]
    for source, level in itertools.product(sources, arguments.levels):
        kept, _, of = level.partition(":")
        options = BenchOptions(prompt=128, tokens=16)
        found = measure_model(source, (int(kept), int(of)), options, arguments.vllm, arguments.rounds)
        write_results(arguments.out, [], [found], load_before)
    print(arguments.out.with_suffix(".md").read_text())


def write_results(
    out: Path, matrices: list[dict[str, Any]], models: list[dict[str, Any]], load: float
) -> None:
    """Write the results, with what was not measured now as it stands there.

    Args:
        load: the machine's load average when the script began.
    """
    file = out.with_suffix(".json")
    known = json.loads(file.read_text()) if file.exists() else {"matrices": [], "models": []}
    by_name = {(m["model"], m["level"]): m for m in [*known["models"], *models]}
    results = {
        "machine": {
            "processor": processor(), "torch": torch.__version__, "copy_rate": copy_rate(), "load": [load, os.getloadavg()[0]],
        },
        "matrices": matrices or known["matrices"], "models": list(by_name.values()),
    }  # fmt: skip
    results["below"] = below(results)
    file.write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    main()
