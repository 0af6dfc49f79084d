"""The built-in components, registered as any plugin registers its own."""

from __future__ import annotations

from msp_plugin.hookspecs import hookimpl


@hookimpl
def msp_register_estimators():
    from msp_plugin.sensitivity.fisher import FisherTrace

    return [FisherTrace]


@hookimpl
def msp_register_allocators():
    from msp_plugin.allocators.msp import MSP
    from msp_plugin.allocators.uniform import Uniform

    return [MSP, Uniform]


@hookimpl
def msp_register_pruners():
    from msp_plugin.hosts.llm_compressor.methods import SparseGPT, Wanda
    from msp_plugin.pruning.magnitude import Magnitude

    return [Magnitude, SparseGPT, Wanda]


@hookimpl
def msp_register_exporters():
    from msp_plugin.checkpoint.export import Dense, Sparse24
    from msp_plugin.hosts.llm_compressor.export import PlainRecipe

    return [Dense, PlainRecipe, Sparse24]


@hookimpl
def msp_register_checks():
    from msp_plugin.verify.quality import Quality
    from msp_plugin.verify.round_trip import RoundTrip
    from msp_plugin.verify.served import Served
    from msp_plugin.verify.structure import Structure

    return [Quality, RoundTrip, Served, Structure]
