"""Fuzz the readers with coverage guidance: whatever bytes a file holds, it is read or refused by one of our errors.

    pip install atheris        # Linux, x86-64; Python 3.11 to 3.13
    python integration/fuzz.py --target allocation --seconds 60
    python integration/fuzz.py --seconds 60        # every target, one after the other

The targets are those of tests/fuzz/readers.py. Each runs in a process of its own; what it fails on is left in
--keep (default: fuzz-failures) as the file that was read. Exit code 1 if a target failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Seconds after which one input counts as a hang, and the most memory that a target may take, in MiB.
HANG, MEMORY = 20, 6144
#: Drawing a page and loading a model take too long for millions of inputs; the tests cover them.
LEFT_OUT = ("built recipe", "run's page", "comparison's page", "loaded config", "loaded tokenizer")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", help="default: all")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: pip install atheris (tests/fuzz needs it not)", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    if given.inside:
        return fuzz(given.target, given.seconds, given.keep)
    from tests.fuzz.readers import READERS

    targets = [name for name in READERS if name not in LEFT_OUT]
    if given.target not in (None, *targets):
        parser.error(f"there is no target {given.target!r}; there are {', '.join(targets)}")
    given.keep.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in [given.target] if given.target else targets:
        print(f"== {name}", flush=True)
        command = [
            sys.executable,
            __file__,
            "--inside",
            "--target",
            name,
            "--keep",
            str(given.keep.resolve()),
        ]
        if subprocess.run([*command, "--seconds", str(given.seconds)], check=False).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}; see {given.keep}" if failed else "no target failed")
    return 1 if failed else 0


def fuzz(name: str, seconds: int, keep: Path) -> int:
    """Run one target; atheris ends the process."""
    import atheris

    with atheris.instrument_imports(
        include=["msp_plugin", "json", "yaml"]
    ):  # before anything else imports them
        pass
    from tests.fuzz import readers

    reader = readers.READERS[name]
    directory = Path(tempfile.mkdtemp(prefix="msp-fuzz-"))
    corpus = Path(tempfile.mkdtemp(prefix="msp-corpus-"))
    (corpus / "valid").write_bytes(beside(readers, name, directory))

    def one(content: bytes) -> None:
        readers.check(reader, directory, content)

    stem = name.replace(" ", "-").replace("'", "")
    atheris.Setup(
        [sys.argv[0], f"-max_total_time={seconds}", f"-timeout={HANG}", f"-rss_limit_mb={MEMORY}", "-max_len=20000",
         f"-artifact_prefix={keep}/{stem}-", "-print_final_stats=1", "-verbosity=0", str(corpus)],
        one,
    )  # fmt: skip
    atheris.Fuzz()
    return 0


def beside(readers, name: str, directory: Path) -> bytes:
    """Write the valid files that belong to a target's one; return the valid bytes of that one."""
    written = {
        "recipe": readers.RECIPE, "task": readers.TASK, "lines": readers.JSONL, "text": readers.JSONL,
        "allocation": json.dumps(readers.allocation_document()), "run": json.dumps(readers.run_document()),
        "comparison": json.dumps(readers.comparison_document()),
    }  # fmt: skip
    if name in written:
        if name in ("run", "comparison"):
            readers.fill(directory)
        return written[name].encode()
    import torch
    from safetensors.torch import save

    from msp_plugin.formats.bitmask import SparseBitmask
    from msp_plugin.formats.sparse24 import Sparse24Bitmask

    format = SparseBitmask() if name == "bitmask tensors" else Sparse24Bitmask()
    layers, weight = [f"model.layers.{i}.mlp.down_proj" for i in range(2)], torch.arange(16 * 32) % 2.0
    tensors = {}
    for layer in layers:
        packed = format.pack(weight.reshape(16, 32), layer)
        tensors |= {f"{layer}.{suffix}": tensor for suffix, tensor in packed.items()}
    sparsity = {"format": format.name, "targets": layers}
    config = {"model_type": "llama", "quantization_config": {"sparsity_config": sparsity}}
    content = save(tensors, metadata={"format": "pt"})
    (directory / "model.safetensors").write_bytes(content)
    (directory / "config.json").write_text(json.dumps(config))
    names = dict.fromkeys(tensors, "model.safetensors")
    manifest = {
        "schema": "msp_plugin/export", "version": 1, "format": "sparse24", "files": {}, "tensors": {}, "packed": {},
    }  # fmt: skip
    valid = {
        "tensors": content,
        "bitmask tensors": content,
        "config": json.dumps(config),
        "manifest": json.dumps(manifest),
    }
    found = valid.get(name, json.dumps({"metadata": {}, "weight_map": names}))
    return found if isinstance(found, bytes) else found.encode()


if __name__ == "__main__":
    raise SystemExit(main())
