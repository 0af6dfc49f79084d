"""Exports: a checkpoint brought into another form, tensor by tensor, in a new directory."""

from __future__ import annotations

import itertools
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from msp_plugin.checkpoint.card import model_card
from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.manifest import MANIFEST_FILE, Manifest, describe_files
from msp_plugin.checkpoint.packing import pack_layer, sparsity_config
from msp_plugin.errors import FormatError, ModelError, OutputError, RecipeError
from msp_plugin.formats.sparse24 import packed_bytes
from msp_plugin.formats.tensor_files import INDEX, ShardWriter
from msp_plugin.plan.allocation import ALLOCATION_FILE
from msp_plugin.progress import Progress, silent
from msp_plugin.records.run import RUN_FILE
from msp_plugin.runtime.digests import versions
from msp_plugin.runtime.disk import check_free, writing
from msp_plugin.runtime.files import output_directory, write_json, write_text
from msp_plugin.runtime.locks import sole_output

log = logging.getLogger(__name__)

#: Weights in other formats, and what an export writes itself; all other files are kept.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
CARD_FILE = "README.md"
_REWRITTEN = ("config.json", INDEX, MANIFEST_FILE)


@dataclass(frozen=True)
class Exporter(ABC):
    """Brings a checkpoint into another form. Fields are the options of ``msp export --set``."""

    name: ClassVar[str]

    def check(self, source: Checkpoint) -> None:  # noqa: B027 - not every exporter has something to refuse
        """Raise if the checkpoint cannot be exported so; nothing was written yet."""

    @abstractmethod
    def size(self, source: Checkpoint) -> int:
        """Return about how many bytes the export will take."""

    @abstractmethod
    def write(self, source: Checkpoint, directory: Path, progress: Progress) -> Manifest:
        """Write the export's files into an empty directory; return what was written."""


def export_checkpoint(
    source: str | Path, exporter: Exporter, out: str | Path, *, progress: Progress = silent
) -> Manifest:
    """Export a checkpoint's directory into a new one, which appears whole or not at all.

    Raises:
        MSPError: the source is damaged, cannot be exported so, or the output cannot be written.
    """
    with sole_output(out) as path:
        opened = Checkpoint.open(source)
        if path.is_relative_to(opened.path.resolve()):
            raise OutputError(f"{path} is inside {opened.path}", hint="give a directory outside of it")
        opened.check_files()
        exporter.check(opened)
        check_free(path, exporter.size(opened), "the export takes", "give a directory on another disk")
        with writing(path), output_directory(path) as temporary:
            manifest = exporter.write(opened, temporary, progress)
            manifest.write(temporary)
    log.info("export %s: %d files in %s", exporter.name, len(manifest.files), path)
    return manifest


@dataclass(frozen=True)
class Sharded(Exporter):
    """An export of tensors into files of a bounded size.

    Args:
        shard_bytes: size at which a new file is begun.
    """

    shard_bytes: int = 5 * 10**9

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise RecipeError(f"shard_bytes = {self.shard_bytes}", hint="give at least 1")


@dataclass(frozen=True)
class Dense(Sharded):
    """Plain dense safetensors with zeros, bit for bit the weights of either form."""

    name = "dense"

    def size(self, source: Checkpoint) -> int:
        return sum(_dense_bytes(source, name) for name in source.dense_names)

    def write(self, source: Checkpoint, directory: Path, progress: Progress) -> Manifest:
        sizes = {name: _dense_bytes(source, name) for name in source.dense_names}
        config = dict(source.config)
        if source.packed:
            config.pop("quantization_config")
        return _write(
            self.name, source, directory, config, sizes, source.dense_tensors(), self.shard_bytes, progress
        )


