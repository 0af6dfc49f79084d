"""A structured pruner: keep the heads and channels whose outputs are the largest."""

from dataclasses import dataclass

from msp_plugin import StructuredPruner, hookimpl


@dataclass(frozen=True)
class Loudest(StructuredPruner):
    """Score a group by the columns that it owns of the half's last layer, times the size of their inputs."""

    name = "loudest"
    power: float = 1.0

    def group_scores(self, half):
        last = half.output
        outputs = last.by_group(last.weight.float()).norm(dim=2)
        inputs = last.inputs.rms.view(outputs.shape)
        return (outputs * inputs**self.power).sum(dim=1)


@hookimpl
def msp_register_structured_pruners():
    return [Loudest]
