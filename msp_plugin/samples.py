"""The text of a run: which sources, how many samples, and the samples themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from msp_plugin.calibration import CalibrationSet, join, load_texts, tokenize
from msp_plugin.errors import DataError
from msp_plugin.models import max_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Text:
    """Which text a run uses.

    Args:
        data: source of the calibration samples (see calibration.load_texts).
        search: source of the samples that measure candidates; None takes them from the end of ``data``.
        test: source of the perplexity's samples; None sets samples of ``data`` aside for it.
        samples: calibration samples.
        length: tokens of a sample; None takes 2,048, or the model's maximum if that is less.
        test_samples: samples of the perplexity; 0 measures none.
        column: of the text in jsonl files and datasets.
        batch: samples per forward pass of the host's calibration.
        seed: of the choice of calibration and search samples; 0 spaces them evenly.
    """

    data: str
    search: str | None = None
    test: str | None = None
    samples: int = 128
    length: int | None = None
    test_samples: int = 32
    column: str = "text"
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for option, least in (("samples", 1), ("length", 2), ("test_samples", 0), ("batch", 1), ("seed", 0)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise DataError(f"{option} = {value}", hint=f"give at least {least}")

    def for_model(self, source: str | Path, *, trust_remote_code: bool = False) -> Text:
        """Return this text with a length that the model can take.

        Raises:
            DataError: the asked length is beyond the model's maximum.
        """
        return self.within(max_length(source, trust_remote_code=trust_remote_code))

    def within(self, most: int | None) -> Text:
        """Return this text with a length of at most ``most`` tokens, where a model has a maximum.

        Raises:
            DataError: the asked length is beyond it.
        """
        if self.length is None:
            return replace(self, length=min(2048, most or 2048))
        if most is not None and self.length > most:
            raise DataError(
                f"samples of {self.length} tokens, the model takes {most} at most",
                hint="give a smaller length",
            )
        return self


@dataclass(frozen=True)
class Samples:
    """Tokenized text: what calibrates and searches, and what tests. They share no sample."""

    calibration: CalibrationSet
    test: CalibrationSet | None


def load_samples(tokenizer: PreTrainedTokenizerBase, text: Text, search_tokens: int = 0) -> Samples:
    """Return the tokenized samples of a run.

    The search's samples are the last ones of ``calibration``, where the modifier looks for them. The
    text's ``length`` must be known (see ``Text.for_model``).

    Raises:
        DataError: a source is missing, empty or too short.
    """
    held_out = -(-search_tokens // text.length) if text.search and search_tokens else 0
    reserved = 0 if text.test else text.test_samples
    documents = load_texts(text.data, text.column)
    found = tokenize(
        tokenizer, documents, samples=text.samples + reserved, length=text.length, source=text.data,
        seed=text.seed,
    )  # fmt: skip
    cut = len(found) - reserved
    parts = [CalibrationSet(found.samples[:cut], text.data)]
    test = CalibrationSet(found.samples[cut:], f"{text.data} [{cut}:]") if reserved else None
    if held_out:
        parts.append(
            tokenize(
                tokenizer, load_texts(text.search, text.column), samples=held_out, length=text.length,
                source=text.search, seed=text.seed,
            )
        )  # fmt: skip
    if text.test and text.test_samples:
        test = tokenize(
            tokenizer, load_texts(text.test, text.column), samples=text.test_samples,
            length=text.length, source=text.test, at_least=1,
        )  # fmt: skip
    if text.test and test is not None:
        known = {tuple(s.tolist()) for part in parts for s in part.samples}
        shared = sum(tuple(s.tolist()) in known for s in test.samples)
        if 2 * shared > len(test):
            raise DataError(
                f"{shared} of {len(test)} test samples are calibration samples too",
                hint="give another test text",
            )
    return Samples(join(parts), test)
