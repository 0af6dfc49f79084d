"""Identify a model by the content of its weights, config and code."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from msp_plugin.models.offload import is_offloaded, named_parameters, onloaded
from msp_plugin.runtime.digests import source_digest

#: Packages whose code a recorded version identifies, and accelerate, whose hooks compute nothing.
_VERSIONED = ("torch", "transformers", "accelerate", "compressed_tensors", "llmcompressor")


def fingerprint(model: torch.nn.Module) -> str:
    """Return a hex SHA-256 of the model: its config, code, and every tensor's name, dtype, shape and bytes.

    The tensors are the parameters and the buffers that a checkpoint holds. The code is the source of all classes
    that no recorded version of a package identifies, e.g. those of a model's own repository.
    """
    digest = hashlib.sha256()
    transformer: Any = model
    config = _lasting(transformer.config.to_diff_dict())
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(_own_code(model).encode())
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    tied = transformer.get_output_embeddings() if is_tied else None
    for name, module, parameter in sorted(named_parameters(model), key=lambda named: named[0]):
        if module is tied and is_offloaded(module) and name.endswith(".weight"):
            continue  # in memory this is the embeddings' parameter, which is counted there
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        with onloaded(module):
            digest.update(_bytes_of(getattr(module, name.rpartition(".")[2])))
    for prefix, module in sorted(model.named_modules()):
        stored = sorted(name for name in module._buffers if name not in module._non_persistent_buffers_set)
        if not stored:
            continue  # spares onloaded() from reading the weights
        with onloaded(module):
            for name in stored:
                if (buffer := module._buffers[name]) is not None:
                    digest.update(f"{prefix}.{name} {buffer.dtype} {tuple(buffer.shape)}\n".encode())
                    digest.update(_bytes_of(buffer))
    return digest.hexdigest()


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without the entries that saving or loading changes; nested configs alike."""
    return {
        key: _lasting(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
        if key not in ("architectures", "_name_or_path", "transformers_version", "dtype", "torch_dtype")
    }


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor of any dtype and device."""
    return tensor.detach().contiguous().reshape(-1).cpu().view(torch.uint8).numpy().data


def _own_code(model: torch.nn.Module) -> str:
    """Return a digest of the source of the model's classes that no recorded version identifies."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__ if cls is not object}
    own = [cls for cls in classes if cls.__module__.partition(".")[0] not in _VERSIONED]
    return source_digest(*sorted(own, key=lambda cls: (cls.__module__, cls.__qualname__)))
