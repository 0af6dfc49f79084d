"""Save a pruned model: check before the work that it can be saved, and keep it elsewhere if saving fails."""

from __future__ import annotations

import copy
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from msp_plugin.errors import ModelError, MSPError, OutputError
from msp_plugin.formats.tensor_files import ShardWriter
from msp_plugin.models.layers import check_no_adapter
from msp_plugin.models.offload import named_parameters, onloaded, own_parameters
from msp_plugin.runtime.disk import cannot_write, writing
from msp_plugin.runtime.files import cache_directory, output_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

#: Most bytes of one file of a checkpoint; offloaded weights are in memory one file at a time.
SHARD_BYTES = 4 * 1024**3
GENERATION_FILE = "generation_config.json"


def check_savable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Raise if transformers will refuse to save the model; tries it with config and tokenizer.

    A generation config that transformers refuses only gives a warning: it is kept as it is (see
    generation_config_kept).

    Raises:
        ModelError: transformers refuses the config or the tokenizer, or would save an adapter alone.
    """
    check_no_adapter(model)
    if (why := _generation_refused(model)) is not None:
        log.warning(
            "transformers refuses to save this model's %s (%s): it is kept as it is", GENERATION_FILE, why
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            copy.deepcopy(model.config).save_pretrained(folder)  # saving changes it
        except Exception as error:  # any error would come again at the end
            raise ModelError(
                f"transformers cannot save the config of this {type(model).__name__}: {_one_line(error)}",
                hint="repair config.json: the pruned model could not be saved either",
            ) from error
        try:
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        except Exception as error:
            raise ModelError(
                f"transformers cannot save the model's {type(tokenizer).__name__}: {_one_line(error)}",
                hint="repair the tokenizer's files: they could not be saved beside the pruned model either",
            ) from error


@contextmanager
def generation_config_kept(model: PreTrainedModel, directory: Path) -> Iterator[None]:
    """Let the block save a model although transformers refuses its generation config, which is then written as it is.

    transformers reads a generation_config.json that contradicts itself, e.g. a temperature without sampling, but
    refuses to save it.
    """
    if _generation_refused(model) is None:
        yield
        return
    from transformers import GenerationConfig

    refused = model.generation_config
    model.generation_config = GenerationConfig.from_dict({})
    try:
        yield
    finally:
        model.generation_config = refused
    if refused is not None:
        refused.to_json_file(directory / GENERATION_FILE, use_diff=True, keys_to_pop=["compile_config"])


def _generation_refused(model: PreTrainedModel) -> str | None:
    """Return the reason why transformers refuses to save a model's generation config; None if it accepts it."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return None
    try:
        config.validate(strict=True)
    except ValueError as error:
        return next((line.strip("- ") for line in str(error).splitlines()[1:]), str(error))
    return None


@contextmanager
def kept_if_it_fails(
    model: PreTrainedModel,
    path: Path,
    records: Callable[[Path], Any],
    cache: str | None = None,
    what: str = "the pruned model",
) -> Iterator[None]:
    """If the block fails, which measures a pruned model and saves it to ``path``, keep the model elsewhere.

    The weights go to ``PATH.unsaved`` as plain safetensors, with the config and what ``records`` writes into a
    directory. If that cannot be written, they go to the cache, else to the system's temporary directory.

    Raises:
        OutputError: the block failed; the error names the place.
    """
    try:
        yield
    except Exception as error:  # a bug as well: hours of work must not go with it
        failure = _failure(path, error)
        places = path.parent, cache_directory(cache) / "unsaved", Path(tempfile.gettempdir())
        kept = next(filter(None, (_keep(model, place, path.name, records) for place in places)), None)
        hint = (
            f"{what} is kept in {kept}; only the source's tokenizer files are missing there"
            if kept
            else f"{what} could not be kept elsewhere; the measurements are in the cache, where the same "
            "command continues"
        )
        raise OutputError(
            failure.message, hint=f"{failure.hint}; {hint}" if failure.hint else hint
        ) from error


def _failure(path: Path, error: Exception) -> MSPError:
    """Return the error that the user sees for one that ended the block."""
    if isinstance(error, MSPError):
        return error
    if isinstance(error, OSError | SafetensorError):
        return cannot_write(path, error)
    return OutputError(f"the model is pruned, but {path} could not be written: {_one_line(error)}")


#: Characters of another package's error in a message.
_LONGEST = 400


def _one_line(error: Exception) -> str:
    """Return the type and the beginning of an error on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= _LONGEST else text[:_LONGEST] + ' ...'}"


def _keep(model: PreTrainedModel, place: Path, name: str, records: Callable[[Path], Any]) -> Path | None:
    """Write a model's weights, config and records to a new directory in ``place``; None if that fails."""
    names = itertools.chain([f"{name}.unsaved"], (f"{name}.unsaved-{i}" for i in itertools.count(2)))
    path = next(place / n for n in names if not (place / n).exists())
    try:
        with writing(path), output_directory(path) as temporary:
            write_weights(model, temporary)
            for write in (lambda folder: model.config.to_json_file(folder / "config.json"), records):
                try:
                    write(temporary)
                except Exception as error:  # the weights are what took the work
                    log.warning(
                        "%s has the weights, but a file beside them failed: %s", path, _one_line(error)
                    )
    except Exception as error:
        log.info("the pruned model cannot be kept in %s: %s", path, _one_line(error))
        return None
    return path


def write_weights(model: torch.nn.Module, directory: Path) -> None:
    """Write the parameters and persistent buffers of a model, tied ones once, as plain safetensors."""
    named = dict.fromkeys(name for name, _, _ in named_parameters(model))
    sizes, owners = {}, {}
    for prefix, module in model.named_modules():
        buffers = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for leaf, tensor in (own_parameters(module) | buffers).items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if tensor is not None and (name in named or leaf in buffers):
                sizes[name], owners[name] = tensor.numel() * tensor.element_size(), (module, leaf)
    writer = ShardWriter(directory, sizes, SHARD_BYTES)
    for name, (module, leaf) in owners.items():
        with onloaded(module):
            writer.add(name, getattr(module, leaf).detach().cpu().clone())
    writer.finish()
