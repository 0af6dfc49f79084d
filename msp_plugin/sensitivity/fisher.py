"""The trace of the Fisher information matrix, per layer, from per-sample gradients.

Shape legend: B samples of a batch, T tokens, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

    def layer_sensitivities(
        self,
        model: torch.nn.Module,
        data: CalibrationSet,
        layers: tuple[str, ...],
        progress: Progress = silent,
    ) -> Mapping[str, float]:
        chosen = CalibrationSet(data.samples[: self.samples], data.source)
        totals = {name: torch.zeros((), dtype=torch.float64) for name in layers}
        device = next(model.parameters()).device
        done = 0
        with _gradients_without_weights(model), _capture(model, totals), torch.enable_grad():
            for ids in chosen.batches(1):
                ids = ids.to(device)
                logits = model(ids, use_cache=False).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
                )
                if not torch.isfinite(loss):
                    raise NumericsError(
                        f"the loss of calibration sample {done} is not finite",
                        hint="the activations overflow: try dtype float32",
                    )
                (loss / (ids.shape[1] - 1)).backward()
                done += len(ids)
                progress(done, len(chosen))
        return {name: float(total) / len(chosen) for name, total in totals.items()}


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
def _capture(model: torch.nn.Module, totals: dict[str, torch.Tensor]) -> Iterator[None]:
    """Add each sample's squared gradient norm to ``totals`` whenever a backward pass runs."""
    handles = []

    def forward_hook(name: str):
        def hook(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
            x = args[0].detach().reshape(1, -1, args[0].shape[-1])

            def backward_hook(dy: torch.Tensor) -> None:
                dy = dy.detach().reshape(1, -1, dy.shape[-1])
                totals[name] += squared_gradient_norms(x, dy).sum().cpu()

            output.register_hook(backward_hook)

        return hook

    try:
        for name in totals:
            handles.append(model.get_submodule(name).register_forward_hook(forward_hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _gradients_without_weights(model: torch.nn.Module) -> Iterator[None]:
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
