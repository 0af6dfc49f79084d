"""Models: load them, find what may be pruned, and identify them by content."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from msp_plugin.checkpoint.tensors import TensorFiles, read_json
from msp_plugin.errors import FormatError, ModelError, NumericsError, RecipeError, nearest, shown
from msp_plugin.identity import source_digest
from msp_plugin.memory import is_out_of_memory
from msp_plugin.patterns import check_patterns, matches
from msp_plugin.plan.bounds import Bounds
from msp_plugin.plan.levels import Level
from msp_plugin.plan.units import Layer, UnitTable, group_layers
from msp_plugin.resume import scratch_directory
from msp_plugin.writing import FULL, cannot_write, of_disk

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")
#: Sizes of a config that become modules and memory before a tensor is looked at.
_SIZES = (
    "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "num_hidden_layers",
)  # fmt: skip
#: What the configs of model families call the longest sequence.
_POSITIONS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_seq_length", "n_ctx",
    "seq_length",
)  # fmt: skip
#: Packages whose classes are known by their version or, accelerate's hooks, do not compute.
_VERSIONED = ("torch", "transformers", "accelerate", "compressed_tensors", "llmcompressor")
#: How much longer than the longest stored tensor a size may be: quantized weights hold eight or more in one number.
_PACKED = 32


def load_model(
    source: str | Path,
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
    offload: bool = False,
    cache: str | None = None,
) -> PreTrainedModel:
    """Return the causal language model of a directory or hub id, in eval mode on the CPU.

    A model that reads images too comes whole; without images it is a causal language model.

    Args:
        offload: leave the weights on disk, from where each layer's are read when it runs; where there are GPUs,
            accelerate places on them what fits. Weights that change, such as pruned ones, are written to the
            cache, and removed with the model.
        cache: that cache; None is the default one.

    Raises:
        RecipeError: an unknown dtype.
        ModelError: there is no such model, or transformers cannot load it.
        OutputError: the cache cannot be written.
    """
    from transformers import AutoConfig

    target = check_dtype(dtype)
    check_source(source)
    with ExitStack() as stack:
        placement: dict[str, Any] = {}
        if offload:
            _check_safetensors(source)
            folder = stack.enter_context(scratch_directory("offload", cache))
            device_map = "auto" if torch.cuda.is_available() else {"": "disk"}
            placement = {"device_map": device_map, "offload_folder": str(folder), "use_safetensors": True}
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
            model, report = auto_class(config).from_pretrained(
                source, dtype=target or "auto", trust_remote_code=trust_remote_code, output_loading_info=True,
                **placement,
            )  # fmt: skip
        except Exception as error:  # a config's values reach all of transformers
            if is_out_of_memory(error):
                raise
            if offload and of_disk(error) in FULL:
                raise cannot_write(folder, error) from error
            raise ModelError(
                f"cannot load a causal language model from {source}: {error}",
                hint="give a directory with config.json and safetensors, or a hub id",
            ) from error
        missing = sorted(report["missing_keys"])
        if missing:  # transformers would go on with random weights
            raise ModelError(
                f"{source} lacks {len(missing)} tensors of {type(model).__name__}, e.g. {', '.join(missing[:3])}",
                hint="a file is missing or damaged, or config.json is from another model",
            )
        weakref.finalize(model, stack.pop_all().close)
    return model.eval()


def auto_class(config: PreTrainedConfig) -> Any:
    """Return transformers' class that loads a model: the one for images and text where config.json names such a model.

    A model may be known for both, e.g. Llama 4, and then the class for text alone would leave the vision tower out.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):  # the repository's own
        return AutoModelForCausalLM
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    named = whole in (config.architectures or ())
    if named or (whole is not None and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _check_safetensors(source: str | Path) -> None:
    """Raise if a directory has weights in another form only, which offloading cannot read one by one.

    Raises:
        ModelError: it has.
    """
    path = Path(source)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{path} has no safetensors files, and only those can stay on disk",
            hint="load it and save it again with save_pretrained, or do not offload it",
        )


def check_dtype(dtype: str) -> torch.dtype | None:
    """Return the dtype of a name; None for ``auto``.

    Raises:
        RecipeError: an unknown dtype.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"dtype {dtype!r} is unknown", hint=nearest(dtype, DTYPES))
    return None if dtype == "auto" else getattr(torch, dtype)


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a directory or hub id.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    check_source(source)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises that type itself
        raise ModelError(f"cannot load a tokenizer from {source}: {error}") from error


def check_source(source: str | Path) -> None:
    """Fail early on a path that is not there, before a hub is asked for it, and on a config that lies.

    Raises:
        ModelError: there is no model, or a size in its config is none that its tensors could have.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json", hint="give a model's directory or a hub id")
        _check_sizes(path)
    elif path.exists() or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise ModelError(
            f"there is no model directory at {source}", hint="give a model's directory or a hub id"
        )


