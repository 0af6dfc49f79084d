"""Capture the gradients of a model's activations layer by layer during a backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import NumericsError
from msp_plugin.models.offload import input_device, input_embeddings, named_parameters, own_parameters
from msp_plugin.passes.recompute import recomputed
from msp_plugin.progress import Progress, silent

#: Cost of a forward and a backward pass together, in forward passes.
BACKWARD = 3


def loss_scale(parameters: Iterable[torch.Tensor], tokens: int) -> float:
    """Return the factor of a mean loss over tokens in backward passes: a power of two from ``tokens`` on, or 1.

    Only models with float16 parameters need one. In float16 the gradients of a mean over many tokens become zero, as
    they are below 2^-24; those of a sum over the tokens are larger by their number (loss scaling, Micikevicius et al.,
    arXiv 1710.03740, section 3.2). ``unscaled`` takes the factor out again, without a rounding.
    """
    half = any(parameter.dtype == torch.float16 for parameter in parameters)
    return 2.0 ** math.ceil(math.log2(tokens)) if half else 1.0


def unscaled(gradient: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the gradient of a loss that was multiplied by ``scale``: float32, or with 1 as it is."""
    return gradient if scale == 1 else gradient.float() / scale


def backward_passes(
    model: torch.nn.Module,
    data: CalibrationSet,
    layers: Iterable[str],
    add: Callable[[int, str, torch.Tensor, torch.Tensor], None],
    progress: Progress = silent,
) -> None:
    """Run a backward pass of each sample's mean cross entropy; the model is left as it was.

    Args:
        add: called once per sample and call of a layer with (the sample's number, the layer's name, its inputs [T, I],
            the gradients of its outputs [T, O], float32 for a float16 model).

    Raises:
        NumericsError: a sample's loss is not finite.
    """
    device, number, scale = input_device(model), 0, 1.0
    with activation_gradients(model, layers, lambda name, x, dy: add(number, name, x, unscaled(dy, scale))):
        for number, sample in enumerate(data.samples):
            scale = loss_scale((p for _, _, p in named_parameters(model)), len(sample))
            ids = sample[None].to(device)
            logits = model(ids, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
            if not torch.isfinite(loss):
                which = f"calibration sample {number}" if len(data) > 1 else "a calibration sample"
                raise NumericsError(
                    f"the loss of {which} is not finite",
                    hint="the activations overflow: try dtype float32",
                )
            (loss * scale).backward()
            progress(number + 1, len(data))


@contextmanager
def activation_gradients(
    model: torch.nn.Module, layers: Iterable[str], add: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Record the graph of activations in the block, and call ``add`` for every layer in each backward pass.

    The graph holds the offloaded weights of at most one block (see ``recomputed``).

    Args:
        add: called with (the layer's name, its inputs [T, I], the gradients of its outputs [T, O]).
    """
    with (
        gradients_without_weights(model),
        recomputed(model) as again,
        captured_gradients(model, layers, add, again=again),
        torch.enable_grad(),
    ):
        yield


@contextmanager
def captured_gradients(
    model: torch.nn.Module,
    layers: Iterable[str],
    add: Callable[[str, torch.Tensor, torch.Tensor], None],
    *,
    again: bool = False,
) -> Iterator[None]:
    """Call ``add`` for every layer in each backward pass that runs in the block.

    Args:
        add: see activation_gradients.
        again: True if the layers run again in the backward pass, so that their inputs need not be kept.
    """
    handles = []

    def forward_hook(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            inputs = _saved(x) if again else lambda: x
            output.register_hook(lambda dy: add(name, inputs(), dy.detach().reshape(-1, dy.shape[-1])))

        return hook

    try:
        for name in layers:
            handles.append(model.get_submodule(name).register_forward_hook(forward_hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _saved(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a function that returns ``x``, which the graph saves like its own tensors and may compute again."""
    apply: Any = _Saved.apply  # not every torch has types for it
    node = apply(x.new_zeros((), requires_grad=True), x).grad_fn
    return lambda: node.saved_tensors[0]


class _Saved(torch.autograd.Function):
    """A graph node that only saves a tensor; no gradient passes through it."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.empty(0)


@contextmanager
def gradients_without_weights(model: torch.nn.Module) -> Iterator[None]:
    """Let gradients flow through the activations, from the embeddings on, but into no parameter."""
    # By module and name: accelerate replaces offloaded parameters in each forward pass.
    required = [
        (module, name.rpartition(".")[2], p.requires_grad) for name, module, p in named_parameters(model)
    ]
    handle = input_embeddings(model).register_forward_hook(
        lambda module, args, output: output.detach().requires_grad_(True)
    )
    try:
        for module, name, _ in required:
            _require_grad(module, name, False)
        yield
    finally:
        handle.remove()
        for module, name, flag in required:
            _require_grad(module, name, flag)


def _require_grad(module: torch.nn.Module, name: str, flag: bool) -> None:
    parameter = own_parameters(module)[name]
    assert parameter is not None, f"{name} of {type(module).__name__} has gone"
    parameter.requires_grad_(flag)
