"""A pruner: RIA, relative importance and activations (Zhang et al., ICLR 2024)."""

from dataclasses import dataclass

from msp_plugin import LayerwisePruner, hookimpl


@dataclass(frozen=True)
class RIA(LayerwisePruner):
    """Keep what matters to its row and to its column, weighed by the input's norm."""

    name = "ria"
    power: float = 0.5

    def score(self, weight, input_norm):
        size = weight.abs()
        rows = size.sum(dim=1, keepdim=True).clamp_min(1e-30)
        columns = size.sum(dim=0, keepdim=True).clamp_min(1e-30)
        return (size / rows + size / columns) * input_norm**self.power


@hookimpl
def msp_register_pruners():
    return [RIA]