def _check_sizes(path: Path) -> None:
    try:
        config = read_json(path / "config.json")
        tensors = TensorFiles(path) if any(path.glob("*.safetensors")) else {}
    except FormatError:  # whoever reads the damaged file says so
        return
    text = config.get("text_config")
    # Beside a text_config, sizes outside of it stand for nothing.
    part = text if isinstance(text, dict) else config
    longest = max((length for info in tensors.values() for length in info.shape), default=2**24)
    for key in _SIZES:
        most = _PACKED * longest if key != "num_hidden_layers" else len(tensors) or 2**14
        value = part.get(key)
        sizes = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= most for n in sizes):
            raise ModelError(
                f"{path / 'config.json'}: {key} = {shown(value)} is no size of the tensors beside it",
                hint="config.json is damaged or from another model",
            )


def text_config(model: torch.nn.Module) -> PreTrainedConfig:
    """Return the config of a model's language part, which is the whole config where there is no other part."""
    config = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def decoder_blocks(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """Return the name and the list of the decoder blocks: those of the language model, whatever else there is.

    Raises:
        ModelError: the model has an encoder that its decoder reads, or its decoder holds no list of modules as
            long as the config's ``num_hidden_layers``.
    """
    config = text_config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder and a decoder",
            hint="only decoder-only models can be pruned",
        )
    depth = getattr(config, "num_hidden_layers", None)
    find = getattr(model, "get_decoder", None)
    decoder = find() if find is not None else None
    inside = set((decoder if isinstance(decoder, torch.nn.Module) else model).modules())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth and module in inside:
            return name, module
    raise ModelError(
        f"{type(model).__name__} has no list of {depth} decoder blocks",
        hint="only decoder-only language models with one list of blocks can be allocated",
    )


def fused_experts(model: torch.nn.Module) -> list[str]:
    """Return the names of parameters that hold one matrix for each expert, which no linear does."""
    _, blocks = decoder_blocks(model)
    sizes = vars(text_config(model))
    counts = {n for key, n in sizes.items() if "expert" in key and type(n) is int and n > 1}
    within = {id(module) for module in blocks.modules()}
    return [
        name
        for name, module, parameter in named_parameters(model)
        if id(module) in within
        and not isinstance(module, torch.nn.Linear | torch.nn.modules.conv._ConvNd)
        and ((parameter.dim() == 3 and parameter.shape[0] in counts)
             or (parameter.dim() > 1 and "experts" in name.split(".")))
    ]  # fmt: skip


def prunable_layers(
    model: torch.nn.Module,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = (),
    granularity: str = "unit",
) -> UnitTable:
    """Return the units of the linears inside the decoder blocks that targets name and ignore does not.

    A pattern is a module's name, a name ending (``q_proj``), a class name, a shell pattern with
    ``*``, or ``re:`` and a regular expression that is matched from the start of the name. The
    output head and the embeddings are outside the blocks, so they are never pruned.

    Raises:
        RecipeError: a pattern matches nothing in the model.
        ModelError: nothing is left to prune.
    """
    prefix, blocks = decoder_blocks(model)
    if fused := fused_experts(model):
        raise ModelError(
            f"{type(model).__name__} holds fused experts, e.g. {fused[0]}",
            hint="only linears can be pruned; llm-compressor's oneshot splits most models' experts into linears "
            "first: run MixedSparsityModifier there; where that is what failed, it does not split these",
        )
    named = {name: module for name, module in model.named_modules() if name}
    check_patterns(model, "target", targets)
    check_patterns(model, "ignore", ignore)
    layers = []
    for name, module in named.items():
        if not isinstance(module, torch.nn.Linear) or not name.startswith(prefix + "."):
            continue
        if "Router" in type(module).__name__:  # Phi-3.5-MoE's is a linear that returns the choice of experts
            continue
        if not any(matches(p, name, module) for p in targets):
            continue
        if any(matches(p, name, module) for p in ignore):
            continue
        block = int(name[len(prefix) + 1 :].split(".", 1)[0])
        layers.append((block, Layer(name, module.out_features, module.in_features)))
    if not layers:
        if not any(isinstance(module, torch.nn.Linear) for module in blocks.modules()):
            kinds = sorted({type(m).__name__ for m in blocks.modules() if own_parameters(m)})
            raise ModelError(
                f"the blocks of {type(model).__name__} under {prefix!r} hold no linear; their weights are in "
                f"{', '.join(kinds)}",
                hint="only torch.nn.Linear can be pruned, and GPT-2's Conv1D of transformers is none: take "
                "another model",
            )
        raise ModelError(
            f"{type(model).__name__} has no prunable linear under {prefix!r} for targets {list(targets)} "
            f"and ignore {list(ignore)}",
            hint="widen targets or narrow ignore",
        )
    return group_layers(layers, granularity)


