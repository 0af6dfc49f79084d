"""A recovery that reads no text: each row's surviving weights get the length of the dense row."""

from dataclasses import dataclass

from msp_plugin import Recovery, RecoveryResult, hookimpl


@dataclass(frozen=True)
class RowLength(Recovery):
    name = "row_length"
    power: float = 1.0

    def recover(self, inputs):
        for layer in inputs.masks:
            sparse, dense = (m.get_submodule(layer).weight.data for m in (inputs.model, inputs.original))
            lost = dense.norm(dim=1).float() / sparse.norm(dim=1).float().clamp_min(1e-9)
            sparse.mul_(lost[:, None] ** self.power)
        return RecoveryResult(tokens=0)


@hookimpl
def msp_register_recoveries():
    return [RowLength]
