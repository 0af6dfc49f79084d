"""Refuse, before any work, a model with layers that a forward pass over text does not call."""

from __future__ import annotations

import torch

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import ModelError
from msp_plugin.models.offload import input_device
from msp_plugin.passes.observe import observed
from msp_plugin.plan.units import Unit, UnitTable


@torch.no_grad()
def check_called(model: torch.nn.Module, table: UnitTable, data: CalibrationSet | None) -> None:
    """Raise if a forward pass over text does not call some layer, so that no method could see its inputs.

    Experts are not checked: only after all text is it known which of them tokens reach.

    Args:
        data: its first sample is run; None checks nothing.

    Raises:
        ModelError: layers are not called; the message names the first one.
        NumericsError: an input is not finite.
    """
    if data is None:
        return
    layers = [layer for layer in table.layers if "experts" not in layer.name.split(".")]
    units = [Unit(layer.name, 0, (layer,)) for layer in layers]
    with observed(model, units, lambda unit, inputs: None) as called:
        model(data.samples[0][None].to(input_device(model)), use_cache=False)
    missed = [layer.name for layer in layers if layer.name not in called]
    if missed:
        raise ModelError(
            f"a forward pass of {type(model).__name__} over text does not call {len(missed)} layers, e.g. {missed[0]}, "
            "so that no method sees their inputs",
            hint=f"add to ignore: {', '.join(_patterns(missed, table))}; or use method magnitude, which reads the "
            "weights alone",
        )


def _patterns(missed: list[str], table: UnitTable) -> list[str]:
    """Return patterns that match these layers and no others: the last part of a name if it is enough, else the name."""
    called = {layer.name.rpartition(".")[2] for layer in table.layers if layer.name not in missed}
    endings = {name: name.rpartition(".")[2] for name in missed}
    return sorted({name if ending in called else ending for name, ending in endings.items()})