def allowed_levels(
    model: torch.nn.Module, table: UnitTable, menu: Sequence[Level], bounds: Bounds
) -> np.ndarray | None:
    """Return bool[U, K], the levels that each unit may take; None if all may take all.

    A unit takes the intersection of the bounds of its layers.

    Raises:
        RecipeError: a pattern matches no layer of the table, bounds contradict each other, or no level of
            the menu is inside them.
    """
    if not bounds:
        return None
    matched = {pattern: set() for pattern in bounds.patterns}
    for kind, patterns in (("bounds", bounds.shares), ("protect", bounds.protect)):
        check_patterns(model, kind, patterns)
        for pattern in patterns:
            matched[pattern] = {
                a.name for a in table.layers if matches(pattern, a.name, model.get_submodule(a.name))
            }
            if not matched[pattern]:
                raise RecipeError(
                    f"{kind} {pattern!r} matches no layer that is pruned",
                    hint="targets or ignore leave out the layers that it names",
                )
    return bounds.allowed(table, menu, matched)


def offload_hook(module: torch.nn.Module) -> Any:
    """Return accelerate's hook that loads a module's own weights for each forward pass, None if there is none."""
    hook = getattr(module, "_hf_hook", None)
    return hook if getattr(hook, "offload", False) else None


def offload_cache(module: torch.nn.Module) -> Any:
    """Return what compressed-tensors puts in the place of a module's parameters to load them, None if it does not."""
    return None if isinstance(module._parameters, dict) else module._parameters


def is_offloaded(module: torch.nn.Module) -> bool:
    """Return True if a module's own weights are loaded from elsewhere whenever it needs them."""
    return offload_hook(module) is not None or offload_cache(module) is not None


def own_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """Return a module's parameters as they stay there, by name; reading them loads nothing."""
    cache = offload_cache(module)
    return module._parameters if cache is None else cache.offloaded_values


def named_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Parameter]]:
    """Yield each parameter once, as it stays in its module, with its name and that module."""
    seen = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in own_parameters(module).items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield f"{prefix}.{leaf}" if prefix else leaf, module, parameter


def offloaded_module(model: torch.nn.Module) -> str | None:
    """Return the name of a module whose weights accelerate or a host holds elsewhere, None if there is none."""
    for name, module in model.named_modules():
        if is_offloaded(module) or _is_away(module):
            return name or "the model"
    return None


def _is_away(module: torch.nn.Module) -> bool:
    return any(p is not None and p.device.type == "meta" for p in own_parameters(module).values())


