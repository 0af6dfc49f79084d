"""LoRA, for models that lost heads, channels or halves; the zeros of a mask are put back when it is merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from msp_plugin.checkpoint.recount import ROUNDED
from msp_plugin.errors import RecipeError
from msp_plugin.recovery.base import RecoveryInputs
from msp_plugin.recovery.masked_lora import MaskedLowRank
from msp_plugin.recovery.masks import Masks
from msp_plugin.recovery.trained import TrainedRecovery, check_positive, check_rank

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@dataclass(frozen=True)
class LoRA(TrainedRecovery):
    """Low-rank changes of all layers, W + (alpha / rank) B A, without regard to zeros while training.

    The recovery of LLM-Pruner (arXiv 2305.11627), with the rank, alpha and learning rate of its script, and peft's own
    adapter: it needs no gradient of a whole weight, so that it is cheaper than masked_lora. Where whole rows and
    columns are zero (heads, channels and halves that are gone and not cut out yet), the change leaves them out, as in
    masked_lora and at its cost, which is what LoRA of the smaller model is. On a mask it trains a model
    that the merge does not give, because the merge leaves the zeros as they are; it is refused there without
    ``masked_merge``. Deviations: KL to the dense model instead of the cross entropy where there is one; no dropout
    (0.05 there).

    Args:
        rank, alpha: of the change.
        masked_merge: merge only what falls on surviving weights.
        learning_rate: the highest one, None for 1 / hidden size; see TrainingOptions for the others.
    """

    name = "lora"

    rank: int = 8
    alpha: float = 16.0
    learning_rate: float | None = None
    masked_merge: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, rank=self.rank, alpha=self.alpha)

    def check_layers(self, masks: Masks) -> None:
        check_rank(self.name, "rank", self.rank, masks)
        zeros = sum(masks.unstructured(name) for name in masks)
        weights = sum(rows * columns for rows, columns in masks.shapes.values())
        if zeros > ROUNDED * weights and not self.masked_merge:
            raise RecipeError(
                f"{self.name} would fill {zeros:,} pruned weights in",
                hint="use masked_lora, which trains what it merges, or masked_merge: true",
            )
        every = sum(masks.zeros(name) for name in masks)
        if every and self.masked_merge and self.adapter:
            raise RecipeError(
                f"{self.name}: peft would merge the saved adapter into the {every:,} pruned weights too",
                hint="use masked_lora, whose adapter keeps zeros, or leave adapter out",
            )

    def config(self, inputs: RecoveryInputs) -> PeftConfig:
        from peft import LoraConfig

        masks = inputs.masks
        if not self.masked_merge and any(masks.zeros(name) for name in masks):
            from msp_plugin.recovery.tuner import SparseAdapterConfig

            change = MaskedLowRank(self.rank, self.alpha)
            return SparseAdapterConfig.of(change, list(masks), vectors=[], biases=False, seed=inputs.seed)
        return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(inputs.masks))  # type: ignore[arg-type,unused-ignore]

    def merge(self, adapted: PeftModel) -> None:
        from peft.tuners.lora import Linear
        from peft.tuners.tuners_utils import BaseTunerLayer

        with torch.no_grad():
            for module in adapted.modules():
                if isinstance(module, Linear):
                    weight = module.get_base_layer().weight
                    new = weight.float() + module.get_delta_weight("default").float()
                    weight.copy_(torch.where(weight == 0, weight, new.to(weight.dtype)))
                elif isinstance(module, BaseTunerLayer):
                    module.merge()
