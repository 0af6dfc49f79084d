"""Hold a bitmask checkpoint against compressed-tensors 0.14.0.1, the last version that read and wrote the layout.

    python integration/bitmask_by_compressed_tensors.py PACKED_DIR [--work DIR]

Its compressor must make our tensors from our weights, bit for bit; its reader must find our weights in the directory; and
we must unpack what it packs, on the layers of the checkpoint and on random weights of odd widths. The wheel is
downloaded and kept under --work.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

VERSION = "0.14.0.1"


def unpack_wheel(work: Path) -> Path:
    """Return a folder with the files of the old wheel."""
    folder = work / f"compressed-tensors-{VERSION}"
    if not folder.is_dir():
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", work]
        subprocess.run([*download, f"compressed-tensors=={VERSION}"], check=True)
        with zipfile.ZipFile(next(work.glob(f"compressed_tensors-{VERSION}-*.whl"))) as archive:
            archive.extractall(folder)
    return folder


def random_weights() -> dict[str, torch.Tensor]:
    """Return weights of odd sizes and types with infinities and NaN, without negative zeros."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, columns in ((2, 2), (3, 5), (7, 8), (5, 17), (16, 64)):
            for share in (0.0, 0.1, 0.5, 1.0):
                weight = torch.rand(rows, columns, generator=generator).to(dtype)
                weight[torch.rand(rows, columns, generator=generator) >= share] = 0
                weight[0, 0], weight[1, 1] = float("nan"), float("inf")
                weights[f"{dtype} [{rows}, {columns}], {share} kept"] = weight
    return weights


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packed", type=Path)
    parser.add_argument("--work", type=Path, default=Path("~/.cache/msp_plugin").expanduser())
    options = parser.parse_args()
    sys.path.insert(0, str(unpack_wheel(options.work.absolute())))
    import compressed_tensors
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskTensor
    from compressed_tensors.config import SparsityCompressionConfig

    from msp_plugin.checkpoint.checkpoint import Checkpoint
    from msp_plugin.formats.bitmask import SparseBitmask
    from msp_plugin.formats.bits import same_bits

    assert compressed_tensors.__version__ == VERSION, compressed_tensors.__file__
    checkpoint, ours = Checkpoint.open(options.packed), SparseBitmask()
    weights = {layer: checkpoint.weight(layer) for layer in checkpoint.packed}
    for layer, weight in (weights | random_weights()).items():
        theirs = BitmaskTensor.from_dense(weight).dict("x")
        packed = ours.pack(weight, layer)
        assert {f"x.{suffix}" for suffix in packed} == set(theirs)
        assert all(same_bits(tensor, theirs[f"x.{suffix}"]) for suffix, tensor in packed.items()), layer
        assert same_bits(ours.unpack({suffix: theirs[f"x.{suffix}"] for suffix in packed}, layer), weight)
        assert same_bits(BitmaskTensor(**packed).decompress(), weight), layer
    about = checkpoint.config["quantization_config"]["sparsity_config"]
    config = SparsityCompressionConfig.load_from_registry(about["format"], **about)
    reader = BaseCompressor.load_from_registry(config.format, config=config)
    found = dict(reader.decompress(str(options.packed)))
    assert found.keys() == checkpoint.dense_names.keys()
    assert all(same_bits(tensor, checkpoint.dense(name)) for name, tensor in found.items())
    print(
        f"compressed-tensors {VERSION}: {len(weights)} layers packed to the same bits, {len(found)} tensors read alike"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
