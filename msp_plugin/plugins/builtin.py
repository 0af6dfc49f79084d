"""The built-in components, registered in the way of any plugin."""

from __future__ import annotations

from msp_plugin.plugins.hookspecs import hookimpl


@hookimpl
def msp_register_estimators() -> list[type]:
    from msp_plugin.sensitivity.block_influence import BlockInfluence
    from msp_plugin.sensitivity.fisher import FisherTrace
    from msp_plugin.sensitivity.heavy_tail import HeavyTail
    from msp_plugin.sensitivity.hessian import HessianTrace
    from msp_plugin.sensitivity.lsa import VirtualRemoval
    from msp_plugin.sensitivity.outliers import Median, Outliers
    from msp_plugin.sensitivity.shapley import LeaveOneOut, Shapley

    return [
        BlockInfluence,
        FisherTrace,
        HeavyTail,
        HessianTrace,
        LeaveOneOut,
        Median,
        Outliers,
        Shapley,
        VirtualRemoval,
    ]


@hookimpl
def msp_register_allocators() -> list[type]:
    from msp_plugin.allocators.alphapruning import AlphaPruning
    from msp_plugin.allocators.atp import ATP
    from msp_plugin.allocators.depth import Depth
    from msp_plugin.allocators.dlp import DLP
    from msp_plugin.allocators.evopress import EvoPress
    from msp_plugin.allocators.hessian import OneShot
    from msp_plugin.allocators.knapsack import Knapsack
    from msp_plugin.allocators.lsa import LSA
    from msp_plugin.allocators.mrp import MRP
    from msp_plugin.allocators.msp import MSP
    from msp_plugin.allocators.owl import OWL
    from msp_plugin.allocators.policy_gradient import PolicyGradient
    from msp_plugin.allocators.search import Search
    from msp_plugin.allocators.uniform import Uniform

    return [
        AlphaPruning,
        ATP,
        Depth,
        DLP,
        EvoPress,
        Knapsack,
        LSA,
        MRP,
        MSP,
        OneShot,
        OWL,
        PolicyGradient,
        Search,
        Uniform,
    ]


@hookimpl
def msp_register_pruners() -> list[type]:
    from msp_plugin.pruning.magnitude import Magnitude
    from msp_plugin.pruning.sparsegpt import SparseGPT
    from msp_plugin.pruning.wanda import Wanda

    return [Magnitude, SparseGPT, Wanda]


@hookimpl
def msp_register_structured_pruners() -> list[type]:
    from msp_plugin.pruning.flap import FLAP
    from msp_plugin.pruning.llm_pruner import LLMPruner
    from msp_plugin.pruning.obs import OBS
    from msp_plugin.pruning.plain_groups import L2, RandomGroups
    from msp_plugin.pruning.saap import SAAP

    return [FLAP, L2, LLMPruner, OBS, RandomGroups, SAAP]


@hookimpl
def msp_register_recoveries() -> list[type]:
    from msp_plugin.recovery.blockwise import Blockwise
    from msp_plugin.recovery.full import Full
    from msp_plugin.recovery.lora import LoRA
    from msp_plugin.recovery.masked_lora import MaskedLoRA
    from msp_plugin.recovery.mean_update import MeanUpdate
    from msp_plugin.recovery.sparse_delta import SparseDelta
    from msp_plugin.recovery.spp import SPP
    from msp_plugin.recovery.weight_update import WeightUpdate

    return [Blockwise, Full, LoRA, MaskedLoRA, MeanUpdate, SPP, SparseDelta, WeightUpdate]


@hookimpl
def msp_register_formats() -> list[type]:
    from msp_plugin.formats.bitmask import SparseBitmask
    from msp_plugin.formats.bitmask_int8 import Int8Bitmask
    from msp_plugin.formats.sparse24 import Sparse24Bitmask

    return [Int8Bitmask, Sparse24Bitmask, SparseBitmask]


@hookimpl
def msp_register_exporters() -> list[type]:
    from msp_plugin.checkpoint.export import Dense
    from msp_plugin.checkpoint.packed_export import Bitmask, Sparse24
    from msp_plugin.checkpoint.smaller import Small, Uniform
    from msp_plugin.hosts.llm_compressor.export import PlainRecipe

    return [Bitmask, Dense, PlainRecipe, Small, Sparse24, Uniform]


@hookimpl
def msp_register_checks() -> list[type]:
    from msp_plugin.verify.logits import Logits
    from msp_plugin.verify.quality import Quality
    from msp_plugin.verify.round_trip import RoundTrip
    from msp_plugin.verify.served import Served
    from msp_plugin.verify.structure import Structure

    return [Logits, Quality, RoundTrip, Served, Structure]