@contextmanager
def onloaded(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield a module whose own weights are in memory, read from where they are offloaded to if they are."""
    if offload_hook(module) is not None:
        from accelerate.utils import align_module_device

        with align_module_device(module):
            yield module
    elif offload_cache(module) is not None:
        with offload_cache(module).disable_offloading():  # each weight is read once in the block
            yield module
    else:
        yield module


def weight_device(module: torch.nn.Module) -> torch.device:
    """Return the device on which a module works with its weight, wherever that is held meanwhile."""
    hook, cache = offload_hook(module), offload_cache(module)
    if cache is not None:
        return torch.device(cache.onload_device)
    return module.weight.device if hook is None else torch.device(hook.execution_device)


def input_device(model: torch.nn.Module) -> torch.device:
    """Return the device that token ids belong on; where weights are offloaded, the one that they run on."""
    embeddings = model.get_input_embeddings()
    return weight_device(embeddings) if is_offloaded(embeddings) else next(model.parameters()).device


def check_loadable(model: torch.nn.Module) -> None:
    """Raise unless all weights can be read and exchanged: in memory, or loaded by what is known here.

    Raises:
        ModelError: they cannot; the first such module is named.
    """
    for name, module in model.named_modules():
        if _is_away(module) and not is_offloaded(module):
            raise ModelError(
                f"the weights of {name} are offloaded, and no hook of accelerate on the module itself loads them",
                hint="load the model anew with transformers, with device_map or without",
            )
        if getattr(offload_cache(module), "offloading_disabled", False):
            raise ModelError(
                f"the weights of {name} stay loaded once they are read, so they cannot be exchanged",
                hint="call it outside of compressed-tensors' disable_offloading",
            )


def max_length(source: str | Path, *, trust_remote_code: bool = False) -> int | None:
    """Return the longest sequence that a model's config allows, None if it does not say."""
    return _count_of(source, _POSITIONS, trust_remote_code)


def vocabulary(source: str | Path, *, trust_remote_code: bool = False) -> int | None:
    """Return how many tokens a model's config has embeddings for, None if it does not say."""
    return _count_of(source, ("vocab_size",), trust_remote_code)


def _count_of(source: str | Path, keys: Sequence[str], trust_remote_code: bool) -> int | None:
    """Return the first of the config's values that is there.

    Raises:
        ModelError: the config cannot be read, or the value is no count.
    """
    from transformers import AutoConfig

    check_source(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).get_text_config()
        found = {key: getattr(config, key, None) for key in keys}
    except Exception as error:  # a config's values reach all of transformers
        raise ModelError(f"cannot read the config of {source}: {error}") from error
    key, value = next(((k, v) for k, v in found.items() if v is not None), (None, None))
    if key is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ModelError(f"{source}: {key} is {shown(value)}, no count")
    return value


def check_widths(table: UnitTable, menu: Iterable[Level]) -> None:
    """Raise unless every level fits every layer's in_features.

    Raises:
        RecipeError: the first layers that do not fit are named.
    """
    for level in menu:
        odd = [layer for layer in table.layers if level.misfit(layer.in_features)]
        if odd:
            why = level.misfit(odd[0].in_features)
            named = ", ".join(f"{a.name} (in_features {a.in_features})" for a in odd[:3])
            raise RecipeError(
                f"level {level.name} {why} the width of {len(odd)} layers: {named}",
                hint=f"leave {level.name} out of levels, or add the layers to ignore",
            )


def check_finite_weights(model: torch.nn.Module, table: UnitTable) -> None:
    """Raise if a prunable weight is not finite.

    Raises:
        ModelError: a weight cannot be read (see check_loadable).
        NumericsError: the layers are named.
    """
    check_loadable(model)
    bad = []
    for layer in table.layers:
        with onloaded(model.get_submodule(layer.name)) as module:
            if not torch.isfinite(module.weight).all():
                bad.append(layer.name)
    if bad:
        raise NumericsError(
            f"{len(bad)} layers hold weights that are not finite, e.g. {', '.join(bad[:3])}",
            hint="repair or download the checkpoint anew",
        )


def fingerprint(model: torch.nn.Module) -> str:
    """Return a hex digest of the model: its config, code, and every tensor's name, dtype, shape and bytes.

    The tensors are the parameters and the buffers that a checkpoint holds; the code is that of classes that are
    not from a package whose version is recorded, e.g. a repository's own.
    """
    digest = hashlib.sha256()
    config = _lasting(model.config.to_diff_dict())
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(_own_code(model).encode())
    tied = model.get_output_embeddings() if getattr(model.config, "tie_word_embeddings", False) else None
    for name, module, parameter in sorted(named_parameters(model), key=lambda named: named[0]):
        if module is tied and is_offloaded(module) and name.endswith(".weight"):
            continue  # in memory it is the embeddings' own and does not come twice
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        with onloaded(module):
            digest.update(_bytes_of(getattr(module, name.rpartition(".")[2])))
    for prefix, module in sorted(model.named_modules()):
        held = sorted(name for name in module._buffers if name not in module._non_persistent_buffers_set)
        if not held:
            continue  # loading an offloaded module reads its weights too
        with onloaded(module):
            for name in held:
                if (buffer := module._buffers[name]) is not None:
                    digest.update(f"{prefix}.{name} {buffer.dtype} {tuple(buffer.shape)}\n".encode())
                    digest.update(_bytes_of(buffer))
    return digest.hexdigest()


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without what saving and loading change, in the configs of its parts too."""
    return {
        key: _lasting(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
        if key not in ("architectures", "_name_or_path", "transformers_version", "dtype", "torch_dtype")
    }


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().reshape(-1).cpu().view(torch.uint8).numpy()


def _own_code(model: torch.nn.Module) -> str:
    """Return a digest of the code of the model's classes that no recorded version stands for."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__ if cls is not object}
    own = [cls for cls in classes if cls.__module__.partition(".")[0] not in _VERSIONED]
    return source_digest(*sorted(own, key=lambda cls: (cls.__module__, cls.__qualname__)))
