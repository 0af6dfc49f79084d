"""Measure the sensitivity of a model's units."""

from __future__ import annotations

from collections.abc import Sequence

from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.data.samples import Text, load_split
from msp_plugin.models.device import on_best_device
from msp_plugin.models.layers import check_finite_weights, prunable_layers
from msp_plugin.plan.units import UnitTable
from msp_plugin.runtime.context import RunContext
from msp_plugin.search.measurements import Measurements
from msp_plugin.sensitivity.base import Estimator


def measure_sensitivity(
    source: ModelSource,
    text: Text,
    estimator: Estimator,
    *,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = (),
    context: RunContext = RunContext(),
) -> tuple[UnitTable, tuple[float, ...]]:
    """Return (a model's units, the sensitivity of each); the cache keeps the values.

    Raises:
        MSPError: the model or the text cannot be read; see also Measurements.sensitivity.
    """
    source.check()
    if (empty := source.empty()) is not None:
        prunable_layers(empty, targets, ignore)  # refuses patterns before weights are loaded or fetched
    samples = load_split(
        source.tokenizer(), text.for_model(source.name, trust_remote_code=source.trust_remote_code)
    )
    model = source.load()
    units = prunable_layers(model, targets, ignore)
    check_finite_weights(model, units)
    with on_best_device(model):
        measurements = Measurements(
            model,
            units,
            (),
            None,
            samples,
            {estimator.name: estimator},
            source.cache,
            progress=context.progress,
            fresh=context.fresh,
        )
        return units, measurements.sensitivity(estimator.name)
