"""Turn text into samples of token ids."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from msp_plugin.data.calibration import CalibrationSet, Reading, _pieces
from msp_plugin.data.chats import Chat
from msp_plugin.data.sources import Document, Documents
from msp_plugin.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
log = logging.getLogger(__name__)


#: Text read beyond what is asked for, so that a large corpus does not cost hours of tokenizing.
_READ = 32


def leading_tokens(tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> tuple[int, ...]:
    """Return the tokens that a sample starts with.

    Args:
        bos: None for those that the tokenizer itself puts before a text, if any; True for these, or else its
            beginning-of-text token; False for none.

    Raises:
        DataError: there is no such token.
    """
    if bos is False:
        return ()
    plain = tokenizer("a", add_special_tokens=False, verbose=False).input_ids
    whole = tokenizer("a", verbose=False).input_ids
    starts = (i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain)
    own = tuple(whole[: next(starts, 0)])
    if own or not bos:
        return own
    if tokenizer.bos_token_id is None:
        raise DataError(
            "the tokenizer has no beginning-of-text token to start samples with",
            hint="leave bos to the tokenizer",
        )
    return (tokenizer.bos_token_id,)


def _written(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(list(tokens)))


def _stream(tokenizer: PreTrainedTokenizerBase, texts: Iterable[Document], enough: int) -> list[int]:
    """Return the tokens of documents, a little more than ``enough`` of them or all that there are.

    The end-of-text token closes each document; a conversation ends as its template has it, and what the tokenizer
    puts before a text does not start it, because that starts every sample.
    """
    end, start = tokenizer.eos_token_id, _written(tokenizer, leading_tokens(tokenizer))
    stream: list[int] = []
    for document in texts:
        chat = isinstance(document, Chat)
        text = document.text(tokenizer).removeprefix(start) if chat else document
        for piece in _pieces(text) if isinstance(text, str) else text:
            if len(stream) > enough:
                break
            stream += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        if text and not chat and end is not None:
            stream.append(end)
        if len(stream) > enough:
            break
    return stream


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Document],
    *,
    samples: int,
    length: int,
    source: str,
    at_least: int | None = None,
    seed: int = 0,
    bos: bool | None = None,
) -> CalibrationSet:
    """Return up to ``samples`` samples of exactly ``length`` tokens, cut from the joined documents.

    Documents are closed by the end-of-text token and joined in their order. Each sample starts with the tokens
    that ``bos`` asks for (see leading_tokens), and they are part of its length. When there is more text
    than asked for, the samples are spread evenly over it, so that a corpus is not judged by its first
    document; a ``seed`` other than 0 moves each at random within its share. At most ``_READ`` times the
    asked tokens are read.

    Raises:
        DataError: there are fewer than ``at_least`` samples (default: ``samples``) in the text.
    """
    if samples < 1 or length < 2:
        raise DataError(f"asked for {samples} samples of {length} tokens", hint="ask for at least 1 x 2")
    start = leading_tokens(tokenizer, bos)
    if len(start) >= length:
        raise DataError(
            f"asked for samples of {length} tokens, and {len(start)} of them start every text",
            hint="ask for longer samples, or for none (bos off)",
        )
    own = length - len(start)
    stream = _stream(tokenizer, texts, _READ * samples * length)
    found = len(stream) // own
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
    ids = torch.tensor(stream[: found * own], dtype=torch.int64).view(found, own)
    head = torch.tensor(start, dtype=torch.int64)
    reading = _reading(texts, source, take, _written(tokenizer, start) or None)
    return CalibrationSet(tuple(torch.cat([head, ids[i]]) for i in starts), source, (reading,))


def _reading(texts: Iterable[Document], source: str, samples: int, bos: str | None) -> Reading:
    """Return what was read of the documents, and say so."""
    if bos is not None:
        log.info("%s: each sample starts with %s", source, bos)
    if not isinstance(texts, Documents):
        return Reading(source, samples, bos=bos)
    if texts.skipped:
        log.info("%s: %d of %d rows are null or empty", source, texts.skipped, texts.rows)
    return Reading(source, samples, texts.columns, texts.rows, texts.skipped, bos)


def from_dataloader(
    batches: Iterable[Any], source: str = "dataloader", *, keep_order: bool = True
) -> CalibrationSet:
    """Return the samples of a host's DataLoader, padding removed.

    Without ``keep_order`` they are sorted by a digest of their content: hosts sort samples by length, or
    shuffle them, and the last ones, which are held out, must be typical and the same in every run.

    Raises:
        DataError: a batch has no ``input_ids`` of samples of equal length, or there is no token at all.
    """
    samples = []
    for batch in batches:
        if not hasattr(batch, "keys") or "input_ids" not in batch:
            keys = sorted(batch.keys()) if hasattr(batch, "keys") else type(batch).__name__
            raise DataError(f"a calibration batch has no input_ids: {keys}", hint="tokenize the dataset")
        ids, mask = _token_ids(batch), padding_mask(batch)
        for i, row in enumerate(ids):
            kept = row if mask is None else row[mask[i]]
            if len(kept) > 1:
                samples.append(kept.to(torch.int64))
    if not keep_order:
        samples.sort(key=lambda sample: hashlib.sha256(sample.contiguous().numpy()).digest())
    if not samples:
        raise DataError("the calibration data holds no sample of two tokens or more")
    return CalibrationSet(tuple(samples), source)


def _token_ids(batch: Any) -> torch.Tensor:
    """Return a batch's token ids, [B, T]."""
    try:
        ids = torch.as_tensor(batch["input_ids"]).cpu()
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the input_ids of a calibration batch are no table of numbers: {error}",
            hint="give batches of samples of equal length, or pad them and pass attention_mask",
        ) from None
    if ids.dim() != 2 or ids.is_floating_point():
        raise DataError(
            f"the input_ids of a calibration batch are {str(ids.dtype).removeprefix('torch.')}{list(ids.shape)}",
            hint="give integers [samples, tokens], also for a single sample",
        )
    return ids


def padding_mask(batch: Any) -> torch.Tensor | None:
    """Return bool[B, T], False where a host's batch is padded; None where no mask says so for each token."""
    mask = batch.get("attention_mask")
    if mask is None:
        return None
    mask = torch.as_tensor(mask).cpu()  # of other shapes are masks of who sees whom
    return mask.bool() if mask.shape == torch.as_tensor(batch["input_ids"]).shape else None


def check_ids(data: CalibrationSet, vocabulary: int) -> None:
    """Raise unless a model with embeddings for ``vocabulary`` tokens knows every token.

    Raises:
        DataError: it does not.
    """
    largest = max(int(sample.max()) for sample in data.samples)
    least = min(int(sample.min()) for sample in data.samples)
    if largest >= vocabulary or least < 0:
        raise DataError(
            f"{data.source} has token {least if least < 0 else largest:,}, and the model has embeddings for "
            f"{vocabulary:,} tokens, 0 to {vocabulary - 1:,}",
            hint="use the tokenizer that belongs to the model; tokens that were added to it need "
            "model.resize_token_embeddings",
        )
