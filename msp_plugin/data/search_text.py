"""How much text a search sets aside to measure candidates and to know when to stop."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from msp_plugin.data.calibration import CalibrationSet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchText:
    """How much text a search sets aside.

    Args:
        search: tokens that measure candidates.
        holdout: further tokens that decide when to stop.
        fit_search, fit_holdout: whether each may be less where the text is too short. Both together then get half of the
            samples, and a warning is logged. Without either, too short a text is an error.
    """

    search: int = 0
    holdout: int = 0
    fit_search: bool = False
    fit_holdout: bool = False

    @property
    def fit(self) -> bool:
        """True if both may be less."""
        return self.fit_search and self.fit_holdout

    @property
    def tokens(self) -> int:
        """Tokens of both together."""
        return self.search + self.holdout

    def within(self, tokens: int, data: CalibrationSet) -> SearchText:
        """Return less of the one that may be less, if only one may, so that both fit in ``tokens`` tokens of whole samples.

        The other keeps all that was asked for; the one that gives way keeps one sample at least.
        """
        if self.fit_search == self.fit_holdout:
            return self
        length = max(map(len, data.samples))
        firm = self.holdout if self.fit_search else self.search
        left = max(1, (tokens // length + -firm // length) * length)
        search, holdout = (
            (min(self.search, left), firm) if self.fit_search else (firm, min(self.holdout, left))
        )
        return SearchText(search, holdout)

    def warn_of_less(self, than: SearchText, data: CalibrationSet) -> None:
        """Log a warning that the samples are too few, and what this is instead of ``than``."""
        if self != than:
            log.warning(
                "%d samples with %d tokens: %d tokens measure candidates and %d decide when to stop, instead of %d and %d",
                len(data),
                data.tokens,
                self.search,
                self.holdout,
                than.search,
                than.holdout,
            )
