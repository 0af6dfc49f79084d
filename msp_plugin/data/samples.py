"""The text of a run: its sources, and its tokenized samples by purpose."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from msp_plugin.data.calibration import CalibrationSet, join
from msp_plugin.data.search_text import SearchText
from msp_plugin.data.sources import load_texts
from msp_plugin.data.tokenize import ShortTextError, check_ids, tokenize
from msp_plugin.errors import DataError, plain, shown
from msp_plugin.models.source import max_length, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

#: Default number of calibration samples, and the fewest that a short text may give instead.
SAMPLES, LEAST = 128, 8
#: Default number of test samples, and of tokens of a sample.
TEST_SAMPLES, LENGTH = 32, 2048
#: Fewest tokens of a sample that a short text is cut into where nobody gave a length: of less, most of the loss
#: comes from tokens without context.
LEAST_LENGTH = 64
#: Of a short text, one sample in this many is a test sample.
TEST_SHARE = 4

_T = TypeVar("_T")


@dataclass(frozen=True)
class Text:
    """The sources of a run's text, and how samples are made from them.

    Args:
        data: source of the calibration samples (see sources.load_texts).
        search: source of the samples that measure candidates; None takes them from the end of ``data``.
        test: source of the samples that measure perplexity; None sets samples of ``data`` aside.
        samples: number of calibration samples; None takes SAMPLES, or fewer if the text is short.
        length: tokens of a sample; None takes LENGTH, or the model's maximum if that is less, and less again if the
            text is short.
        test_samples: number of test samples; with 0 no perplexity is measured. None takes TEST_SAMPLES, or fewer if
            the text is short.
        column: the column of a table or dataset with the text, or with the messages of a conversation.
        batch: samples per forward pass of the host's calibration.
        seed: chooses the calibration and search samples at random; 0 spaces them evenly.
        bos: start each sample with the beginning-of-text token; None leaves it to the tokenizer.
        vocabulary: the model's number of embeddings; larger token ids are an error. None checks nothing.
        shortens: True where ``length`` is only a default, which ``fitted`` makes less for a short text.
    """

    data: str
    search: str | None = None
    test: str | None = None
    samples: int | None = None
    length: int | None = None
    test_samples: int | None = None
    column: str = "text"
    batch: int = 1
    seed: int = 0
    bos: bool | None = None
    vocabulary: int | None = None
    shortens: bool = False

    def __post_init__(self) -> None:
        for option, least in (("samples", 1), ("length", 2), ("test_samples", 0), ("batch", 1), ("seed", 0)):
            value = getattr(self, option)
            if value is not None and (type(value) is not int or value < least):
                raise DataError(f"{option} = {shown(value)}", hint=f"give a whole number, at least {least}")
        for option in ("data", "search", "test"):
            source = getattr(self, option)
            if isinstance(source, os.PathLike):
                object.__setattr__(self, option, os.fspath(source))
            elif source is None and option != "data":
                continue
            # A blank name would be the working directory.
            elif not isinstance(source, str) or not source.strip():
                raise DataError(f"{option} is {shown(source)}", hint="give one file, directory or dataset")

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
            return replace(self, length=min(LENGTH, most or LENGTH), shortens=True)
        if most is not None and self.length > most:
            raise DataError(
                f"samples of {self.length} tokens, the model takes {most} at most",
                hint="give a smaller length",
            )
        return self

    def fitted(self, load: Callable[[Text], _T]) -> _T:
        """Return the result of ``load`` with this text.

        If a source is too short for the default length, the length is the largest power of two that suits it.

        Raises:
            DataError: the length was given, or LEAST_LENGTH is too long as well; whatever else ``load`` raises.
        """
        text = self
        while True:
            try:
                return load(text)
            except ShortTextError as error:
                length = 2 ** max(0, error.longest.bit_length() - 1)
                if not self.shortens or length < LEAST_LENGTH:
                    raise
                log.warning(
                    "%s; samples have %d tokens instead of the default of %d",
                    error.message,
                    length,
                    self.sample_tokens,
                )
                text = replace(text, length=length)

    @property
    def tests(self) -> int:
        """The number of test samples, by default TEST_SAMPLES."""
        return TEST_SAMPLES if self.test_samples is None else self.test_samples

    @property
    def sample_tokens(self) -> int:
        """The tokens of a sample.

        Raises:
            DataError: the length is not known yet.
        """
        if self.length is None:
            raise DataError(
                "the length of samples is not known", hint="call for_model first, or give a length"
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
        **more: str,
    ) -> CalibrationSet:
        """Return up to ``samples`` samples of one source; the ``length`` must be known (see ``for_model``).

        Args:
            at_least: the fewest samples to accept; None accepts no fewer than ``samples``.
            more: ``hint`` of tokenize.

        Raises:
            ShortTextError: the source is too short.
            DataError: the source is missing or empty, or has tokens that the model does not know.
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
            **more,
        )
        if self.vocabulary is not None:
            check_ids(data, self.vocabulary)
        return data


