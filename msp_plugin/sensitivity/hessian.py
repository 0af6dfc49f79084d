"""The trace of the Hessian of the cross entropy, per layer, by Hutchinson's estimate.

Shape legend: P probes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import ModelError, NumericsError, RecipeError
from msp_plugin.models.offload import linear, offloaded_module
from msp_plugin.passes.gradients import BACKWARD, loss_scale
from msp_plugin.passes.observe import by_block, in_groups
from msp_plugin.progress import Progress, silent
from msp_plugin.sensitivity.base import Estimator

#: Kinds of attention whose backward pass torch can differentiate; it would take flash attention's as
#: constant.
DIFFERENTIABLE = ("eager", "sdpa")

#: Bytes of the weights that are probed together; their gradients, probes and products each take as many.
PROBED_BYTES = 1024**3


@dataclass(frozen=True)
class HessianTrace(Estimator):
    """Trace of the Hessian of the cross entropy with respect to a weight (arXiv 2310.09499).

    Hutchinson's estimate: the mean of v^T H v over vectors v of random signs, where a second backward pass
    gives H v. The cross entropy is a sample's mean over its tokens, in nats; the trace is the mean over
    samples. A layer that no token reaches has a trace of zero. Products accumulate in float64. Weights and
    passes have the model's dtype, because a second backward pass in bfloat16 loses less precision than the
    small count of probes does (1 % against 9 % on the demo model). Attention runs on the one kernel with a
    second derivative. Memory: gradients, probes and products of PROBED_BYTES or one block each, and the
    activations of one sample with their gradients.

    Deviations: samples and probes are ours, because the paper does not publish its own. The layers of many
    blocks are probed in one pass: the cross terms between layers have mean zero, so that the estimate stays
    unbiased.

    Args:
        samples: calibration samples that are used, the first ones.
        probes: random vectors per sample.
        seed: of the probes.
    """

    name = "hessian_trace"
    samples: int = 16
    probes: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for option, least in (("samples", 1), ("probes", 1), ("seed", 0)):
            if getattr(self, option) < least:
                raise RecipeError(
                    f"hessian_trace: {option} = {getattr(self, option)} must be at least {least}"
                )

    def forward_tokens(self, data: CalibrationSet) -> int:
        """Return the tokens of one pass over the samples (see Estimator).

        A probe costs a backward pass through both the forward and the backward pass.
        """
        passes = BACKWARD + 2 * BACKWARD * self.probes
        return passes * sum(map(len, data.samples[: self.samples]))

    def passes(self, model: torch.nn.Module, layers: Sequence[str]) -> int:
        return len(_groups(model, layers))

    def layer_sensitivities(
        self,
        model: torch.nn.Module,
        data: CalibrationSet,
        layers: tuple[str, ...],
        progress: Progress = silent,
    ) -> Mapping[str, float]:
        _check_in_memory(model)
        _check_attention(model)
        samples = data.samples[: self.samples]
        totals = dict.fromkeys(layers, 0.0)
        random = torch.Generator().manual_seed(self.seed)
        groups = _groups(model, layers)
        done = 0
        for names in (sum(group, ()) for group in groups):
            weights = [linear(model, name).weight for name in names]
            for number, sample in enumerate(samples):
                scale = loss_scale(weights, len(sample))
                with _gradients_of(model, weights), _second_derivatives():
                    loss = _cross_entropy(model, sample, number) * scale
                    probes = (random_signs(weights, random) for _ in range(self.probes))
                    forms = quadratic_forms(loss, weights, probes)
                for name, form in zip(names, forms, strict=True):
                    totals[name] += form / scale / self.probes
                done += 1
                progress(done, len(samples) * len(groups))
        return {name: total / len(samples) for name, total in totals.items()}


def _groups(model: torch.nn.Module, layers: Sequence[str]) -> list[list[tuple[str, ...]]]:
    """Return the layers of blocks that are probed together, group by group."""
    return list(in_groups(by_block(model, layers).values(), partial(_bytes, model), PROBED_BYTES))


def quadratic_forms(
    loss: torch.Tensor, weights: Sequence[torch.Tensor], probes: Iterator[list[torch.Tensor]]
) -> list[float]:
    """Return, for each weight w, the sum over probes v of v_w^T (H v)_w, where H is the Hessian of the loss.

    Args:
        loss: a scalar whose graph reaches some or all of the weights.
        probes: P lists, each with one tensor per weight, of its shape and dtype.
    """
    gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    sums = [0.0] * len(weights)
    reached = [i for i, gradient in enumerate(gradients) if gradient is not None and gradient.requires_grad]
    if not reached:
        return sums
    for probe in probes:
        products = torch.autograd.grad(
            [gradients[i] for i in reached],
            [weights[i] for i in reached],
            [probe[i] for i in reached],
            retain_graph=True,
            allow_unused=True,
        )
        for i, product in zip(reached, products, strict=True):
            if product is not None:
                sums[i] += float((probe[i] * product).sum(dtype=torch.float64))
    return sums


def _check_in_memory(model: torch.nn.Module) -> None:
    """Raise if weights are offloaded: the graph of a second derivative would keep all of them in memory.

    Raises:
        ModelError: some are offloaded.
    """
    name = offloaded_module(model)
    if name is not None:
        raise ModelError(
            f"the weights of {name} are offloaded; hessian_trace needs the whole model in memory",
            hint="load the model without offloading or a device_map, or use an allocator without "
            "hessian_trace",
        )


def _check_attention(model: torch.nn.Module) -> None:
    """Raise unless the model's attention has a second derivative.

    Raises:
        ModelError: the attention is of another kind than DIFFERENTIABLE.
    """
    kind = getattr(model.config, "_attn_implementation", None) or "eager"
    if kind not in DIFFERENTIABLE:
        raise ModelError(
            f"attention {kind!r} has no second derivative",
            hint='load the model with attn_implementation="sdpa", or use another allocator',
        )


@contextmanager
def _second_derivatives() -> Iterator[None]:
    """Enable second derivatives in the block, with the kernel of scaled dot product attention that has them.

    Raises:
        ModelError: an operation of the model has no second derivative.
    """
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if "derivative for" not in str(error):
            raise
        raise ModelError(
            f"the model has no second derivative: {error}",
            hint='load it with attn_implementation="eager", or use another allocator',
        ) from error


def random_signs(like: Sequence[torch.Tensor], random: torch.Generator) -> list[torch.Tensor]:
    """Return random -1 and 1 in the shape, dtype and device of each given tensor; drawn on the CPU."""
    return [
        (2 * torch.randint(0, 2, t.shape, generator=random, dtype=torch.int8) - 1).to(t.device, t.dtype)
        for t in like
    ]


def _cross_entropy(model: torch.nn.Module, sample: torch.Tensor, number: int) -> torch.Tensor:
    """Return the sample's mean next-token cross entropy in nats.

    Raises:
        NumericsError: it is not finite.
    """
    ids = sample[None].to(next(model.parameters()).device)
    logits = model(ids, use_cache=False).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    if not torch.isfinite(loss):
        raise NumericsError(
            f"the loss of calibration sample {number} is not finite",
            hint="the activations overflow: try dtype float32",
        )
    return loss


@contextmanager
def _gradients_of(model: torch.nn.Module, weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """Require gradients of these weights only, during the block."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in required:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, flag in required:
            parameter.requires_grad_(flag)


def _bytes(model: torch.nn.Module, names: Sequence[str]) -> int:
    """Return the bytes of the weights of layers."""
    return sum(linear(model, name).weight.nbytes for name in names)
