"""Keep the dense model's output on each sample, and measure the KL divergence of another output from it.

Shape legend: B samples, T tokens, D hidden size, V vocabulary, K likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from msp_plugin.errors import NumericsError
from msp_plugin.models.offload import onloaded
from msp_plugin.passes.head import head_inputs, plain_head
from msp_plugin.passes.losses import likely_tokens, summed_exponentials, summed_kl
from msp_plugin.passes.prefix import last_outputs, run_tail, tail_is_exact


class Passed(NamedTuple):
    """The result of a forward pass: logits [B, T, V], and with a plain head its input [B, T, D]."""

    logits: torch.Tensor
    head_input: torch.Tensor | None = None


def make_reference(
    model: torch.nn.Module, ids: Sequence[torch.Tensor]
) -> PlainHeadReference | OutputReference:
    """Return an empty reference of the cheapest kind that is exact for a model; runs a few passes of the first sample.

    Args:
        ids: token ids int64[T] of each sample, on the model's device.
    """
    with torch.no_grad():
        if (head := plain_head(model, ids[0])) is not None:
            return PlainHeadReference(model, ids, head)
        return OutputReference(model, ids, tail_is_exact(model, ids[0][None]))


@dataclass(frozen=True)
class _Sample:
    """The dense values of one sample of a model with a plain head; see PlainHeadReference."""

    head_input: torch.Tensor  # [T, D]
    logsumexp: torch.Tensor  # float32[T]
    expected: torch.Tensor  # float32[T, D], e_t
    likely: torch.Tensor  # int64[T, K]
    shares: torch.Tensor  # float32[T, K], p_tv
    logits: torch.Tensor  # [T, K]


class PlainHeadReference:
    """The KL divergence from a dense model whose logits are the output of a linear head, without its full logits.

    With h_t the input of the head, z_t the logits, p_t the dense model's probabilities, L_t its K most likely tokens
    and w_v the rows of the head,
    KL_t = logsumexp z_t - logsumexp z_t(dense) - sum_{v in L_t} p_tv (z_tv - z_tv(dense)) - (h_t - h_t(dense)) . e_t,
    e_t = sum_{v not in L_t} p_tv w_v; a bias of the head cancels. Likely tokens are read from the logits, which are
    rounded in 16 bits just as in the logsumexp; over the many other tokens the rounding averages out.
    """

    def __init__(self, model: torch.nn.Module, ids: Sequence[torch.Tensor], head: torch.nn.Linear):
        self.model, self.head, self._ids = model, head, ids
        self._samples: dict[int, _Sample] = {}

    def forward(self, group: Sequence[int]) -> Passed:
        """Return the output of the model as it is now on some samples."""
        with head_inputs(self.head) as inputs:
            logits = _logits(self.model, self._ids, group)
        return Passed(logits, inputs[0])

    def measure_dense(self, group: Sequence[int]) -> None:
        """Take the output of the model as it is now for the dense one, on some samples.

        Raises:
            NumericsError: the logits are not finite.
        """
        logits, head_input = self.forward(group)
        _check_finite(logits)
        assert head_input is not None
        with onloaded(self.head):
            for row, i in enumerate(group):
                likely, shares, expected = likely_tokens(logits[row], self.head.weight)
                self._samples[i] = _Sample(
                    head_input[row].clone(),
                    summed_exponentials(logits[row]),
                    expected,
                    likely,
                    shares,
                    logits[row].gather(-1, likely),
                )

    def summed(self, group: Sequence[int], passed: Passed) -> tuple[float, int]:
        """Return the KL divergence in nats, summed over the positions of some samples in float64, and their count."""

        def dense(name: str) -> torch.Tensor:
            return torch.stack([getattr(self._samples[i], name) for i in group])

        assert passed.head_input is not None
        moved = passed.head_input.float() - dense("head_input").float()
        own = passed.logits.gather(-1, dense("likely")).float()
        own -= dense("logits").float()
        grown = summed_exponentials(passed.logits) - dense("logsumexp")
        kl = grown.double() - (dense("shares") * own).sum(-1, dtype=torch.float64)
        kl -= (moved * dense("expected")).sum(-1, dtype=torch.float64)
        return float(kl.sum()), kl.numel()

    def mean(self, sample: int, logits: torch.Tensor) -> torch.Tensor:
        """Return the mean KL divergence of a sample's logits [T, V], nats per token, as a node of the graph."""
        with torch.no_grad():
            dense = self.head(self._samples[sample].head_input[None])[0]
        return _mean_kl(dense, logits)


class OutputReference:
    """The KL divergence from a dense model of any kind.

    It keeps the output of the last block if the model computes the same logits from it again, e.g. when it scales or
    caps them; else it keeps the logits.

    Attributes:
        outputs: by sample, the last block's output [T, D] or the logits [T, V].
    """

    def __init__(self, model: torch.nn.Module, ids: Sequence[torch.Tensor], exact_tail: bool):
        self.model, self.exact_tail, self._ids = model, exact_tail, ids
        self.outputs: dict[int, torch.Tensor] = {}

    def forward(self, group: Sequence[int]) -> Passed:
        """Return the output of the model as it is now on some samples."""
        return Passed(_logits(self.model, self._ids, group))

    def measure_dense(self, group: Sequence[int]) -> None:
        """Take the output of the model as it is now for the dense one, on some samples.

        Raises:
            NumericsError: the logits are not finite.
        """
        with last_outputs(self.model) as outputs:
            logits = _logits(self.model, self._ids, group)
        _check_finite(logits)
        for i, output in zip(group, outputs[0] if self.exact_tail else logits, strict=True):
            self.outputs[i] = output.clone()

    def _dense_logits(self, group: Sequence[int]) -> torch.Tensor:
        outputs = torch.stack([self.outputs[i] for i in group])
        return run_tail(self.model, outputs) if self.exact_tail else outputs

    def summed(self, group: Sequence[int], passed: Passed) -> tuple[float, int]:
        """Return the KL divergence in nats, summed over the positions of some samples in float64, and their count."""
        dense = self._dense_logits(group).flatten(0, 1)
        return summed_kl(dense, passed.logits.flatten(0, 1)), len(dense)

    def mean(self, sample: int, logits: torch.Tensor) -> torch.Tensor:
        """Return the mean KL divergence of a sample's logits [T, V], nats per token, as a node of the graph."""
        with torch.no_grad():
            dense = self._dense_logits([sample])[0]
        return _mean_kl(dense, logits)


def _mean_kl(dense: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    logp = dense.float().log_softmax(-1)
    return torch.nn.functional.kl_div(logits.log_softmax(-1), logp, reduction="sum", log_target=True) / len(
        logits
    )


def _logits(model: torch.nn.Module, ids: Sequence[torch.Tensor], group: Sequence[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.stack([ids[i] for i in group]), use_cache=False).logits
    return logits


def _check_finite(logits: torch.Tensor) -> None:
    if not torch.isfinite(logits).all():
        raise NumericsError(
            "the dense model's logits on the search text are not finite",
            hint="the activations overflow: try dtype float32",
        )
