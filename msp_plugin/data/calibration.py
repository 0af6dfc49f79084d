"""Samples of token ids, with their origin and fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch

from msp_plugin.errors import DataError
from msp_plugin.records.parts import ReadingRecord, TextRecord
from msp_plugin.runtime.ranks import Ranks


@dataclass(frozen=True)
class Reading:
    """What was read of one source.

    Args:
        source: the source as the user named it.
        samples: number of samples from it.
        columns: the columns of a table that held the text.
        rows: documents, or rows of a table, that were read until there was enough text.
        skipped: how many of these rows were null or empty.
        bos: the tokens that start each sample, as the tokenizer writes them; None if there are none.
    """

    source: str
    samples: int
    columns: tuple[str, ...] = ()
    rows: int | None = None
    skipped: int = 0
    bos: str | None = None

    def record(self) -> ReadingRecord:
        """Return this as a part of a record."""
        return ReadingRecord(**asdict(self))


@dataclass(frozen=True)
class CalibrationSet:
    """Samples of token ids, each int64[T], and their source.

    ``readings`` says what was read of each source; it is empty for a part of a set.
    """

    samples: tuple[torch.Tensor, ...]
    source: str
    readings: tuple[Reading, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return sum(len(sample) for sample in self.samples)

    @cached_property
    def fingerprint(self) -> str:
        """The hex SHA-256 of the lengths and token ids of all samples."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(len(sample).to_bytes(8, "little"))
            digest.update(sample.contiguous().numpy().data)
        return digest.hexdigest()

    def batches(self, batch_tokens: int) -> Iterator[torch.Tensor]:
        """Yield int64[B, T]: consecutive samples of equal length, up to ``batch_tokens`` tokens, or one longer sample."""
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
        """Return (head, tail), where the tail is the fewest last samples with at least ``tail_tokens`` tokens.

        Args:
            fit: if the head would keep less than half of the samples, split in the middle instead.

        Raises:
            DataError: the head would keep less than half of the samples, and ``fit`` is not given or there is only
                one sample.
        """
        head, tail = self.cut(tail_tokens)
        count, cut = tail.tokens, len(head)
        least = (len(self.samples) + 1) // 2
        if fit and len(self) > 1 and (count < tail_tokens or cut < least):
            return self._at(least)
        if count < tail_tokens or cut < least:
            most = sum(len(sample) for sample in self.samples[least:])
            raise DataError(
                f"the search asks for {tail_tokens:,} held-out tokens, but {len(self)} calibration samples "
                f"with {self.tokens:,} tokens leave at most {most:,} for it",
                hint="give more or longer samples, a separate text for the search, or set the allocator's tokens "
                f"and holdout to {most:,} or less together"
                if most
                else "give at least 2 samples, or a separate text for the search",
            )
        return head, tail

    def record(self, *, length: int | None = None, seed: int | None = None) -> TextRecord:
        """Return this as a part of a record, with the requested ``length`` and ``seed``."""
        return TextRecord(
            source=self.source,
            samples=len(self),
            length=length,
            tokens=self.tokens,
            seed=seed,
            fingerprint=self.fingerprint,
            sources=tuple(reading.record() for reading in self.readings),
        )

    def cut(self, tail_tokens: int) -> tuple[CalibrationSet, CalibrationSet]:
        """Return (head, tail): the tail is the fewest last samples with ``tail_tokens`` tokens, or all samples."""
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


def join(parts: Sequence[CalibrationSet]) -> CalibrationSet:
    """Return one set with the samples of all parts, in their order."""
    return CalibrationSet(
        tuple(sample for part in parts for sample in part.samples),
        " + ".join(p.source for p in parts),
        tuple(reading for part in parts for reading in part.readings),
    )
