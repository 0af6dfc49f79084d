"""Importance-aware sparse tuning (IST): the adapters of few blocks are trained at a time, the important ones more often."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

#: The authors' constants: share of the blocks that are trained in a step; steps between updates of the scores; in each,
#: sets of blocks that are damped, the share of the blocks in a set, what is left of their change; step of the scores.
TRAINED, EVERY, SETS, DAMPED, LEFT, RATE = 0.25, 10, 3, 0.5, 0.25, 10.0


class ImportanceSchedule:
    """The scores of the blocks, from which the blocks of each step are drawn; a high score is an unimportant block.

    IST (arXiv 2410.11772), as in its code: floor(0.25 L) blocks are drawn for each step without replacement, with
    probabilities in proportion to sigmoid(-score). Every ten steps three sets of floor(0.5 L) blocks are drawn in
    proportion to p = sigmoid(score), their adapters damped to a quarter, and the loss on one batch measured:
    score += 10 (exp(-loss) - mean exp(-loss)) p (1 - p) for the blocks of the set. Deviations: sets may be equal, where
    the code draws until they differ, which never ends for few blocks; a score that is no adapter's own start may be
    given; the draws depend on seed and step alone, so that a stopped training continues with the same ones.

    Args:
        scores: of the blocks at the start, zero in the paper.
    """

    def __init__(self, scores: Sequence[float], seed: int):
        self.scores = torch.tensor(list(scores), dtype=torch.float64)
        self.seed = seed

    def drawn(self, step: int) -> list[int]:
        """Return the blocks that are trained in a step, ascending."""
        count = max(1, int(TRAINED * len(self.scores)))
        return _draw(torch.sigmoid(-self.scores), count, self._generator(step, 0))

    def update(self, step: int, loss: Callable[[list[int]], float]) -> None:
        """Update the scores after the losses of SETS sets of blocks.

        Args:
            loss: returns the loss in nats while the adapters of some blocks are damped.
        """
        p = torch.sigmoid(self.scores)
        generator = self._generator(step, 1)
        count = max(1, int(DAMPED * len(self.scores)))
        sets = [_draw(p, count, generator) for _ in range(SETS)]
        rewards = torch.tensor([-loss(blocks) for blocks in sets], dtype=torch.float64).exp()
        for blocks, reward in zip(sets, (rewards - rewards.mean()).tolist(), strict=True):
            self.scores[blocks] += RATE * reward * p[blocks] * (1 - p[blocks])

    def _generator(self, step: int, use: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 2 + use)


def _draw(weights: torch.Tensor, count: int, generator: torch.Generator) -> list[int]:
    drawn: list[int] = torch.multinomial(weights, count, generator=generator).sort().values.tolist()
    return drawn


def starting_scores(
    blocks: Mapping[int, Sequence[str]], sensitivities: Mapping[str, float]
) -> dict[int, float]:
    """Return the scores of blocks by their sensitivity: minus its standard score; zero where all are alike.

    Args:
        blocks: by number, the layers of a block.
        sensitivities: by layer; those of a block are added up.
    """
    sums = {i: sum(sensitivities.get(name, 0.0) for name in names) for i, names in blocks.items()}
    spread = statistics.pstdev(sums.values())
    if not spread:
        return dict.fromkeys(sums, 0.0)
    mean = statistics.mean(sums.values())
    return {i: (mean - value) / spread for i, value in sums.items()}
