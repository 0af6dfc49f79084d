"""Fuzz the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, without torch: see cpu_fuzz.cpp.

python integration/cpu_fuzz.py [--seconds 60] [--seed 0]
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import msp_plugin

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    "-O1", "-g", "-std=c++20", "-fno-omit-frame-pointer", "-Wno-psabi", "-Wno-unknown-pragmas",
    "-fsanitize=address,bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    kernels = Path(msp_plugin.__file__).parent / "serving" / "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "cpu_fuzz"
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        subprocess.run([*compiler, *FLAGS, f"-I{kernels}", str(SOURCE), "-o", str(program)], check=True)
        done = subprocess.run([str(program), str(arguments.seconds), str(arguments.seed)], check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
