"""Load a checkpoint as a transformers model, on request with its weights left packed."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from msp_plugin.checkpoint import load as dense
from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.saved_names import saved_names
from msp_plugin.errors import ModelError, ServingError
from msp_plugin.models.source import check_dtype, check_source
from msp_plugin.serving.cpu.linear import PackedLinear, no_training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def load(
    source: str | Path,
    dtype: str = "auto",
    *,
    packed: bool = False,
    checksums: bool = True,
    trust_remote_code: bool = False,
    offload: bool = False,
    cache: str | None = None,
) -> PreTrainedModel:
    """Return the causal language model of a directory or hub id, in eval mode on the CPU.

    A packed checkpoint becomes a dense model with the same weights, bit for bit, or one that keeps them packed.

    Args:
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        packed: keep the packed weights of a packed checkpoint as they are, and multiply by them on this CPU's
            sparse kernel: less memory, faster decoding, no training. Layers whose kernel is not there or is wrong
            become dense; one log line says so.
        checksums: compare the files with the SHA-256 in export.json first, where there is one.
        trust_remote_code: run the model repository's code.
        offload: leave the weights of a dense checkpoint on disk (see load_model).
        cache: the directory for offloaded weights that change; None is the default cache.

    Raises:
        ModelError: there is no such model, transformers cannot load it, it is packed and to be offloaded, or dense
            and to be kept packed.
        FormatError: files are damaged, or config and tensors contradict each other.
    """
    if not packed:
        return dense.load(
            source,
            dtype,
            checksums=checksums,
            trust_remote_code=trust_remote_code,
            offload=offload,
            cache=cache,
        )
    path = dense.local_directory(source, trust_remote_code)
    if path is None or not dense.is_packed(path):
        raise ModelError(f"{source} is not packed", hint="msp export it --to sparse24 or --to bitmask first")
    if offload:
        raise ModelError(f"{source} is packed, and only dense checkpoints can stay on disk")
    checkpoint = Checkpoint.open(path)
    if checksums:
        checkpoint.check_files()
    check_source(path)
    model = dense.from_tensors(
        checkpoint,
        dtype,
        trust_remote_code,
        lambda empty: _tensors(empty, checkpoint, check_dtype(dtype)),
        lambda model: _replace_linears(model, checkpoint),
    )
    model.requires_grad_(False)
    _prepare(model)
    return model


def _no_saving(*_: object, **__: object) -> None:
    """Stand in for the ``save_pretrained`` of a model with packed layers, which no loader would recognise again.

    Raises:
        ServingError: always.
    """
    raise ServingError(
        "a model with packed layers is not saved: its files would not say how they are packed",
        hint="copy the directory that it came from, or `msp export` it --to dense",
    )


def _train(model: PreTrainedModel, mode: bool = True) -> PreTrainedModel:
    """Stand in for ``train``, so that it is refused before some modules are in training mode.

    Raises:
        ServingError: training is asked for.
    """
    if mode:
        raise no_training(type(model).__name__)
    type(model).train(model, mode)
    return model


def _packed_linears(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the names of the model's linears that the checkpoint holds packed, by their names there.

    A matrix of another module, such as GPT-2's Conv1D or a router, may be packed as well.
    """
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    stored_as = {saved: name for name, saved in saved_names(model, linears).items()}
    named = {layer: stored_as.get(layer, layer) for layer in checkpoint.packed}
    return {layer: name for layer, name in named.items() if name in linears}


def _tensors(
    empty: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Return copies of a checkpoint's tensors by name: of linears packed, of all other modules dense.

    Args:
        empty: the model without weights.
        dtype: as for Checkpoint.dense.
    """
    kept = _packed_linears(empty, checkpoint)
    others = [layer for layer in checkpoint.packed if layer not in kept]
    if others:
        log.warning("%d packed layers are no linears and become dense, e.g. %s", len(others), others[0])
    weights = {f"{layer}.weight": checkpoint.weight(layer, dtype) for layer in others}
    format = checkpoint.format
    gone = {f"{layer}.{suffix}" for layer in others for suffix in (format.suffixes if format else ())}
    return weights | {
        name: checkpoint.tensors.read(name).clone() for name in checkpoint.tensors if name not in gone
    }


def _replace_linears(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Put a PackedLinear, still without data, in the place of each linear that the checkpoint holds packed."""
    format = checkpoint.format
    assert format is not None, "only packed checkpoints come here"
    for layer, name in _packed_linears(model, checkpoint).items():
        tensors = {suffix: _meta(checkpoint, f"{layer}.{suffix}") for suffix in format.suffixes}
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        shape = (old.out_features, old.in_features)
        model.set_submodule(name, PackedLinear(format, name, tensors, shape, old.bias))


def _meta(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Return a tensor without data, with the header of one in the checkpoint."""
    info = checkpoint.tensors[name]
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


def _prepare(model: PreTrainedModel) -> None:
    """Choose each packed linear's kernel; where there is none, make it a dense linear. Log which and why."""
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    kernels: Counter[str] = Counter()
    for name in packed:  # by name, so that none is held once a dense linear has taken its place
        module = model.get_submodule(name)
        assert isinstance(module, PackedLinear)
        choice = module.to(model.dtype).prepare()
        kernels[choice.kernel if choice.kernel != "dense" else f"dense ({choice.reason})"] += 1
        if choice.kernel == "dense":
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(module.weight, requires_grad=False)
            linear.register_parameter("bias", module.bias)
            model.set_submodule(name, linear.eval())
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        for part in model.modules():
            if hasattr(part, "save_pretrained"):
                part.save_pretrained = _no_saving  # type: ignore[assignment]
        model.train = partial(_train, model)  # type: ignore[method-assign]
    log.warning("packed layers: %s", ", ".join(f"{n} on {kernel}" for kernel, n in sorted(kernels.items())))
