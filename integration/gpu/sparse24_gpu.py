"""The 2:4 kernels on a real GPU: right results, memory and speed. Needs torch and transformers alone.

    python integration/gpu/sparse24_gpu.py --out results.json [--quick]

Run it from the repository root. It writes the JSON file after every section, and a Markdown report beside it.
``checks`` has the sections on right results, ``timings`` and ``llama`` those that measure, ``report`` the verdicts.

Exit code 0; 1 if any result is wrong; 2 without a GPU that has a 2:4 kernel. A missed target of speed or memory
is printed as FAIL and does not change the exit code.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

# Before the modules beside this one, which import the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import checks
import llama
import timings
from common import Run, describe
from report import markdown, verdicts

from msp_plugin.serving import kernels


def machine(run: Run) -> dict:
    """Return what the numbers depend on."""
    properties = torch.cuda.get_device_properties(run.device)
    packages = {}
    for name in ("nvidia-cusparselt-cu12", "nvidia-cusparselt-cu13", "triton", "transformers"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "gpu": properties.name,
        "capability": ".".join(map(str, run.capability)),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cusparselt_available": torch.backends.cusparselt.is_available(),
        "cusparselt": torch.backends.cusparselt.version(),
        "packages": packages,
        "python": platform.python_version(),
        "kernels": {str(d): run.kernels_for((4096, 4096), d) for d in kernels.DTYPES},
        "reason": kernels.choose((4096, 4096), torch.bfloat16, run.device).reason,
    }


def driver_version() -> str | None:
    """Return the driver's version, or None where its tool is missing."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return found.stdout.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return None


SECTIONS: dict[str, Callable[[Run], dict]] = {
    "machine": machine,
    "correctness": checks.correctness,
    "other_inputs": checks.other_inputs,
    "file_format": checks.file_format,
    "cuda_graphs": checks.cuda_graphs,
    "linears": timings.timed_linears,
    "host_cost": timings.host_cost,
    "compilation": checks.compilation,
    "end_to_end": llama.end_to_end,
    "smallest": checks.smallest,
}


def run_section(name: str, section: Callable[[Run], dict], run: Run, results: dict) -> None:
    """Add a section's result to the results; what a section raises is its result."""
    start = time.monotonic()
    print(f"{name} ...", flush=True)
    try:
        results[name] = section(run)
        torch.cuda.empty_cache()
    except Exception as error:  # a section that fails must not take the others' results with it
        results[name] = {"ok": False, "error": describe(error), "traceback": traceback.format_exc()}
        print(results[name]["traceback"])
    state = {True: "ok", False: "WRONG", None: ""}[results[name].get("ok")]
    print(f"{name} {state} {time.monotonic() - start:.1f} s", flush=True)


def write(results: dict, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**results, "verdicts": verdicts(results)}, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file to write; the report goes beside it"
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes, token counts and repeats")
    parser.add_argument("--minutes", type=float, default=7.5, help="leave timings out after this long")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    return parser.parse_args(argv)


def unusable() -> str | None:
    """Return why this machine cannot run the script, if it cannot."""
    if not torch.cuda.is_available():
        return f"this needs an NVIDIA GPU; torch {torch.__version__} finds no CUDA device"
    choice = kernels.choose((4096, 4096), torch.bfloat16, torch.device("cuda", torch.cuda.current_device()))
    return f"this GPU has no 2:4 kernel: {choice.reason}" if choice.kernel == "dense" else None


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if problem := unusable():
        print(problem, file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")  # float32 is the reference
    gc.freeze()  # each capture of a graph may collect garbage, and should not look at the imported modules
    device = torch.device("cuda", torch.cuda.current_device())
    deadline = time.monotonic() + 60 * args.minutes
    run = Run(args.quick, deadline, device, torch.cuda.get_device_capability(device))
    results: dict = {}
    sections = {name: part for name, part in SECTIONS.items() if not args.only or name in args.only}
    for name, section in sections.items():
        run_section(name, section, run, results)
        if name == "machine":
            print(json.dumps(results[name], indent=1))
        write(results, args.out)
    for verdict in verdicts(results):
        print(f"{'PASS' if verdict['passed'] else 'FAIL'} {verdict['target']}: {verdict['detail']}")
    return 0 if verdicts(results)[0]["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
