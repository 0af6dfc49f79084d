"""Relative importance and activations (RIA, Zhang et al., ICLR 2024), as a plugin of msp_plugin."""

from dataclasses import dataclass

from msp_plugin import LayerwisePruner, hookimpl


@dataclass(frozen=True)
class RIA(LayerwisePruner):
    """Keep what is large within its row and its column, weighted by the input's norm."""

    name = "ria"
    power: float = 0.5

    def score(self, weight, input_norm):
        w = weight.abs()
        relative = w / w.sum(0, keepdim=True) + w / w.sum(1, keepdim=True)
        return relative * input_norm**self.power


@hookimpl
def msp_register_pruners():
    return [RIA]
