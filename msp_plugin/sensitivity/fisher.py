"""The trace of the Fisher information matrix, per layer, from per-sample gradients.

Shape legend: B samples of a batch, T tokens, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from msp_plugin.calibration import CalibrationSet
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.models import input_device, named_parameters, own_parameters
from msp_plugin.recompute import recomputed
from msp_plugin.sensitivity.base import Estimator, Progress, silent

#: Forward passes that one with its backward pass counts as.
BACKWARD = 3


@dataclass(frozen=True)
class FisherTrace(Estimator):
    """Trace of the empirical Fisher information: mean over samples of ||dCE/dW||_F^2 (arXiv 2503.11164).

    CE is the sample's mean next-token cross entropy in nats, so the unit is nats^2 per squared
    weight. The paper gives neither loss nor sample count; both are ours. The weight's gradient never
    stays: for one sample it is dY^T X, and its squared norm is either that product's, formed and
    dropped layer by layer, or sum((dY dY^T) * (X X^T)) over token pairs (the ghost norm of Li et al.,
    arXiv 2110.05679, eq. 3), whichever is cheaper. One sample at a time, because some models hand a
    linear the tokens of a batch in one list. Memory: the activations of one sample.
    """

    name = "fisher"
    samples: int = 16

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RecipeError(f"fisher: samples = {self.samples} must be at least 1")

    def forward_tokens(self, data: CalibrationSet) -> int:
        return BACKWARD * sum(map(len, data.samples[: self.samples]))

    def parts(self, data: CalibrationSet) -> tuple[CalibrationSet, ...]:
        return tuple(CalibrationSet((sample,), data.source) for sample in data.samples[: self.samples])

    def layer_sensitivities(
        self,
        model: torch.nn.Module,
        data: CalibrationSet,
        layers: tuple[str, ...],
        progress: Progress = silent,
    ) -> Mapping[str, float]:
        chosen = CalibrationSet(data.samples[: self.samples], data.source)
        totals = {name: torch.zeros((), dtype=torch.float64) for name in layers}

        def add(name: str, x: torch.Tensor, dy: torch.Tensor) -> None:
            totals[name] += squared_gradient_norms(x[None], dy[None]).sum().cpu()

        backward_passes(model, chosen, layers, add, progress)
        return {name: float(total) / len(chosen) for name, total in totals.items()}


def backward_passes(
    model: torch.nn.Module,
    data: CalibrationSet,
    layers: Iterable[str],
    add: Callable[[str, torch.Tensor, torch.Tensor], None],
    progress: Progress = silent,
) -> None:
    """Run the mean cross entropy of each sample backwards; the model is left as it was found.

    Args:
        add: called with a layer's name, its inputs [T, I] and the gradients of its outputs [T, O], once
            per sample and call of the layer.

    Raises:
        NumericsError: a sample's loss is not finite.
    """
    device = input_device(model)
    with activation_gradients(model, layers, add):
        for done, sample in enumerate(data.samples):
            ids = sample[None].to(device)
            logits = model(ids, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
            if not torch.isfinite(loss):
                which = f"calibration sample {done}" if len(data) > 1 else "a calibration sample"
                raise NumericsError(
                    f"the loss of {which} is not finite",
                    hint="the activations overflow: try dtype float32",
                )
            loss.backward()
            progress(done + 1, len(data))


def squared_gradient_norms(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Return float64[B]: the squared Frobenius norm of dY_b^T X_b for inputs [B, T, I] and [B, T, O]."""
    _, t, i = x.shape
    o = dy.shape[-1]
    x, dy = x.float(), dy.float()
    if t * (i + o) < i * o:
        pairs = torch.bmm(x, x.transpose(1, 2)) * torch.bmm(dy, dy.transpose(1, 2))
        return pairs.sum(dim=(1, 2), dtype=torch.float64)
    return torch.bmm(dy.transpose(1, 2), x).square().sum(dim=(1, 2), dtype=torch.float64)


@contextmanager
def activation_gradients(
    model: torch.nn.Module, layers: Iterable[str], add: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Let graphs be built, of activations alone, and call ``add`` for every layer whenever one runs backwards.

    Where weights are offloaded, the graph holds no more of them than one block's (see ``recomputed``).
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
    """Call ``add`` for every layer whenever a backward pass runs.

    Args:
        again: the layers run again in the backward pass, so that their inputs need not be kept.
    """
    handles = []

    def forward_hook(name: str):
        def hook(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            given = _saved(x) if again else lambda: x
            output.register_hook(lambda dy: add(name, given(), dy.detach().reshape(-1, dy.shape[-1])))

        return hook

    try:
        for name in layers:
            handles.append(model.get_submodule(name).register_forward_hook(forward_hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _saved(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return what gives ``x`` back, which is saved as the graph saves its own tensors: it may be made anew."""
    node = _Saved.apply(x.new_zeros((), requires_grad=True), x).grad_fn
    return lambda: node.saved_tensors[0]


class _Saved(torch.autograd.Function):
    """A node of no graph's way, for the tensor that it saves."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.empty(0)


@contextmanager
def gradients_without_weights(model: torch.nn.Module) -> Iterator[None]:
    """Let gradients flow through the activations from the embeddings on, and to no parameter."""
    # By place: accelerate makes others of offloaded parameters in each forward pass.
    required = [
        (module, name.rpartition(".")[2], p.requires_grad) for name, module, p in named_parameters(model)
    ]
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.detach().requires_grad_(True)
    )
    try:
        for module, name, _ in required:
            own_parameters(module)[name].requires_grad_(False)
        yield
    finally:
        handle.remove()
        for module, name, flag in required:
            own_parameters(module)[name].requires_grad_(flag)
