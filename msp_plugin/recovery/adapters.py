"""Import this to load saved adapters of recovery with peft: ``PeftModel.from_pretrained(pruned_model, directory)``."""

from msp_plugin.recovery import full, masked_lora, sparse_delta, spp, tuner

__all__ = ["full", "masked_lora", "sparse_delta", "spp", "tuner"]
