"""Samples of token ids, with their origin and fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from msp_plugin.errors import DataError
from msp_plugin.runtime.ranks import Ranks


@dataclass(frozen=True)
class Reading:
    """What was read of one source for samples.

    Args:
        source: as the user named it.
        samples: how many of the samples came from it.
        columns: of a table, those that held the text.
        rows: documents, or rows of a table, that were read: all, or until there was text enough.
        skipped: of these, null or empty ones.
        bos: the tokens that each sample starts with, as the tokenizer writes them; None if there are none.
    """

    source: str
    samples: int
    columns: tuple[str, ...] = ()
    rows: int | None = None
    skipped: int = 0
    bos: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "columns": list(self.columns)}


@dataclass(frozen=True)
class CalibrationSet:
    """Samples of token ids, each int64[T], and where they came from.

    ``readings`` say what was read for them; a part of a set has none.
    """

    samples: tuple[torch.Tensor, ...]
    source: str
    readings: tuple[Reading, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def tokens(self) -> int:
        """Count of tokens over all samples."""
        return sum(len(sample) for sample in self.samples)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the token ids."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(len(sample).to_bytes(8, "little"))
            digest.update(sample.contiguous().numpy())
        return digest.hexdigest()

    def batches(self, batch_tokens: int) -> Iterator[torch.Tensor]:
        """Yield int64[B, T] of neighbouring samples of equal length, about ``batch_tokens`` each."""
        rows: list[torch.Tensor] = []
        for sample in self.samples:
            full = rows and (len(rows) + 1) * len(sample) > batch_tokens
            if rows and (full or len(rows[0]) != len(sample)):
                yield torch.stack(rows)
                rows = []
            rows.append(sample)
        if rows:
            yield torch.stack(rows)

    def of_rank(self, ranks: Ranks) -> CalibrationSet:
        """Return the samples that one rank passes through the model: every ``ranks.size``-th."""
        return CalibrationSet(tuple(ranks.share(self.samples)), self.source)

    def split(self, tail_tokens: int, *, fit: bool = False) -> tuple[CalibrationSet, CalibrationSet]:
        """Return (head, tail): the tail holds at least ``tail_tokens`` tokens from the end.

        Args:
            fit: let the tail hold less, half of the samples, where more would leave less than half for the head.

        Raises:
            DataError: less than half of the samples would be left for the head; or there is one sample only.
        """
        head, tail = self.cut(tail_tokens)
        count, cut = tail.tokens, len(head)
        least = (len(self.samples) + 1) // 2
        if fit and len(self) > 1 and (count < tail_tokens or cut < least):
            return self._at(least)
        if count < tail_tokens or cut < least:
            raise DataError(
                f"the search asks for {tail_tokens:,} held-out tokens, but {len(self)} calibration samples "
                f"with {self.tokens:,} tokens leave at most {self.tokens // 2:,} for it",
                hint="give more or longer samples, text of its own for the search, or the allocator's tokens and "
                f"holdout less than {self.tokens // 2:,} together",
            )
        return head, tail

    def cut(self, tail_tokens: int) -> tuple[CalibrationSet, CalibrationSet]:
        """Return (head, tail): the fewest samples from the end with ``tail_tokens`` tokens, or all."""
        count, cut = 0, len(self.samples)
        while cut > 0 and count < tail_tokens:
            cut -= 1
            count += len(self.samples[cut])
        return self._at(cut)

    def _at(self, cut: int) -> tuple[CalibrationSet, CalibrationSet]:
        return (
            CalibrationSet(self.samples[:cut], f"{self.source} [:{cut}]"),
            CalibrationSet(self.samples[cut:], f"{self.source} [{cut}:]"),
        )


def _pieces(text: str, size: int = 2**20) -> Iterator[str]:
    """Yield a text in pieces of about ``size`` characters that end with a line."""
    start = 0
    while start < len(text):
        cut = text.find("\n", start + size) + 1 or len(text)
        yield text[start:cut]
        start = cut


def join(parts: Sequence[CalibrationSet]) -> CalibrationSet:
    """Return the samples of all parts, one part after the other."""
    return CalibrationSet(
        tuple(sample for part in parts for sample in part.samples),
        " + ".join(p.source for p in parts),
        tuple(reading for part in parts for reading in part.readings),
    )
