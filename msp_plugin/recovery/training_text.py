"""The text of a training: how it is shared out to steps, and the batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.recovery.training_options import TrainingOptions

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Steps:
    """How text is shared out to steps, ranks and forward passes.

    Args:
        count: steps of the optimizer.
        batch: samples of one forward pass on one rank.
        accumulated: forward passes of one step on one rank.
        ranks: processes that share each step.
        length: tokens of the longest sample.
    """

    count: int
    batch: int
    accumulated: int
    ranks: int
    length: int

    @classmethod
    def plan(cls, method: TrainingOptions, data: CalibrationSet, batch_tokens: int, ranks: int) -> Steps:
        """Return the steps whose tokens are at least those that are asked for."""
        length = max(map(len, data.samples))
        share = -(-max(1, method.step_tokens // length) // ranks)
        most = max(1, batch_tokens // length)
        batch = max(size for size in range(1, min(most, share) + 1) if share % size == 0)
        count = max(1, math.ceil(method.tokens / (share * ranks * length)))
        return cls(count, batch, share // batch, ranks, length)

    @property
    def name(self) -> str:
        """A name of these steps, the same for all ranks and batches that train on the same samples in each."""
        return f"{self.count}-steps-of-{self.samples}"

    @property
    def samples(self) -> int:
        """Samples of a step."""
        return self.batch * self.accumulated * self.ranks

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.samples * self.length


class Samples(torch.utils.data.Dataset[torch.Tensor]):
    """Samples in the order in which they are trained on."""

    def __init__(self, samples: Sequence[torch.Tensor], order: Sequence[int]):
        self.samples, self.order = samples, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> torch.Tensor:
        return self.samples[self.order[position]]


def shuffled(count: int, wanted: int, seed: int) -> list[int]:
    """Return ``wanted`` of ``count`` positions: all of them in random order, then all again in another one."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < wanted:
        order += torch.randperm(count, generator=generator).tolist()
    return order[:wanted]


def collate(samples: Sequence[torch.Tensor]) -> Batch:
    """Return a batch of samples int64[T]; shorter ones are padded on the right, and an attention mask says so."""
    lengths = [len(sample) for sample in samples]
    if len(set(lengths)) == 1:
        return {"input_ids": torch.stack(list(samples))}
    ids = torch.nn.utils.rnn.pad_sequence(list(samples), batch_first=True)
    seen = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": seen}
