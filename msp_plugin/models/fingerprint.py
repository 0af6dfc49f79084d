"""Identify a model by the content of its weights, config and code."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from msp_plugin.models.offload import is_offloaded, named_parameters, onloaded
from msp_plugin.runtime.digests import source_digest

if TYPE_CHECKING:
    pass

#: Packages whose classes are known by their version or, accelerate's hooks, do not compute.
_VERSIONED = ("torch", "transformers", "accelerate", "compressed_tensors", "llmcompressor")


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
