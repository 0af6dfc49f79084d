"""The text of a run: which sources, how many samples, and the samples themselves, by their use."""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        samples: int,
        *,
        at_least: int | None = None,
        seed: int = 0,
    ) -> CalibrationSet:
        """Return the samples of one source; the ``length`` must be known (see ``for_model``).

        Raises:
            DataError: it is missing, empty or too short, or has tokens that the model does not know.
        """
        found = tokenize(
            tokenizer,
            load_texts(source, self.column),
            samples=samples,
            length=self.length,
            source=plain(source),
            at_least=at_least,
            seed=seed,
            bos=self.bos,
        )
        if self.vocabulary is not None:
            check_ids(found, self.vocabulary)
        return found


#: Stands for samples that nothing asks for.
NO_TEXT = CalibrationSet((), "none")


@dataclass(frozen=True)
class SearchText:
    """How much text a search sets aside.

    Args:
        search: tokens that measure candidates.
        holdout: further tokens that tell when to stop.
        fit: where the text is too short for that, take half of its samples, and say so; else that is an error.
    """

    search: int = 0
    holdout: int = 0
    fit: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that measure candidates or tell when to stop."""
        return self.search + self.holdout


@dataclass(frozen=True)
class TextSplit:
    """The samples of a run, by their use; NO_TEXT where there is none. The test shares no sample with the others.

    Args:
        calibration: gives the search its sensitivities and pruning statistics.
        search: measures candidates.
        holdout: tells a search when to stop.
        test: gives the perplexity.
        pruning: calibrates the final pruning: calibration, search and hold-out, in the order in which they were read.
    """

    calibration: CalibrationSet = NO_TEXT
    search: CalibrationSet = NO_TEXT
    holdout: CalibrationSet = NO_TEXT
    test: CalibrationSet = NO_TEXT
    pruning: CalibrationSet = NO_TEXT


def load_split(tokenizer: PreTrainedTokenizerBase, text: Text, asked: SearchText = SearchText()) -> TextSplit:
    """Return the tokenized samples of a run.

    The search's samples come from ``text.search``, or else from the end of ``text.data``. The text's ``length``
    must be known (see ``Text.for_model``).

    Raises:
        DataError: a source is missing, empty or too short.
    """
    held_out = -(-asked.tokens // text.length) if text.search and asked.tokens else 0
    reserved = 0 if text.test else text.test_samples
    wanted = (text.samples or SAMPLES) + reserved
    least = None if text.samples else min(wanted, LEAST)
    found = text.read(tokenizer, text.data, wanted, at_least=least, seed=text.seed)
    if len(found) < wanted:
        reserved = min(reserved, len(found) // TEST_SHARE)
        log.warning(
            "%s has %d samples of %d tokens, fewer than the default of %d: %d calibrate%s",
            found.source,
            len(found),
            text.length,
            wanted,
            len(found) - reserved,
            f", {reserved} test" if reserved else "",
        )
    cut = len(found) - reserved
    parts = [_part(found, found.source, 0, cut)]
    test = _part(found, f"{found.source} [{cut}:]", cut, len(found)) if reserved else NO_TEXT
    if held_out:
        parts.append(text.read(tokenizer, text.search, held_out, seed=text.seed))
    if text.test and text.test_samples:
        test = text.read(tokenizer, text.test, text.test_samples, at_least=1)
        _check_apart(test, parts)
    return split_text(join(parts), asked, test)


def _check_apart(test: CalibrationSet, others: Sequence[CalibrationSet]) -> None:
    known = {tuple(s.tolist()) for part in others for s in part.samples}
    shared = sum(tuple(s.tolist()) in known for s in test.samples)
    if 2 * shared > len(test):
        raise DataError(
            f"{shared} of {len(test)} test samples are calibration samples too", hint="give another test text"
        )


def split_text(
    data: CalibrationSet, asked: SearchText, test: CalibrationSet = NO_TEXT, *, warn: bool = True
) -> TextSplit:
    """Return the samples of one set by their use.

    The last samples are the hold-out, those before them the search text; all others calibrate.

    Args:
        warn: log that the text is too short for what is asked, where ``asked`` lets it fit.

    Raises:
        DataError: see CalibrationSet.split.
    """
    head, held_out = data.split(asked.tokens, fit=asked.fit)
    if held_out.tokens < asked.tokens:
        search, holdout = held_out.cut(held_out.tokens * asked.holdout // asked.tokens)
        if not search:
            search, holdout = holdout, search
        if warn:
            log.warning(
                "%d samples with %d tokens: candidates are measured on %d tokens, and %d tell when to stop, instead "
                "of %d and %d; with more or longer samples the choice is surer",
                len(data),
                data.tokens,
                search.tokens,
                holdout.tokens,
                asked.search,
                asked.holdout,
            )
        return TextSplit(head, search, holdout, test, data)
    search, holdout = held_out.cut(asked.holdout)
    if search.tokens < asked.search:  # the hold-out, in whole samples, took from it
        head, held_out = data.split(holdout.tokens + asked.search, fit=asked.fit)
        search, holdout = held_out.cut(asked.holdout)
    return TextSplit(head, search, holdout, test, data)


def _part(data: CalibrationSet, source: str, start: int, end: int) -> CalibrationSet:
    readings = tuple(replace(reading, samples=end - start) for reading in data.readings)
    return CalibrationSet(data.samples[start:end], source, readings)
