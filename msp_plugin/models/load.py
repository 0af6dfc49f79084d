"""Load a model from a directory or hub id, on the CPU or with its weights on disk."""

from __future__ import annotations

import importlib.util
import logging
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from msp_plugin.errors import ModelError
from msp_plugin.models.source import auto_class, check_dtype, check_source
from msp_plugin.runtime.disk import FULL, cannot_write, disk_errno
from msp_plugin.runtime.locks import scratch_directory
from msp_plugin.runtime.memory import is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)


def load_model(
    source: str | Path,
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
    offload: bool = False,
    cache: str | None = None,
    config: PreTrainedConfig | None = None,
    kind: Any = None,
) -> PreTrainedModel:
    """Return the causal language model of a directory or hub id, in eval mode on the CPU.

    A model that also reads images is loaded whole; on text alone it is a causal language model.

    Args:
        dtype: one of source.DTYPES.
        offload: leave the weights on disk, and read those of each layer when it runs; accelerate places as
            many layers on GPUs as fit. Changed weights, such as pruned ones, are written to the cache, and
            removed when the model is freed.
        cache: directory of the cache; None is the default one.
        config: in place of the source's own.
        kind: the class to load; None takes the one that the config names.

    Raises:
        RecipeError: an unknown dtype.
        ModelError: there is no such model, transformers cannot load it, or accelerate is missing for ``offload``.
        OutputError: the cache cannot be written.
    """
    target = check_dtype(dtype)
    check_source(source)
    with ExitStack() as stack:
        placement: dict[str, Any] = {}
        if offload:
            _check_offloading(source)
            folder = stack.enter_context(scratch_directory("offload", cache))
            device_map = "auto" if torch.cuda.is_available() else {"": "disk"}
            placement = {"device_map": device_map, "offload_folder": str(folder), "use_safetensors": True}
        try:
            if config is not None:
                placement["config"] = config
            model = _from_pretrained(source, target, trust_remote_code, kind, placement)
        except ModelError:
            raise
        except Exception as error:  # a config's values reach all of transformers
            if is_out_of_memory(error):
                raise
            if offload and disk_errno(error) in FULL:
                raise cannot_write(folder, error) from error
            odd = _generation_config_fails(source)
            raise ModelError(
                f"cannot load a causal language model from {source}: {error}",
                hint="repair its generation_config.json, or remove it"
                if odd
                else "give a directory with config.json and safetensors, or a hub id",
            ) from error
        weakref.finalize(model, stack.pop_all().close)
    torch.nn.Module.eval(model)  # transformers' own is not typed
    return model


def _from_pretrained(
    source: str | Path, dtype: torch.dtype | None, trust_remote_code: bool, kind: Any, further: dict[str, Any]
) -> PreTrainedModel:
    """Return the model as transformers loads it into a class; ``further`` holds more of its options.

    Raises:
        ModelError: tensors are missing; transformers would fill them with random weights.
    """
    from transformers import AutoConfig

    if kind is None:
        kind = auto_class(AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code))
    options = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code, "output_loading_info": True}
    model: PreTrainedModel
    model, report = kind.from_pretrained(source, **options, **further)
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{source} lacks {len(missing)} tensors of {type(model).__name__}, e.g. {', '.join(missing[:3])}",
            hint="a file is missing or damaged, or config.json is from another model",
        )
    if extra := sorted(report["unexpected_keys"]):
        log.warning(
            "%s holds %d tensors that %s has no place for, e.g. %s: they are not read, and will not be in a result",
            source, len(extra), type(model).__name__, ", ".join(extra[:3]),
        )  # fmt: skip
    return model


def _generation_config_fails(source: str | Path) -> bool:
    """Return True if a directory's generation_config.json cannot be loaded, which keeps its model from loading."""
    from transformers import GenerationConfig

    if not (Path(source) / "generation_config.json").is_file():
        return False
    try:
        GenerationConfig.from_pretrained(source)
    except Exception:  # its values reach all of transformers, as a model's config's do
        return True
    return False


def _check_offloading(source: str | Path) -> None:
    """Raise if the weights of a source cannot stay on disk.

    Raises:
        ModelError: accelerate is not installed, or a directory has no safetensors files, the only ones that can be
            read tensor by tensor.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ModelError(
            "leaving weights on disk needs the package accelerate, which is not installed",
            hint="pip install accelerate, or do not offload",
        )
    path = Path(source)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{path} has no safetensors files, and only those can stay on disk",
            hint="load it and save it again with save_pretrained, or do not offload it",
        )