#: Stands for samples that nobody needs.
NO_TEXT = CalibrationSet((), "none")


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
    ``length`` must be known (see ``Text.for_model``). If the text is short, only what was asked for by name is
    refused: defaults are made less, with a warning.

    Raises:
        DataError: a source is missing, empty or too short, or most test samples are calibration samples too.
    """
    return text.fitted(lambda fitted: _load_split(tokenizer, fitted, asked))


def _load_split(tokenizer: PreTrainedTokenizerBase, text: Text, asked: SearchText) -> TextSplit:
    """Return the tokenized samples of a run with the length of ``text``; the longest source is read last.

    Raises:
        ShortTextError: a source is too short.
        DataError: see load_split.
    """
    search = test = NO_TEXT
    if text.search and asked.tokens:
        search = _search_samples(tokenizer, text, text.search, asked)
    if text.test and text.tests:
        test = text.read(tokenizer, text.test, text.tests, at_least=1)
    data, reserved = _calibration_and_test(tokenizer, text)
    cut = len(data) - reserved
    parts = [_part(data, data.source, 0, cut), *([search] if search else [])]
    if text.test:
        test = _apart(test, parts)
    elif reserved:
        test = _part(data, f"{data.source} [{cut}:]", cut, len(data))
    pruning = join(parts)
    if not search:
        return split_text(pruning, asked, test)
    calibration, searched = pruning.cut(search.tokens)
    if search.tokens < asked.tokens:
        whole, asked = asked, asked.within(search.tokens, search)
        asked.warn_of_less(whole, search)
    return _with_holdout(TextSplit(calibration, searched, NO_TEXT, test, pruning), asked, search)


def _search_samples(
    tokenizer: PreTrainedTokenizerBase, text: Text, source: str, asked: SearchText
) -> CalibrationSet:
    """Return the samples of a search's own text, one for each part at least if they may be fewer than asked for.

    Raises:
        ShortTextError: the source is too short.
    """
    counts = [-(-tokens // text.sample_tokens) for tokens in (asked.search, asked.holdout)]
    parts = zip(counts, (asked.fit_search, asked.fit_holdout), strict=True)
    least = sum(min(count, 1) if fit else count for count, fit in parts)
    less = "ask for shorter samples" if asked.fit else "set the allocator's tokens and holdout to less"
    return text.read(
        tokenizer,
        source,
        sum(counts),
        at_least=least if asked.fit_search or asked.fit_holdout else None,
        seed=text.seed,
        hint=f"give more text for the search, or {less}",
    )


def split_text(
    data: CalibrationSet, asked: SearchText, test: CalibrationSet = NO_TEXT, *, warn: bool = True
) -> TextSplit:
    """Return the samples of one set by purpose.

    The last samples are the hold-out, those before them the search text; all others calibrate.

    Args:
        warn: log a warning if the text is too short and ``asked`` accepts that.

    Raises:
        DataError: see CalibrationSet.split.
    """
    try:
        head, held_out = _held_out(data, asked)
    except DataError:
        if asked.fit_search == asked.fit_holdout:
            raise
        whole, asked = asked, asked.within(data.tokens // 2, data)
        head, held_out = _held_out(data, asked)
        if warn:
            asked.warn_of_less(whole, data)
    return _with_holdout(TextSplit(head, held_out, NO_TEXT, test, data), asked, data, warn=warn)


def _held_out(data: CalibrationSet, asked: SearchText) -> tuple[CalibrationSet, CalibrationSet]:
    """Return the samples that calibrate, and the last ones, enough for search text and hold-out in whole samples.

    Raises:
        DataError: see CalibrationSet.split.
    """
    head, held_out = data.split(asked.tokens, fit=asked.fit)
    if held_out.tokens >= asked.tokens:
        search, holdout = held_out.cut(asked.holdout)
        if search.tokens < asked.search:  # the hold-out, in whole samples, took from it
            return data.split(holdout.tokens + asked.search, fit=asked.fit)
    return head, held_out


def _with_holdout(
    split: TextSplit, asked: SearchText, whole: CalibrationSet, *, warn: bool = True
) -> TextSplit:
    """Return the samples with the last ones of the search text as hold-out, in proportion if they are too few.

    Args:
        whole: the samples that were too few, for the warning.
    """
    tokens = split.search.tokens
    short = tokens < asked.tokens
    search, holdout = split.search.cut(tokens * asked.holdout // asked.tokens if short else asked.holdout)
    if holdout and not search:
        search, holdout = holdout, search
    if short and warn:
        log.warning(
            "%d samples with %d tokens: candidates are measured on %d tokens, and %d decide when to stop, instead "
            "of %d and %d; more or longer samples make the search more reliable",
            len(whole),
            whole.tokens,
            search.tokens,
            holdout.tokens,
            asked.search,
            asked.holdout,
        )
    return replace(split, search=search, holdout=holdout)


def _calibration_and_test(tokenizer: PreTrainedTokenizerBase, text: Text) -> tuple[CalibrationSet, int]:
    """Return the samples of ``text.data``, and how many of the last ones are test samples.

    Raises:
        ShortTextError: the source is too short for what was asked for by name, or for LEAST samples.
    """
    reserved, hint = 0 if text.test else text.tests, {}
    wanted = (text.samples or SAMPLES) + reserved
    least = min(wanted, LEAST)
    if text.samples:
        least = text.samples if text.test_samples is None else wanted
        if least > text.samples:
            more = f"give more text, of its own for the {reserved} test samples, or ask for fewer"
            hint = {"hint": f"{more} of them, or for fewer or shorter samples"}
    data = text.read(tokenizer, text.data, wanted, at_least=least, seed=text.seed, **hint)
    if len(data) < wanted:
        most = len(data) - text.samples if text.samples else len(data) // TEST_SHARE
        reserved = min(reserved, most)
        tested = f", {reserved or 'none'} test" if text.tests and not text.test else ""
        log.warning(
            "%s has %d samples of %d tokens, fewer than the default of %d: %d calibrate%s",
            data.source,
            len(data),
            text.sample_tokens,
            wanted,
            len(data) - reserved,
            tested,
        )
    return data, reserved


def _apart(test: CalibrationSet, parts: Sequence[CalibrationSet]) -> CalibrationSet:
    """Return the test samples that are no samples of another part; a warning counts the others.

    Raises:
        DataError: those are more than half.
    """
    others = {tuple(sample.tolist()) for part in parts for sample in part.samples}
    own = tuple(sample for sample in test.samples if tuple(sample.tolist()) not in others)
    shared = len(test) - len(own)
    if 2 * shared > len(test):
        raise DataError(
            f"{shared} of {len(test)} test samples are calibration samples too", hint="give another test text"
        )
    if not shared:
        return test
    said = "%d of %d test samples are calibration samples too, and are left out: give another test text"
    log.warning(said, shared, len(test))
    readings = tuple(replace(reading, samples=reading.samples - shared) for reading in test.readings)
    return replace(test, samples=own, readings=readings)


def _part(data: CalibrationSet, source: str, start: int, end: int) -> CalibrationSet:
    """Return the samples from ``start`` to ``end`` under another source name."""
    readings = tuple(replace(reading, samples=end - start) for reading in data.readings)
    return CalibrationSet(data.samples[start:end], source, readings)