@dataclass(frozen=True)
class Sparse24(Sharded):
    """Servable layers packed as two of four weights and a bitmask; all else dense.

    The layers are those whose level runs on 2:4 kernels (allocation.json), or, without one, those whose weights
    are 2:4. Layers that inference fuses are packed all or none.
    """

    name = "sparse24"

    def check(self, source: Checkpoint) -> None:
        if source.packed:
            raise FormatError(f"{source.path} is packed already", hint="it can be served as it is")
        if source.quantization is not None:
            said = source.quantization
            method = said.get("quant_method") if isinstance(said, dict) else said
            raise FormatError(
                f"{source.path} is quantized ({method})",
                hint="sparse24 packs unquantized weights; export before quantizing, or serve it as it is",
            )
        if not source.packing.packed:
            reasons = sorted(set(source.packing.dense.values()))
            raise FormatError(
                f"{source.path} has no layer that 2:4 kernels could run: {'; '.join(reasons[:3]) or 'no layers'}",
                hint="prune with servable levels: levels servable, or names such as 2:4 and 2:8",
            )

    def size(self, source: Checkpoint) -> int:
        return sum(self._sizes(source, source.packing.packed).values())

    def write(self, source: Checkpoint, directory: Path, progress: Progress) -> Manifest:
        choice = source.packing
        sizes, signs = self._sizes(source, choice.packed), {}
        config = dict(source.config)
        config["quantization_config"] = sparsity_config(source.tensors, choice)
        tensors = self._tensors(source, choice.packed, signs)
        dense_bytes = sum(source.tensors[f"{layer}.weight"].bytes for layer in choice.packed)
        stored = sum(_packed_size(source, layer) for layer in choice.packed)
        manifest = _write(
            self.name, source, directory, config, sizes, tensors, self.shard_bytes, progress,
            packed=choice.packed, kept_dense=choice.dense, packed_bytes=stored, dense_bytes=dense_bytes,
            negative_zeros=signs,
        )  # fmt: skip
        if signs:
            log.info("%d negative zeros became positive", sum(signs.values()))
        return manifest

    def _sizes(self, source: Checkpoint, packed: Mapping[str, str]) -> dict[str, int]:
        sizes = {}
        for name, info in source.tensors.items():
            layer = name.removesuffix(".weight")
            if layer != name and layer in packed:
                rows, columns = info.shape
                sizes[f"{layer}.compressed"] = rows * columns // 2 * info.dtype.itemsize
                sizes[f"{layer}.bitmask"] = rows * -(-columns // 8)
                sizes[f"{layer}.shape"] = 16
            else:
                sizes[name] = info.bytes
        return sizes

    def _tensors(
        self, source: Checkpoint, packed: Mapping[str, str], signs: dict[str, int]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name in source.tensors:
            layer = name.removesuffix(".weight")
            tensor = source.tensors.read(name)
            if layer == name or layer not in packed:
                yield name, tensor
                continue
            stored, count = pack_layer(tensor, layer)
            if count:
                signs[layer] = count
            del tensor
            yield from stored.tensors(layer).items()


def _packed_size(source: Checkpoint, layer: str) -> int:
    info = source.tensors[f"{layer}.weight"]
    return packed_bytes((info.shape[0], info.shape[1]), info.dtype.itemsize)


def _dense_bytes(source: Checkpoint, name: str) -> int:
    layer = source.dense_names[name]
    return source.tensors[name].bytes if layer is None else 2 * source.tensors[f"{layer}.compressed"].bytes


def _write(
    kind: str,
    source: Checkpoint,
    directory: Path,
    config: dict[str, Any],
    sizes: Mapping[str, int],
    tensors: Iterator[tuple[str, torch.Tensor]],
    shard_bytes: int,
    progress: Progress,
    **about: Any,
) -> Manifest:
    """Write tensors, config, card and the source's other files; return the manifest."""
    source.allocation  # noqa: B018 - an allocation of another model fails here, before anything is written
    writer, shapes = ShardWriter(directory, sizes, shard_bytes), {}
    for i, (name, tensor) in enumerate(tensors, 1):
        shapes[name] = list(tensor.shape)
        writer.add(name, tensor)
        progress(i, len(sizes))
    files = writer.finish()
    copy_other_files(source.path, directory)
    write_json(directory / "config.json", config)
    records = [directory / name for name in (INDEX, "config.json", ALLOCATION_FILE, RUN_FILE)]
    described = describe_files([*files, *(file for file in records if file.is_file())])
    manifest = Manifest(kind, described, shapes, versions=versions(), **about)
    write_text(directory / CARD_FILE, model_card(source, manifest))
    return manifest


def copy_other_files(source: Path, directory: Path) -> None:
    """Copy what is no weight and is not written anew: tokenizer, records, code, whatever is there.

    Links are followed, hidden files left out. A model card of the source becomes ``README.source.md``.
    """
    for file in sorted(source.iterdir()):
        if file.name.startswith(".") or file.name in _REWRITTEN or file.suffix in _NOT_COPIED:
            continue
        if file.name.endswith(".index.json"):
            continue
        ours = file.name == CARD_FILE and (source / MANIFEST_FILE).is_file()
        if ours:
            continue
        target = directory / (_card_name(source) if file.name == CARD_FILE else file.name)
        try:
            if file.is_dir():
                left_out = shutil.ignore_patterns(".*", *(f"*{suffix}" for suffix in _NOT_COPIED))
                shutil.copytree(file, target, ignore=left_out)
            else:
                shutil.copyfile(file, target)
        except OSError as error:
            raise ModelError(f"cannot copy {file}: {error}") from error


def _card_name(source: Path) -> str:
    """Return a name for the source's model card that no other file of it has."""
    names = itertools.chain(["README.source.md"], (f"README.source-{i}.md" for i in itertools.count(2)))
    return next(name for name in names if not (source / name).exists())
