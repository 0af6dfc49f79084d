"""The text of a run: its sources, and its tokenized samples by purpose."""

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

#: Default number of calibration samples, and the fewest that a short text may give instead.
SAMPLES, LEAST = 128, 8
#: Of a short text, one sample in this many is a test sample.
TEST_SHARE = 4


@dataclass(frozen=True)
class Text:
    """The sources of a run's text, and how samples are made from them.

    Args:
        data: source of the calibration samples (see sources.load_texts).
        search: source of the samples that measure candidates; None takes them from the end of ``data``.
        test: source of the samples that measure perplexity; None sets samples of ``data`` aside.
        samples: number of calibration samples; None takes SAMPLES, or fewer if the text is short.
        length: tokens of a sample; None takes 2,048, or the model's maximum if that is less.
        test_samples: number of test samples; with 0 no perplexity is measured.
        column: the column of a table or dataset with the text, or with the messages of a conversation.
        batch: samples per forward pass of the host's calibration.
        seed: chooses the calibration and search samples at random; 0 spaces them evenly.
        bos: start each sample with the beginning-of-text token; None leaves it to the tokenizer.
        vocabulary: the model's number of embeddings; larger token ids are an error. None checks nothing.
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
        """Return this text with the length and the vocabulary of a model.

        Raises:
            DataError: the requested length is above the model's maximum.
        """
        known = replace(self, vocabulary=vocabulary(source, trust_remote_code=trust_remote_code))
        return known.within(max_length(source, trust_remote_code=trust_remote_code))

    def within(self, most: int | None) -> Text:
        """Return this text with a length of at most ``most`` tokens; None means no maximum.

        Raises:
            DataError: the requested length is above ``most``.
        """
        if self.length is None:
            return replace(self, length=min(2048, most or 2048))
        if most is not None and self.length > most:
            raise DataError(
                f"samples of {self.length} tokens, the model takes {most} at most",
                hint="give a smaller length",
            )
        return self

    @property
    def sample_tokens(self) -> int:
        """The tokens of a sample.

        Raises:
            DataError: the length is not known yet.
        """
        if self.length is None:
            raise DataError(
                "the length of samples is not known yet", hint="call for_model first, or give a length"
            )
        return self.length

    def read(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        samples: int,
        *,
        at_least: int | None = None,
        seed: int = 0,
    ) -> CalibrationSet:
        """Return up to ``samples`` samples of one source; the ``length`` must be known (see ``for_model``).

        Args:
            at_least: the fewest samples to accept; None accepts no fewer than ``samples``.

        Raises:
            DataError: the source is missing, empty or too short, or has tokens that the model does not know.
        """
        data = tokenize(
            tokenizer,
            load_texts(source, self.column),
            samples=samples,
            length=self.sample_tokens,
            source=plain(source),
            at_least=at_least,
            seed=seed,
            bos=self.bos,
        )
        if self.vocabulary is not None:
            check_ids(data, self.vocabulary)
        return data


#: Stands for samples that nobody needs.
NO_TEXT = CalibrationSet((), "none")


@dataclass(frozen=True)
class SearchText:
    """How much text a search sets aside.

    Args:
        search: tokens that measure candidates.
        holdout: further tokens that decide when to stop.
        fit: if the text is too short for both, take half of its samples and log a warning; otherwise raise.
    """

    search: int = 0
    holdout: int = 0
    fit: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of both together."""
        return self.search + self.holdout


@dataclass(frozen=True)
class TextSplit:
    """The samples of a run by purpose; NO_TEXT where there are none. The test shares no sample with the others.

    Args:
        calibration: for the search's sensitivities and pruning statistics.
        search: measures candidates.
        holdout: decides when a search stops.
        test: measures perplexity.
        pruning: calibrates the final pruning: calibration, search and hold-out in the order of reading.
    """

    calibration: CalibrationSet = NO_TEXT
    search: CalibrationSet = NO_TEXT
    holdout: CalibrationSet = NO_TEXT
    test: CalibrationSet = NO_TEXT
    pruning: CalibrationSet = NO_TEXT


def load_split(tokenizer: PreTrainedTokenizerBase, text: Text, asked: SearchText = SearchText()) -> TextSplit:
    """Return the tokenized samples of a run.

    The samples of the search come from ``text.search``, or else from the end of ``text.data``. The text's
    ``length`` must be known (see ``Text.for_model``).

    Raises:
        DataError: a source is missing, empty or too short, or most test samples are calibration samples too.
    """
    data, reserved = _calibration_and_test(tokenizer, text)
    cut = len(data) - reserved
    parts = [_part(data, data.source, 0, cut)]
    test = _part(data, f"{data.source} [{cut}:]", cut, len(data)) if reserved else NO_TEXT
    if text.search and asked.tokens:
        samples = -(-asked.tokens // text.sample_tokens)
        parts.append(text.read(tokenizer, text.search, samples, seed=text.seed))
    if text.test and text.test_samples:
        test = text.read(tokenizer, text.test, text.test_samples, at_least=1)
        _check_apart(test, parts)
    return split_text(join(parts), asked, test)


def split_text(
    data: CalibrationSet, asked: SearchText, test: CalibrationSet = NO_TEXT, *, warn: bool = True
) -> TextSplit:
    """Return the samples of one set by purpose.

    The last samples are the hold-out, those before them the search text; all others calibrate.

    Args:
        warn: log a warning if the text is too short and ``asked.fit`` accepts that.

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
                "%d samples with %d tokens: candidates are measured on %d tokens, and %d decide when to stop, instead "
                "of %d and %d; more or longer samples make the search more reliable",
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


def _calibration_and_test(tokenizer: PreTrainedTokenizerBase, text: Text) -> tuple[CalibrationSet, int]:
    """Return the samples of ``text.data``, and how many of the last ones are test samples."""
    reserved = 0 if text.test else text.test_samples
    wanted = (text.samples or SAMPLES) + reserved
    at_least = None if text.samples else min(wanted, LEAST)
    data = text.read(tokenizer, text.data, wanted, at_least=at_least, seed=text.seed)
    if len(data) < wanted:
        reserved = min(reserved, len(data) // TEST_SHARE)
        log.warning(
            "%s has %d samples of %d tokens, fewer than the default of %d: %d calibrate%s",
            data.source,
            len(data),
            text.sample_tokens,
            wanted,
            len(data) - reserved,
            f", {reserved} test" if reserved else "",
        )
    return data, reserved


def _check_apart(test: CalibrationSet, parts: Sequence[CalibrationSet]) -> None:
    """Raise DataError if more than half of the test samples are samples of another part too."""
    others = {tuple(sample.tolist()) for part in parts for sample in part.samples}
    shared = sum(tuple(sample.tolist()) in others for sample in test.samples)
    if 2 * shared > len(test):
        raise DataError(
            f"{shared} of {len(test)} test samples are calibration samples too", hint="give another test text"
        )


def _part(data: CalibrationSet, source: str, start: int, end: int) -> CalibrationSet:
    """Return the samples from ``start`` to ``end`` under another source name."""
    readings = tuple(replace(reading, samples=end - start) for reading in data.readings)
    return CalibrationSet(data.samples[start:end], source, readings)
