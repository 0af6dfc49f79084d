"""Export a checkpoint: write it in another form, tensor by tensor, into a new directory."""

from __future__ import annotations

import itertools
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from msp_plugin.checkpoint.card import model_card
from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.manifest import MANIFEST_FILE, Manifest, describe_files
from msp_plugin.errors import ModelError, MSPError, OutputError, RecipeError
from msp_plugin.formats.base import PackedFormat
from msp_plugin.formats.tensor_files import INDEX, ShardWriter
from msp_plugin.plan.allocation import ALLOCATION_FILE
from msp_plugin.plan.levels import Level
from msp_plugin.progress import Progress, silent
from msp_plugin.records.parts import BENCH_FILE
from msp_plugin.records.run import RUN_FILE
from msp_plugin.runtime.digests import versions
from msp_plugin.runtime.disk import check_free, writing
from msp_plugin.runtime.files import output_directory, write_json, write_text
from msp_plugin.runtime.locks import sole_output

log = logging.getLogger(__name__)

#: Files with weights; an export writes its own and copies all other files.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
CARD_FILE = "README.md"
#: In a smaller model, the allocation of the model that it was cut from.
SOURCE_ALLOCATION_FILE = "allocation.source.json"
#: Files that an export writes anew, and the measured speed, which is the source's.
_NOT_COPIED_FILES = ("config.json", INDEX, MANIFEST_FILE, BENCH_FILE)


@dataclass(frozen=True)
class Exporter(ABC):
    """Writes a checkpoint in another form. Fields are the options of ``msp export --set``."""

    name: ClassVar[str]
    #: A search for this form (``form`` of a recipe) chooses from this menu, in units of this granularity, unless told otherwise.
    menu: ClassVar[str] = "default"
    granularity: ClassVar[str | None] = None

    @property
    def packed_format(self) -> PackedFormat | None:
        """The format in which layers are packed; None where all stay dense."""
        return None

    def check_menu(self, menu: Sequence[Level], granularity: str) -> None:  # noqa: B027 - most forms hold any level
        """Raise RecipeError if an allocation of these levels, to units of a granularity, might not fit this form."""

    def check_model(self, model: torch.nn.Module, menu: Sequence[Level], granularity: str) -> None:  # noqa: B027
        """Raise ModelError if a model, pruned to levels that ``check_menu`` has passed, might not fit this form."""

    def check(self, source: Checkpoint) -> None:  # noqa: B027 - not every exporter has something to refuse
        """Raise an MSPError if the checkpoint cannot be exported in this form; nothing was written yet."""

    @abstractmethod
    def size(self, source: Checkpoint) -> int:
        """Return about how many bytes the export will take."""

    @abstractmethod
    def write(self, source: Checkpoint, directory: Path, progress: Progress) -> Manifest:
        """Write the export's files into an empty directory, and return their manifest."""


