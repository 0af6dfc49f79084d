"""Calibration text: from a file, a directory or a dataset to samples of token ids with provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from msp_plugin.errors import DataError, nearest
from msp_plugin.plan.document import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Text read beyond what is asked for, so that a large corpus does not cost hours of tokenizing.
_READ = 32
_TEXT = (".txt", ".md", ".py", ".text")


@dataclass(frozen=True)
class CalibrationSet:
    """Samples of token ids, each int64[T], and where they came from."""

    samples: tuple[torch.Tensor, ...]
    source: str

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

    def split(self, tail_tokens: int) -> tuple[CalibrationSet, CalibrationSet]:
        """Return (head, tail): the tail holds at least ``tail_tokens`` tokens from the end.

        Raises:
            DataError: less than half of the samples would be left for the head.
        """
        head, tail = self.cut(tail_tokens)
        count, cut = tail.tokens, len(head)
        if count < tail_tokens or cut < (len(self.samples) + 1) // 2:
            raise DataError(
                f"the search asks for {tail_tokens:,} held-out tokens, but {len(self)} calibration samples "
                f"with {self.tokens:,} tokens leave at most {self.tokens // 2:,} for it",
                hint="give more or longer samples or --search-data, or fewer tokens to the allocator: "
                "--set allocator.tokens=8192 --set allocator.holdout=4096",
            )
        return head, tail

    def cut(self, tail_tokens: int) -> tuple[CalibrationSet, CalibrationSet]:
        """Return (head, tail): the fewest samples from the end with ``tail_tokens`` tokens, or all."""
        count, cut = 0, len(self.samples)
        while cut > 0 and count < tail_tokens:
            cut -= 1
            count += len(self.samples[cut])
        return (
            CalibrationSet(self.samples[:cut], f"{self.source} [:{cut}]"),
            CalibrationSet(self.samples[cut:], f"{self.source} [{cut}:]"),
        )


def load_texts(source: str, text_column: str = "text") -> Iterable[str]:
    """Return the documents of a source.

    A source is ``demo:SPLIT`` (the embedded corpus), a text file, a ``.jsonl`` file, a directory of
    such files or of a saved dataset, or a hub dataset ``id[:config][:split]``.

    Raises:
        DataError: it is missing, empty or unreadable; a jsonl line or column that does not fit is named.
    """
    if source.startswith("demo:"):
        from msp_plugin.demo.corpus import library_texts

        return library_texts(source[5:])
    path = Path(source).expanduser()
    if path.is_file():
        texts = _file_texts(path, text_column)
    elif path.is_dir():
        texts = _directory_texts(path, text_column)
    elif path.suffix in (*_TEXT, ".jsonl", ".json") or source.startswith((".", "/", "~")):
        raise DataError(f"there is no data file at {path}", hint="give a text or jsonl file, or a dataset")
    else:
        return _hub_texts(source, text_column)
    if isinstance(texts, list) and not any(text.strip() for text in texts):
        raise DataError(f"{source} holds no text", hint="give a file with text in it")
    return texts


def _file_texts(path: Path, column: str) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if path.suffix not in (".jsonl", ".json"):
        return [content]
    texts = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number} is not JSON: {error}", hint="jsonl holds one JSON object a line"
            ) from None
        texts.append(_column(row, column, f"{path}, line {number}"))
    return texts


def _column(row: Any, column: str, where: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        known = [k for k, v in row.items() if isinstance(v, str)] if isinstance(row, dict) else []
        raise DataError(f"{where} has no text in {column!r}", hint=nearest(column, known))
    return row[column]


def _directory_texts(path: Path, column: str) -> Iterable[str]:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        try:
            from datasets import load_from_disk
        except ImportError:
            raise DataError(f"{path} is a saved dataset", hint="pip install datasets to read it") from None
        return _dataset_texts(load_from_disk(str(path)), column, str(path))
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in (*_TEXT, ".jsonl"))
    if not files:
        raise DataError(f"{path} holds no {', '.join(_TEXT)} or .jsonl file and no saved dataset")
    return [text for file in files for text in _file_texts(file, column)]


def _hub_texts(source: str, column: str) -> Iterator[str]:
    """Stream a hub dataset: only the shards that are read are downloaded."""
    name, *rest = source.split(":")
    config, split = (rest[0], rest[1]) if len(rest) > 1 else (None, rest[0] if rest else "train")
    try:
        from datasets import load_dataset

        data = load_dataset(name, config, split=split, streaming=True)
    except ImportError:
        raise DataError(
            f"there is no file {source}, and hub datasets need the datasets package",
            hint="pip install datasets, or give a file",
        ) from None
    except Exception as error:  # datasets raises many types, and a connection many more
        raise DataError(
            f"{source!r} is neither a file nor a dataset that can be loaded: {type(error).__name__}: {error}",
            hint="give a path, or id[:config][:split] of a hub dataset",
        ) from error
    return _dataset_texts(data, column, source)


def _dataset_texts(data: Any, column: str, source: str) -> Iterator[str]:
    """Return the texts of a dataset's column, of its train split if it has several."""
    if isinstance(data, dict):
        if "train" not in data:
            raise DataError(
                f"{source} has the splits {', '.join(data)} and no train", hint="give one split's directory"
            )
        data = data["train"]
    columns = data.column_names or list(next(iter(data), {}))
    if column not in columns:
        raise DataError(f"{source} has no column {column!r}", hint=nearest(column, columns))
    return (str(row[column]) for row in data)


