"""An observer that writes down what it is told."""

from msp_plugin import hookimpl

events = []


@hookimpl
def msp_run_started(allocation):
    events.append(("started", allocation))


@hookimpl
def msp_layer_pruned(layer, level, zeros, weights):
    events.append(("pruned", layer, level.name, zeros, weights))


@hookimpl
def msp_run_finished(record):
    events.append(("finished", record))
