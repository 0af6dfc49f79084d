"""Load a dense or packed checkpoint as a transformers model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.packed_layers import packed_layers
from msp_plugin.errors import FormatError, ModelError, MSPError
from msp_plugin.formats.tensor_files import read_json
from msp_plugin.models.load import load_model
from msp_plugin.models.source import auto_class, check_dtype, check_source, has_config
from msp_plugin.runtime.files import expanded
from msp_plugin.structure.halves import FAMILIES
from msp_plugin.structure.small_model import as_usual, plain_config, shrink, small_class
from msp_plugin.structure.widths import KEY, read_widths

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)


def load(
    source: str | Path,
    dtype: str = "auto",
    *,
    checksums: bool = True,
    trust_remote_code: bool = False,
    offload: bool = False,
    cache: str | None = None,
) -> PreTrainedModel:
    """Return the causal language model of a directory or hub id, in eval mode on the CPU.

    A packed checkpoint becomes a dense model with the same weights, bit for bit; weights in int8 are rounded once, to the
    model's dtype. One of ``msp export --to small``
    becomes a model of transformers' own class whose blocks have different widths.

    Args:
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        checksums: first compare the files with the checksums in export.json, if there is one.
        trust_remote_code: run the model repository's code.
        offload: leave the weights of a dense checkpoint on disk (see load_model).
        cache: the directory for offloaded weights that change; None is the default cache.

    Raises:
        ModelError: there is no such model, transformers cannot load it, or ``offload`` is given for a packed one.
        FormatError: files are damaged, or config and tensors contradict each other.
    """
    path = local_directory(source, trust_remote_code)
    if path is None:
        return load_model(source, dtype, trust_remote_code=trust_remote_code, offload=offload, cache=cache)
    packed = is_packed(path)
    if packed or any(path.glob("*.safetensors")):  # a dense config over packed tensors is refused here
        checkpoint = Checkpoint.open(path)
        if checksums:
            checkpoint.check_files()
        check_source(path)
        if packed and offload:
            raise ModelError(
                f"{source} is packed, and only dense checkpoints can stay on disk",
                hint="msp export it --to dense first",
            )
        if packed:
            target = check_dtype(dtype)
            return from_tensors(
                checkpoint, dtype, trust_remote_code, lambda _: _in_memory(checkpoint, target)
            )
        if (widths := read_widths(checkpoint.config, str(path / "config.json"))) is not None:
            config = plain_config(checkpoint.config)
            kind = small_class(config, widths)
            model = load_model(path, dtype, offload=offload, cache=cache, config=config, kind=kind)
            as_usual(model)
            return model
    return load_model(path, dtype, trust_remote_code=trust_remote_code, offload=offload, cache=cache)


def check_weights(source: str | Path) -> None:
    """Raise unless the safetensors files of a directory are whole and fit its config; others and hub ids pass.

    Raises:
        FormatError: see Checkpoint.open and Checkpoint.check_files.
    """
    path = expanded(source)
    if any(path.glob("*.safetensors")):
        Checkpoint.open(path).check_files()


def is_packed(source: str | Path) -> bool:
    """Return True if a directory holds a packed checkpoint; False for a dense one and for a hub id.

    Raises:
        FormatError: its config is damaged.
    """
    file = expanded(source) / "config.json"
    return file.is_file() and packed_layers(read_json(file), str(file)) is not None


def local_directory(source: str | Path, trust_remote_code: bool) -> Path | None:
    """Return a model's directory; a packed or smaller model of the hub is downloaded, for other hub ids None is returned."""
    path = expanded(source)
    if has_config(path):
        return path
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig

    check_source(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).to_dict()
        log.info("loading %s from the hub or its cache", source)  # the command shows it: 15 GB take a while
        smaller = config.get(KEY) and config.get("model_type") in FAMILIES
        if packed_layers(config, str(source)) is None and not smaller:
            return None
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", *(["*.py"] if trust_remote_code else [])]
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except MSPError:
        raise
    except Exception as error:  # a config's values reach all of transformers
        raise ModelError(
            f"cannot load {source}: {error}", hint="give a model's directory or a hub id"
        ) from error


def from_tensors(
    checkpoint: Checkpoint,
    dtype: str,
    trust_remote_code: bool,
    tensors: Callable[[PreTrainedModel], Mapping[str, torch.Tensor]],
    prepare: Callable[[PreTrainedModel], None] | None = None,
) -> PreTrainedModel:
    """Return the model of a packed checkpoint with the given tensors, in eval mode.

    Args:
        dtype: as for ``load``.
        tensors: returns them by their names in the checkpoint, given the model without weights.
        prepare: changes the model's modules before its tensors are loaded; the model is on the meta device.

    Raises:
        ModelError: transformers cannot load it.
        FormatError: a tensor is missing, or the model has no place for one.
    """
    from transformers import AutoConfig, GenerationConfig

    target, widths = check_dtype(dtype), read_widths(checkpoint.config, str(checkpoint.path / "config.json"))
    try:
        if widths is None:
            named = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
            config = copy.deepcopy(named)
        else:
            config = plain_config(checkpoint.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):  # its class may be the repository's own
            empty = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        cls = type(empty)
        steps: list[Callable[[PreTrainedModel], None]] = []
        steps += [] if widths is None else [partial(shrink, widths=widths)]
        steps += [] if prepare is None else [prepare]
        loader: Any = _prepared(cls, steps) if steps else cls
        model, report = loader.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors(empty)),
            output_loading_info=True,
            dtype=target if target is not None else _dtype_of(checkpoint, config),
        )
        model.__class__ = cls
        if (checkpoint.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    except MSPError:
        raise
    except Exception as error:  # a config's values reach all of transformers
        raise ModelError(f"cannot load a causal language model from {checkpoint.path}: {error}") from error
    return _complete(model, report, checkpoint)


def _prepared(
    cls: type[PreTrainedModel], steps: Sequence[Callable[[PreTrainedModel], None]]
) -> type[PreTrainedModel]:
    """Return a class of models that are changed before ``from_pretrained`` loads their tensors."""

    def init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        for prepare in steps:
            prepare(self)

    prepared = type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})
    return cast("type[PreTrainedModel]", prepared)


def _in_memory(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return the tensors of the dense form as copies in memory, none mapped from a file; ``dtype`` as for ``dense``."""
    packed = {name for name, layer in checkpoint.dense_names.items() if layer is not None}
    return {name: t if name in packed else t.clone() for name, t in checkpoint.dense_tensors(dtype)}


def _dtype_of(checkpoint: Checkpoint, config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype that the config names; without one, the dtype of the weights."""
    named = getattr(config, "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    return checkpoint.dense_info(f"{checkpoint.packed[0]}.weight").dtype


def _complete(model: PreTrainedModel, report: dict[str, Any], checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the model in eval mode.

    Raises:
        FormatError: a weight did not come from the checkpoint, or a tensor of the checkpoint was not used.
    """
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or unexpected:
        named = [f"no {name}" for name in missing[:3]] + [f"{name} has no place" for name in unexpected[:3]]
        raise FormatError(
            f"{checkpoint.path} does not hold the tensors of {type(model).__name__}: {'; '.join(named)}",
            hint="config.json and tensors are from different models",
        )
    model.train(False)
    return model
