"""The text of a run: which sources, how many samples, and the samples themselves."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from msp_plugin.data.calibration import CalibrationSet, join
from msp_plugin.data.sources import load_texts
from msp_plugin.data.tokenize import check_ids, tokenize
from msp_plugin.errors import DataError, plain
from msp_plugin.models.source import max_length, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

#: Calibration samples where nobody says how many, and how few do if the text holds no more.
SAMPLES, LEAST = 128, 8
#: Of a short text, one sample in so many tests.
TEST_SHARE = 4


@dataclass(frozen=True)
class Text:
    """Which text a run uses.

    Args:
        data: source of the calibration samples (see calibration.load_texts).
        search: source of the samples that measure candidates; None takes them from the end of ``data``.
        test: source of the perplexity's samples; None sets samples of ``data`` aside for it.
        samples: calibration samples; None takes SAMPLES, or fewer where the text is short.
        length: tokens of a sample; None takes 2,048, or the model's maximum if that is less.
        test_samples: samples of the perplexity; 0 measures none.
        column: of the text, or of a conversation's messages, in tables and datasets.
        batch: samples per forward pass of the host's calibration.
        seed: of the choice of calibration and search samples; 0 spaces them evenly.
        bos: start each sample with the beginning-of-text token; None does what the tokenizer does by itself.
        vocabulary: ids of the model's embeddings, beyond which no token may be; None does not look.
    """

    data: str
    search: str | None = None
    test: str | None = None
    samples: int | None = None
    length: int | None = None
    test_samples: int = 32
    column: str = "text"
    batch: int = 1
    seed: int = 0
    bos: bool | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        for option, least in (("samples", 1), ("length", 2), ("test_samples", 0), ("batch", 1), ("seed", 0)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise DataError(f"{option} = {value}", hint=f"give at least {least}")

    def for_model(self, source: str | Path, *, trust_remote_code: bool = False) -> Text:
        """Return this text with a length and a vocabulary that the model can take.

        Raises:
            DataError: the asked length is beyond the model's maximum.
        """
        known = replace(self, vocabulary=vocabulary(source, trust_remote_code=trust_remote_code))
        return known.within(max_length(source, trust_remote_code=trust_remote_code))

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

    def read(
        self, tokenizer: PreTrainedTokenizerBase, source: str, samples: int, *, at_least: int | None = None,
        seed: int = 0,
    ) -> CalibrationSet:  # fmt: skip
        """Return the samples of one source; the ``length`` must be known (see ``for_model``).

        Raises:
            DataError: it is missing, empty or too short, or has tokens that the model does not know.
        """
        found = tokenize(
            tokenizer, load_texts(source, self.column), samples=samples, length=self.length, source=plain(source),
            at_least=at_least, seed=seed, bos=self.bos,
        )  # fmt: skip
        if self.vocabulary is not None:
            check_ids(found, self.vocabulary)
        return found


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
    wanted = (text.samples or SAMPLES) + reserved
    least = None if text.samples else min(wanted, LEAST)
    found = text.read(tokenizer, text.data, wanted, at_least=least, seed=text.seed)
    if len(found) < wanted:
        reserved = min(reserved, len(found) // TEST_SHARE)
        log.warning(
            "%s has %d samples of %d tokens, fewer than the default of %d: %d calibrate%s",
            found.source, len(found), text.length, wanted, len(found) - reserved, f", {reserved} test" if reserved else "",
        )  # fmt: skip
    cut = len(found) - reserved
    parts = [_part(found, found.source, 0, cut)]
    test = _part(found, f"{found.source} [{cut}:]", cut, len(found)) if reserved else None
    if held_out:
        parts.append(text.read(tokenizer, text.search, held_out, seed=text.seed))
    if text.test and text.test_samples:
        test = text.read(tokenizer, text.test, text.test_samples, at_least=1)
    if text.test and test is not None:
        known = {tuple(s.tolist()) for part in parts for s in part.samples}
        shared = sum(tuple(s.tolist()) in known for s in test.samples)
        if 2 * shared > len(test):
            raise DataError(
                f"{shared} of {len(test)} test samples are calibration samples too",
                hint="give another test text",
            )
    return Samples(join(parts), test)


def _part(data: CalibrationSet, source: str, start: int, end: int) -> CalibrationSet:
    readings = tuple(replace(reading, samples=end - start) for reading in data.readings)
    return CalibrationSet(data.samples[start:end], source, readings)
