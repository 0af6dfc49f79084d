"""Pruning methods that llm-compressor's own modifiers run.

``mask_structure`` in llm-compressor counts the *pruned* weights of M; our levels count the kept ones.
"""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from msp_plugin.errors import HostError, RecipeError
from msp_plugin.hosts.llm_compressor import require_host
from msp_plugin.plan.levels import Kind, Level, Pattern
from msp_plugin.pruning.base import Pruner
from msp_plugin.pruning.sparsegpt import SparseGPT, factor_inverse
from msp_plugin.pruning.wanda import Wanda


class HostMethod(ABC):
    """A pruning modifier of llm-compressor; each level gets its own instance.

    ``modifier`` is the name of its class.
    """

    modifier: ClassVar[str]

    def check_modifier(self, level: Level) -> None:
        """Raise RecipeError if the modifier cannot make ``level``."""
        if level.pattern is None or level.pattern.kind is not Kind.NM:
            raise RecipeError(
                f"{self.modifier} of llm-compressor cannot make level {level}",
                hint="it makes exact counts of zeros only for N:M: use levels such as 2:4",
            )

    @abstractmethod
    def modifier_arguments(self, level: Pattern) -> dict[str, Any]:
        """Return the modifier's arguments for one level, without targets and ignore."""

    def check_statistics(self, instance: Any, names: dict[torch.nn.Module, str]) -> None:  # noqa: B027
        """Raise if the modifier instance is about to prune from unusable statistics."""


class HostPruner(Pruner, HostMethod):
    """A pruning method of a third party whose final pruning is a modifier of llm-compressor.

    Set ``modifier`` to the class's name, and write the layer-wise functions, which the level database uses. Levels that
    the modifier cannot make are refused, unless ``check_level`` accepts them for the layer-wise functions.
    """

    host: ClassVar[str] = "llmcompressor"

    def version(self) -> str:
        require_host()
        return importlib.metadata.version("llmcompressor")

    def check_level(self, level: Pattern) -> None:
        self.check_modifier(level)


def _structure(level: Pattern) -> str:
    return f"{level.m - level.n}:{level.m}"


@dataclass(frozen=True)
class SparseGPTModifier(HostMethod):
    """SparseGPT by llm-compressor's SparseGPTModifier, which gives the weights of ours, bit for bit."""

    modifier = "SparseGPTModifier"

    pruner: SparseGPT

    def modifier_arguments(self, level: Pattern) -> dict[str, Any]:
        return {
            "sparsity": float(level.sparsity),
            "mask_structure": _structure(level),
            "block_size": self.pruner.block_size,
            "dampening_frac": self.pruner.dampening_frac,
        }

    def check_statistics(self, instance: Any, names: dict[torch.nn.Module, str]) -> None:
        for module, hessian in instance._hessians.items():
            factor_inverse(hessian, self.pruner.dampening_frac, names.get(module, "a layer"))


@dataclass(frozen=True)
class WandaModifier(HostMethod):
    """Wanda by llm-compressor's WandaPruningModifier, which gives the weights of ours, bit for bit."""

    modifier = "WandaPruningModifier"

    def modifier_arguments(self, level: Pattern) -> dict[str, Any]:
        return {"sparsity": float(level.sparsity), "mask_structure": _structure(level)}


def host_method(pruner: Pruner) -> HostMethod | None:
    """Return the modifier that runs a method in llm-compressor's own calibration; None if there is none."""
    if isinstance(pruner, HostPruner):
        return pruner
    if type(pruner) is SparseGPT:
        return SparseGPTModifier(pruner)
    return WandaModifier() if type(pruner) is Wanda else None


def check_method(pruner: Pruner) -> None:
    """Raise HostError if llm-compressor cannot run a method."""
    if pruner.prunes_units:
        raise HostError(
            f"method {pruner.name!r} prunes whole units, and llm-compressor calibrates layer by layer",
            hint="use it with msp prune",
        )
