"""OBS: remove heads and channels one after the other, and fit the columns that stay by least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from msp_plugin.errors import RecipeError
from msp_plugin.pruning import masks, structured
from msp_plugin.pruning.structured import Cut, HalfInputs, WidthPruner
from msp_plugin.structure import obs
from msp_plugin.structure.obs import remove_groups


@dataclass(frozen=True)
class OBS(WidthPruner):
    """Optimal Brain Surgeon on groups of columns of the last layer (ZipLM, arXiv 2302.04089; OSSCAR 2403.12983; Týr 2503.09657).

    The group goes whose removal changes the output least after the columns that stay have made up for it, and so on; one
    order serves all widths, and each gets the exact least squares fit (see remove_groups).

    Args:
        damping: share of the mean square of the inputs that is added to all of them.
        rounds: removals happen in about so many rounds, each of equally many groups; up to so many heads go one by one.
    """

    name = "obs"
    arithmetic = (masks, structured, obs)
    keeps_gram = True

    damping: float = 0.01
    rounds: int = 64

    def __post_init__(self) -> None:
        if not self.damping > 0 or self.rounds < 1:
            raise RecipeError(
                f"obs: damping = {self.damping} must be above 0, rounds = {self.rounds} at least 1"
            )

    def cuts(self, half: HalfInputs, counts: Sequence[int]) -> Mapping[int, Cut]:
        last = half.output
        assert last.inputs.gram is not None
        gram = last.inputs.gram.double()
        mean = float(gram.diagonal().mean()) or 1.0
        gram.diagonal().add_(self.damping * mean)
        found = remove_groups(last.weight, gram, half.groups, counts, -(-half.groups // self.rounds))
        cuts = {}
        for count, removal in found.items():
            kept = torch.zeros(half.groups, dtype=torch.bool, device=gram.device)
            kept[list(removal.kept)] = True
            cuts[count] = Cut(kept, removal.weight)
        return cuts
