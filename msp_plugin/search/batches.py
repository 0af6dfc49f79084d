"""Split samples into batches that fit into memory."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise

from msp_plugin.runtime.memory import free_cached, is_out_of_memory, short_of_memory

log = logging.getLogger(__name__)

#: The number of batches is a multiple of this, so that one, two, four or eight ranks get equally many.
SHARES = 8
#: The remedy if a single sample does not fit.
SHORTER = "shorter samples (a smaller length)"


class Batches:
    """Splits samples into batches of consecutive samples of equal length.

    Args:
        lengths: tokens of each sample, by its number.
        tokens: most tokens of a batch; a longer sample is a batch by itself.
    """

    def __init__(self, lengths: Sequence[int], tokens: int):
        self.lengths, self.tokens = tuple(lengths), tokens

    def of(self, samples: Sequence[int]) -> Iterator[list[int]]:
        """Yield the numbers of the samples of each batch.

        For each length the number of batches is a multiple of SHARES, if there are enough samples, and their sizes
        differ by at most one, so that ranks get equal shares. The batches do not depend on the number of ranks.
        """
        for length, run in groupby(samples, key=lambda i: self.lengths[i]):
            same = list(run)
            count = self._count(len(same), length)
            ends = [len(same) * n // count for n in range(count + 1)]
            yield from (same[a:b] for a, b in pairwise(ends))

    def _count(self, samples: int, length: int) -> int:
        least = -(-samples // max(1, self.tokens // length))
        return min(samples, -(-least // SHARES) * SHARES)

    def largest(self) -> list[int]:
        """Return the samples of a batch with the most tokens that ``of`` can yield for any selection of samples."""

        def tokens(length: int) -> int:
            return length * max(-(-n // self._count(n, length)) for n in range(1, counts[length] + 1))

        counts = Counter(self.lengths)
        length = max(counts, key=tokens)
        same = [i for i, own in enumerate(self.lengths) if own == length]
        return same[: tokens(length) // length]

    def fit(self, measure: Callable[[list[int]], object]) -> int:
        """Halve the batches until ``measure`` of the largest one fits into memory; return the new ``tokens``.

        Raises:
            ModelError: a single sample does not fit.
        """
        first = self.largest()
        group = first
        while not self._fits(measure, group):
            free_cached()  # here, where no traceback holds the tensors of the pass that failed
            self.tokens = -(-len(group) // 2) * self.lengths[group[0]]
            group = self.largest()
        if group != first:
            log.warning(
                "%d samples of %d tokens do not fit into memory at once, %d do: losses may differ by rounding from "
                "those of a run with more memory",
                len(first),
                self.lengths[first[0]],
                len(group),
            )
        return self.tokens

    def _fits(self, measure: Callable[[list[int]], object], group: list[int]) -> bool:
        try:
            measure(group)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(group) == 1:
                raise short_of_memory(self.describe(group), SHORTER, error) from error
            return False
        return True

    def describe(self, group: Sequence[int]) -> str:
        """Return the beginning of a sentence that ends with "not fit into memory"."""
        tokens = f"{self.lengths[group[0]]:,} tokens"
        return f"one sample of {tokens} does" if len(group) == 1 else f"{len(group)} samples of {tokens} do"
