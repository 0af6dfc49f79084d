"""llm-compressor's pruning methods.

``mask_structure`` in llm-compressor counts the *pruned* weights of M; our levels count the kept
ones. The final pruning runs the host's own modifiers for the levels that they can make, plain ``N:M``
(engines.py). The level database, and the other levels, use the host's statistics and layer-wise
functions; where those are ours, they give what the host gives, bit for bit.
"""

from __future__ import annotations

import importlib.metadata
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from msp_plugin.errors import RecipeError
from msp_plugin.hosts.llm_compressor import require_host
from msp_plugin.plan.levels import Kind, Level
from msp_plugin.pruning import masks, sparsegpt
from msp_plugin.pruning.base import Pruner
from msp_plugin.pruning.masks import lowest_by_topk, nm_masks
from msp_plugin.pruning.sparsegpt import InverseFactor, factor_inverse, quadratic_form, sparsegpt_levels


class HostPruner(Pruner):
    """A method whose final pruning is a modifier of llm-compressor, one instance per level.

    A third party's modifier joins by subclassing: name its class in ``modifier`` and give the level
    database the layer-wise functions. Levels that the modifier cannot make are refused, unless
    ``check_level`` says that the layer-wise functions can.
    """

    host: ClassVar[str] = "llmcompressor"
    modifier: ClassVar[str]

    def version(self) -> str:
        require_host()
        return importlib.metadata.version("llmcompressor")

    def check_level(self, level: Level) -> None:
        self.check_modifier(level)

    def check_modifier(self, level: Level) -> None:
        """Raise RecipeError if the host's own modifier cannot make ``level``."""
        if level.kind is not Kind.NM:
            raise RecipeError(
                f"{self.modifier} of {self.host} cannot make level {level}",
                hint="it makes N:M, and of shares of zeros no exact count: use levels such as 2:4",
            )

    @abstractmethod
    def modifier_arguments(self, level: Level) -> dict[str, Any]:
        """Return the modifier's arguments for one level, without targets and ignore."""

    def check_statistics(self, instance: Any, names: dict[torch.nn.Module, str]) -> None:
        """Raise if the modifier instance is about to prune from unusable statistics."""


def _structure(level: Level) -> str:
    return f"{level.m - level.n}:{level.m}"


@dataclass
class InputHessian:
    """SparseGPT's statistic of one input: the host's Hessian float32[I, I] over so many samples and tokens.

    ``factor`` is made of it when the first layer is pruned; the layers that share the input share it.
    """

    hessian: torch.Tensor
    samples: int = 0
    tokens: int = 0
    factor: InverseFactor | None = None


@dataclass(frozen=True)
class SparseGPT(HostPruner):
    """SparseGPT (arXiv 2301.00774) by llm-compressor's SparseGPTModifier.

    The level database, and levels that the modifier cannot make, go through our own column loop.

    Args:
        block_size: columns compressed in one pass; a multiple of every M.
        dampening_frac: share of the Hessian's mean diagonal that is added to it.
    """

    name = "sparsegpt"
    modifier = "SparseGPTModifier"
    arithmetic = (masks, sparsegpt)

    block_size: int = 128
    dampening_frac: float = 0.01

    def __post_init__(self) -> None:
        if self.block_size < 1 or not self.dampening_frac >= 0:
            raise RecipeError("sparsegpt: block_size must be at least 1 and dampening_frac at least 0")

    def check_level(self, level: Level) -> None:
        if level.kind is not Kind.SHARE and self.block_size % level.m:
            raise RecipeError(
                f"sparsegpt: block_size {self.block_size} is no multiple of the M of level {level}",
                hint="the pattern would break at the block's edge; change block_size",
            )

    def modifier_arguments(self, level: Level) -> dict[str, Any]:
        return {
            "sparsity": float(level.sparsity),
            "mask_structure": _structure(level),
            "block_size": self.block_size,
            "dampening_frac": self.dampening_frac,
        }

    def check_statistics(self, instance: Any, names: dict[torch.nn.Module, str]) -> None:
        for module, hessian in instance._hessians.items():
            factor_inverse(hessian, self.dampening_frac, names.get(module, "a layer"))

    def statistic_bytes(self, module: torch.nn.Linear) -> int:
        return 4 * module.in_features**2

    def new_statistic(self, module: torch.nn.Linear) -> InputHessian:
        require_host()
        from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import make_empty_hessian

        return InputHessian(make_empty_hessian(module))

    def observe(self, module: torch.nn.Linear, inputs: torch.Tensor, statistic: InputHessian) -> InputHessian:
        from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import accumulate_hessian

        hessian, samples = accumulate_hessian(inputs, module, statistic.hessian, statistic.samples)
        return InputHessian(hessian, samples, statistic.tokens + inputs[..., 0].numel())

    def prune_levels(
        self, module: torch.nn.Linear, statistic: InputHessian, levels: Sequence[Level], layer: str
    ) -> Iterator[torch.Tensor]:
        weight = module.weight.detach()
        if statistic.factor is None:  # else another layer of this input left it
            statistic.factor = factor_inverse(statistic.hessian, self.dampening_frac, layer)
        sparse = [level for level in levels if not level.is_dense]
        pruned = iter(sparsegpt_levels(weight, statistic.factor, sparse, self.block_size))
        for level in levels:
            yield weight.clone() if level.is_dense else next(pruned)

    def output_error(self, delta: torch.Tensor, statistic: InputHessian) -> float:
        """Exact over the calibration tokens: the host's H is 2 / samples * sum x x^T."""
        total = quadratic_form(delta, statistic.hessian)
        return total * statistic.samples / (2 * statistic.tokens)


@dataclass(frozen=True)
class Wanda(HostPruner):
    """Wanda (arXiv 2306.11695) by llm-compressor's WandaPruningModifier.

    Levels that the modifier cannot make are masked by the same score.
    """

    name = "wanda"
    modifier = "WandaPruningModifier"

    def check_level(self, level: Level) -> None:
        """All levels can be made."""

    def modifier_arguments(self, level: Level) -> dict[str, Any]:
        return {"sparsity": float(level.sparsity), "mask_structure": _structure(level)}

    def statistic_bytes(self, module: torch.nn.Linear) -> int:
        return 4 * module.in_features

    def new_statistic(self, module: torch.nn.Linear) -> list[Any]:
        require_host()
        from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import make_empty_row_scalars

        return [make_empty_row_scalars(module), 0, 0]

    def observe(self, module: torch.nn.Linear, inputs: torch.Tensor, statistic: list[Any]) -> list[Any]:
        from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import accumulate_row_scalars

        scalars, samples = accumulate_row_scalars(inputs, module, statistic[0], statistic[1])
        return [scalars, samples, statistic[2] + inputs[..., 0].numel()]

    def prune_levels(
        self, module: torch.nn.Linear, statistic: list[Any], levels: Sequence[Level], layer: str
    ) -> Iterator[torch.Tensor]:
        weight = module.weight.detach()
        score = weight.float().abs() * statistic[0].sqrt()
        for mask in nm_masks(score, levels, tie_breaker=lowest_by_topk):  # among equals as the host
            yield weight.masked_fill(~mask, 0)

    def output_error(self, delta: torch.Tensor, statistic: list[Any]) -> float:
        """The diagonal of the input's second moment only: features are taken as uncorrelated."""
        scalars, samples, tokens = statistic
        squares = torch.linalg.vector_norm(delta, dim=0, dtype=torch.float64).square()
        return float(squares @ scalars.double()) * samples / tokens
