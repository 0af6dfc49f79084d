"""What holding kept values and a bitmask costs and saves, against dense copies, in one run.

    python integration/database_bench.py

Every level of the default menu for one matrix of random numbers, in float32 and bfloat16: bytes on disk, and the
time to read a level from the page cache, interleaved with reading (and so copying) the dense matrix.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path


def measure(dtype_name: str, rows: int, columns: int, repeats: int) -> list[dict]:
    """Return one entry per level that is not dense: bytes and seconds of both forms."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from msp_plugin.database.bitmask import pack_bitmask, unpack_bitmask
    from msp_plugin.plan.menus import DEFAULT_LEVELS, parse_menu

    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(
        getattr(torch, dtype_name)
    )
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for level in parse_menu(DEFAULT_LEVELS):
            if level.is_dense:
                continue
            rank = dense.float().abs().view(rows, -1, level.m).argsort(-1, descending=True).argsort(-1)
            weight = (dense.view(rows, -1, level.m) * (rank < level.n)).view(rows, columns)
            values, mask = pack_bitmask(weight)
            path = Path(folder) / f"{level.n}.safetensors"
            save_file({"dense": weight, "values": values, "bitmask": mask}, path)
            times: dict[str, list[float]] = {"dense": [], "packed": []}
            with safe_open(path, framework="pt") as file:
                for _ in range(repeats + 1):
                    start = time.perf_counter()
                    plain = file.get_tensor("dense").clone()
                    middle = time.perf_counter()
                    packed = unpack_bitmask(
                        file.get_tensor("values"), file.get_tensor("bitmask"), (rows, columns)
                    )
                    times["dense"].append(middle - start)
                    times["packed"].append(time.perf_counter() - middle)
                assert torch.equal(plain, packed)
            found.append({
                "dtype": dtype_name, "level": level.name, "dense_bytes": weight.nbytes,
                "packed_bytes": values.nbytes + mask.nbytes,
                **{f"{form}_seconds": statistics.median(its[1:]) for form, its in times.items()},
            })  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    record = [
        e for name in ("float32", "bfloat16") for e in measure(name, args.rows, args.columns, args.repeats)
    ]
    print(f"{args.rows} x {args.columns}\ndtype     level   bytes of dense   time of dense copy")
    for e in record:
        print(
            f"{e['dtype']:9} {e['level']:5} {e['packed_bytes'] / e['dense_bytes']:14.3f}"
            f" {e['packed_seconds'] / e['dense_seconds']:14.1f}"
        )
    for name in ("float32", "bfloat16"):
        own = [e for e in record if e["dtype"] == name]
        whole = sum(e["packed_bytes"] for e in own) / (
            sum(e["dense_bytes"] for e in own) + own[0]["dense_bytes"]
        )
        print(
            f"{name}: the default menu takes {whole:.3f} of dense copies of its levels and the dense weight"
        )
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