def _pieces(text: str, size: int = 2**20) -> Iterator[str]:
    """Yield a text in pieces of about ``size`` characters that end with a line."""
    start = 0
    while start < len(text):
        cut = text.find("\n", start + size) + 1 or len(text)
        yield text[start:cut]
        start = cut


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    samples: int,
    length: int,
    source: str,
    at_least: int | None = None,
    seed: int = 0,
) -> CalibrationSet:
    """Return up to ``samples`` samples of exactly ``length`` tokens, cut from the joined documents.

    Documents are closed by the end-of-text token and joined in their order. When there is more text
    than asked for, the samples are spread evenly over it, so that a corpus is not judged by its first
    document; a ``seed`` other than 0 moves each at random within its share. At most ``_READ`` times the
    asked tokens are read.

    Raises:
        DataError: there are fewer than ``at_least`` samples (default: ``samples``) in the text.
    """
    if samples < 1 or length < 2:
        raise DataError(f"asked for {samples} samples of {length} tokens", hint="ask for at least 1 x 2")
    end = tokenizer.eos_token_id
    stream: list[int] = []
    enough = _READ * samples * length
    for text in texts:
        for piece in _pieces(text):
            if len(stream) > enough:
                break
            stream += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        if text and end is not None:
            stream.append(end)
        if len(stream) > enough:
            break
    found = len(stream) // length
    if found < (samples if at_least is None else at_least):
        raise DataError(
            f"{source} has {len(stream):,} tokens: {found} samples of {length}, {samples} were asked for",
            hint="give more text, or ask for fewer or shorter samples",
        )
    take = min(samples, found)
    edges = [i * found // take for i in range(take + 1)]
    starts = edges[:-1]
    if seed:
        rng = np.random.default_rng(seed)
        starts = [int(rng.integers(low, high)) for low, high in pairwise(edges)]
    ids = torch.tensor(stream[: found * length], dtype=torch.int64).view(found, length)
    return CalibrationSet(tuple(ids[i].clone() for i in starts), source)


def from_dataloader(
    batches: Iterable[Any], source: str = "dataloader", *, keep_order: bool = True
) -> CalibrationSet:
    """Return the samples of a host's DataLoader, padding removed.

    Without ``keep_order`` they are sorted by a digest of their content: hosts sort samples by length, or
    shuffle them, and the last ones, which are held out, must be typical and the same in every run.

    Raises:
        DataError: a batch has no ``input_ids``, or there is no token at all.
    """
    samples = []
    for batch in batches:
        if not hasattr(batch, "keys") or "input_ids" not in batch:
            keys = sorted(batch.keys()) if hasattr(batch, "keys") else type(batch).__name__
            raise DataError(f"a calibration batch has no input_ids: {keys}", hint="tokenize the dataset")
        ids = torch.as_tensor(batch["input_ids"]).cpu()
        mask = batch.get("attention_mask")
        for i, row in enumerate(ids):
            kept = row if mask is None else row[torch.as_tensor(mask)[i].cpu().bool()]
            if len(kept) > 1:
                samples.append(kept.to(torch.int64))
    if not keep_order:
        samples.sort(key=lambda sample: hashlib.sha256(sample.contiguous().numpy()).digest())
    if not samples:
        raise DataError("the calibration data holds no sample of two tokens or more")
    return CalibrationSet(tuple(samples), source)


def join(parts: Sequence[CalibrationSet]) -> CalibrationSet:
    """Return the samples of all parts, one part after the other."""
    return CalibrationSet(
        tuple(sample for part in parts for sample in part.samples), " + ".join(p.source for p in parts)
    )
