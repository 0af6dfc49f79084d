"""Turn text, or the batches of a host, into samples of token ids."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from msp_plugin.data.calibration import CalibrationSet, Reading
from msp_plugin.data.chats import Chat
from msp_plugin.data.sources import Document, Documents
from msp_plugin.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class ShortTextError(DataError):
    """A source has too few tokens; samples of at most ``longest`` tokens would do."""

    def __init__(self, message: str, *, hint: str, longest: int):
        super().__init__(message, hint=hint)
        self.longest = longest


#: At most this multiple of the needed tokens is read, so that a large corpus does not cost hours of tokenizing.
_READ = 32
#: Characters that are tokenized at once.
_PIECE = 2**20


def leading_tokens(tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> tuple[int, ...]:
    """Return the tokens that start a sample.

    Args:
        bos: None: the tokens that the tokenizer itself puts before a text, if any. True: the same, or its
            beginning-of-text token if there are none. False: no tokens.

    Raises:
        DataError: ``bos`` is True and the tokenizer has no such token.
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
    """Return tokens as the tokenizer writes them."""
    return "".join(tokenizer.convert_ids_to_tokens(list(tokens)))


def _pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces of about ``_PIECE`` characters, each ending with a line."""
    start = 0
    while start < len(text):
        cut = text.find("\n", start + _PIECE) + 1 or len(text)
        yield text[start:cut]
        start = cut


def _stream(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[Document], enough: int, bos: bool | None
) -> list[int]:
    """Return the tokens of documents: all, or a little more than ``enough`` of them.

    The end-of-text token ends each document. A conversation ends as its template writes it; the start tokens of the
    template are left out, because every sample gets its own; where ``bos`` is asked for or refused by name, so is a
    beginning-of-text token that only the template writes.
    """
    end, start = tokenizer.eos_token_id, _written(tokenizer, leading_tokens(tokenizer))
    if not start and bos is not None:
        start = str(tokenizer.bos_token or "")
    stream: list[int] = []
    for document in texts:
        chat = isinstance(document, Chat)
        text = document.text(tokenizer).removeprefix(start) if isinstance(document, Chat) else document
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
    hint: str = "give more text, or ask for fewer or shorter samples",
) -> CalibrationSet:
    """Return up to ``samples`` samples, each int64[length], cut from the joined documents.

    Documents end with the end-of-text token and are joined in order. If there is more text than needed, the samples
    are spread evenly over it, so that a corpus is not represented by its first document. At most ``_READ`` times the
    needed tokens are read.

    Args:
        source: its name, for the result and for errors.
        at_least: the fewest samples to accept; None accepts no fewer than ``samples``.
        seed: moves each sample at random within its share of the text; 0 does not.
        bos: which tokens start each sample; they count in its length (see leading_tokens).
        hint: the advice if there is too little text.

    Raises:
        ShortTextError: there is too little text.
        DataError: the length has no room beside the start tokens.
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
    stream = _stream(tokenizer, texts, _READ * samples * length, bos)
    count = len(stream) // own
    needed = samples if at_least is None else at_least
    if count < needed:
        raise ShortTextError(
            f"{source} has {len(stream):,} tokens: {count} samples of {length}; needed: {needed}",
            hint=hint,
            longest=len(stream) // needed + len(start),
        )
    ids = torch.tensor(stream[: count * own], dtype=torch.int64).view(count, own)
    head = torch.tensor(start, dtype=torch.int64)
    chosen = tuple(torch.cat([head, ids[i]]) for i in _spread(count, min(samples, count), seed))
    reading = _reading(texts, source, len(chosen), _written(tokenizer, start) or None)
    return CalibrationSet(chosen, source, (reading,))


def _spread(count: int, take: int, seed: int) -> list[int]:
    """Return ``take`` numbers below ``count``: evenly spaced, or with a seed one at random in each share."""
    edges = [i * count // take for i in range(take + 1)]
    if not seed:
        return edges[:-1]
    rng = np.random.default_rng(seed)
    return [int(rng.integers(low, high)) for low, high in pairwise(edges)]


def _reading(texts: Iterable[Document], source: str, samples: int, bos: str | None) -> Reading:
    """Return what was read of the documents, and log it."""
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
    """Return the samples of a host's DataLoader, without padding.

    Args:
        keep_order: keep the loader's order. Otherwise samples are sorted by a digest of their content: hosts sort
            samples by length or shuffle them, but the last ones are held out, and must be typical and the same in
            every run.

    Raises:
        DataError: a batch has no integer ``input_ids`` [B, T], or there are no samples of two tokens or more.
    """
    samples: list[torch.Tensor] = []
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
        samples.sort(key=lambda sample: hashlib.sha256(sample.contiguous().numpy().data).digest())
    if not samples:
        raise DataError("the calibration data holds no sample of two tokens or more")
    return CalibrationSet(tuple(samples), source)


def _token_ids(batch: Any) -> torch.Tensor:
    """Return a batch's token ids, an integer tensor [B, T] on the CPU.

    Raises:
        DataError: ``input_ids`` has another shape or dtype.
    """
    try:
        ids = torch.as_tensor(batch["input_ids"]).cpu()
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the input_ids of a calibration batch are not a table of numbers: {error}",
            hint="give batches of samples of equal length, or pad them and pass attention_mask",
        ) from None
    if ids.dim() != 2 or ids.is_floating_point():
        raise DataError(
            "the input_ids of a calibration batch are "
            f"{str(ids.dtype).removeprefix('torch.')}{list(ids.shape)}",
            hint="give integers [samples, tokens], also for a single sample",
        )
    return ids


def padding_mask(batch: Any) -> torch.Tensor | None:
    """Return bool[B, T], False for padding; None if the batch has no attention_mask of that shape."""
    mask = batch.get("attention_mask")
    if mask is None:
        return None
    mask = torch.as_tensor(mask).cpu()  # masks of other shapes tell which tokens attend to which
    return mask.bool() if mask.shape == torch.as_tensor(batch["input_ids"]).shape else None


def check_ids(data: CalibrationSet, vocabulary: int) -> None:
    """Raise unless all token ids are below ``vocabulary``, the number of a model's embeddings.

    Raises:
        DataError: an id is negative or too large.
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
