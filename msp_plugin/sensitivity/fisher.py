"""The trace of the Fisher information matrix, per layer, from per-sample gradients.

Shape legend: B samples of a batch, T tokens, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from msp_plugin.calibration import CalibrationSet
from msp_plugin.errors import NumericsError, RecipeError
from msp_plugin.sensitivity.base import Estimator, Progress, silent


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
    samples: int = 128

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RecipeError(f"fisher: samples = {self.samples} must be at least 1")

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
    device = next(model.parameters()).device
    with gradients_without_weights(model), captured_gradients(model, layers, add), torch.enable_grad():
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
def captured_gradients(
    model: torch.nn.Module, layers: Iterable[str], add: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Call ``add`` for every layer whenever a backward pass runs."""
    handles = []

    def forward_hook(name: str):
        def hook(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            output.register_hook(lambda dy: add(name, x, dy.detach().reshape(-1, dy.shape[-1])))

        return hook

    try:
        for name in layers:
            handles.append(model.get_submodule(name).register_forward_hook(forward_hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gradients_without_weights(model: torch.nn.Module) -> Iterator[None]:
    """Let gradients flow through the activations from the embeddings on, and to no parameter."""
    required = [(p, p.requires_grad) for p in model.parameters()]
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.detach().requires_grad_(True)
    )
    try:
        for parameter, _ in required:
            parameter.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for parameter, flag in required:
            parameter.requires_grad_(flag)