def export_checkpoint(
    source: str | Path, exporter: Exporter, out: str | Path, *, progress: Progress = silent
) -> Manifest:
    """Export a checkpoint's directory into a new one, which appears whole or not at all; return its manifest.

    Raises:
        MSPError: the source is damaged or cannot take this form, or the output cannot be written.
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


def allowed_forms(source: str | Path, exporters: Iterable[Exporter]) -> dict[str, dict[str, Any]]:
    """Return for each exporter ``bytes``, the approximate size of its export, or why it is ``refused`` and a ``hint``.

    What does not apply is None. Reads weights; writes nothing.

    Raises:
        MSPError: the source is no checkpoint, or damaged.
    """
    opened = Checkpoint.open(source)
    opened.check_files()
    forms: dict[str, dict[str, Any]] = {}
    for exporter in exporters:
        try:
            exporter.check(opened)
            forms[exporter.name] = {"bytes": exporter.size(opened), "refused": None, "hint": None}
        except MSPError as error:
            forms[exporter.name] = {"bytes": None, "refused": error.message, "hint": error.hint}
    return forms


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
    """Plain dense safetensors with zeros: the weights of a dense or packed checkpoint, bit for bit."""

    name = "dense"

    def size(self, source: Checkpoint) -> int:
        return sum(self._sizes(source).values())

    def write(self, source: Checkpoint, directory: Path, progress: Progress) -> Manifest:
        config = dict(source.config)
        if source.packed:
            config.pop("quantization_config")
        tensors = Tensors(self._sizes(source), source.dense_tensors())
        return write_export(self, source, directory, config, tensors, progress, lambda: rounding(source))

    def _sizes(self, source: Checkpoint) -> dict[str, int]:
        return {name: source.dense_info(name).bytes for name in source.dense_names}


def rounding(source: Checkpoint, renamed: Callable[[str], str | None] = str) -> dict[str, Any]:
    """Return what the manifest of a rounded checkpoint says of its layers, for that of an export of its weights.

    Args:
        renamed: a tensor's name in the export, None if it is not there.
    """
    if source.manifest is None or not source.rounded:
        return {}
    names = {layer: renamed(f"{layer}.weight") for layer in source.manifest.quantization_errors}
    return {
        key: {
            name.removesuffix(".weight"): values[layer]
            for layer, name in names.items()
            if name and layer in values
        }
        for key, values in (
            ("quantization_errors", source.manifest.quantization_errors),
            ("rounded_to_zero", source.manifest.rounded_to_zero),
        )
    }


@dataclass(frozen=True)
class Tensors:
    """The tensors of an export, made one at a time.

    Args:
        sizes: by name, in order, at least the bytes of each tensor.
        made: yields (name, tensor) in that order.
    """

    sizes: Mapping[str, int]
    made: Iterator[tuple[str, torch.Tensor]]


def write_export(
    exporter: Sharded,
    source: Checkpoint,
    directory: Path,
    config: dict[str, Any],
    tensors: Tensors,
    progress: Progress,
    about: Callable[[], Mapping[str, Any]] = dict,
) -> Manifest:
    """Write tensors, config, card and the source's other files; return the manifest.

    Args:
        config: the contents of the export's config.json.
        about: returns further fields of the manifest; called after the last tensor.
    """
    source.allocation  # noqa: B018 - raises for another model's allocation before anything is written
    writer, shapes = ShardWriter(directory, tensors.sizes, exporter.shard_bytes), {}
    for i, (name, tensor) in enumerate(tensors.made, 1):
        shapes[name] = list(tensor.shape)
        writer.add(name, tensor)
        progress(i, len(tensors.sizes))
    files = writer.finish()
    copy_other_files(source.path, directory)
    details = about()
    if details.get("structure") and (directory / ALLOCATION_FILE).is_file():  # its layers have other shapes
        (directory / ALLOCATION_FILE).rename(directory / SOURCE_ALLOCATION_FILE)
    write_json(directory / "config.json", config)
    names = (INDEX, "config.json", ALLOCATION_FILE, SOURCE_ALLOCATION_FILE, RUN_FILE)
    records = [directory / name for name in names]
    described = describe_files([*files, *(file for file in records if file.is_file())])
    if source.manifest is not None:  # a smaller model stays one, packed or not
        details = {"structure": source.manifest.structure, **details}
    manifest = Manifest(exporter.name, described, shapes, versions=versions(), **details)
    write_text(directory / CARD_FILE, model_card(source, manifest, exporter.packed_format))
    return manifest


def copy_other_files(source: Path, directory: Path) -> None:
    """Copy all files but weights and those that an export writes itself: tokenizer, records, code.

    Links are followed, hidden files left out. The source's model card becomes ``README.source.md``.
    """
    for file in sorted(source.iterdir()):
        if file.name.startswith(".") or file.name in _NOT_COPIED_FILES or file.suffix in _NOT_COPIED:
            continue
        if file.name.endswith(".index.json"):
            continue
        if file.name == CARD_FILE and (source / MANIFEST_FILE).is_file():  # the card of an earlier export
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
