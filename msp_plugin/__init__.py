"""Mixed sparsity for LLMs: search how sparse each layer may be, prune it so, prove it.

Everything that users and plugins need is a name of this package; a name is imported when it is first asked for, so that
``import msp_plugin`` loads neither torch nor a host.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Each public name and the module that it is from.
_PUBLIC = {
    "prune": "runs.prune",
    "allocate": "runs.prune",
    "run_recipe": "runs.prune",
    "recover": "runs.recover",
    "load": "serving.load",
    "Text": "data.samples",
    "RunContext": "runtime.context",
    "Level": "plan.levels",
    "Pattern": "plan.levels",
    "Unit": "plan.units",
    "UnitTable": "plan.units",
    "Allocation": "plan.allocation",
    "AllocationProblem": "plan.budget",
    "Pruner": "pruning.base",
    "LayerwisePruner": "pruning.base",
    "UnitInputs": "pruning.base",
    "StructuredPruner": "pruning.structured",
    "WidthPruner": "pruning.structured",
    "Cut": "pruning.structured",
    "HalfInputs": "pruning.structured",
    "HostPruner": "hosts.llm_compressor.methods",
    "Recovery": "recovery.base",
    "RecoveryInputs": "recovery.base",
    "RecoveryResult": "recovery.base",
    "Allocator": "allocators.base",
    "AllocationInputs": "allocators.base",
    "AllocationResult": "allocators.base",
    "Estimator": "sensitivity.base",
    "CalibrationSet": "data.calibration",
    "Exporter": "checkpoint.export",
    "Checkpoint": "checkpoint.checkpoint",
    "PackedExporter": "checkpoint.packed_export",
    "PackedFormat": "formats.base",
    "TensorInfo": "formats.base",
    "Manifest": "checkpoint.manifest",
    "describe_files": "checkpoint.manifest",
    "Check": "verify.base",
    "Finding": "verify.base",
    "Section": "report.section",
    "hookimpl": "plugins.hookspecs",
    "MSPError": "errors",
    "RecipeError": "errors",
    "BudgetError": "errors",
    "ModelError": "errors",
    "DataError": "errors",
    "FormatError": "errors",
    "HostError": "errors",
    "NumericsError": "errors",
    "OutputError": "errors",
    "ServingError": "errors",
    "PluginError": "errors",
    "VerificationError": "errors",
}
#: The modifiers; asking for one makes all known to llm-compressor's recipes.
_MODIFIERS = {
    "MixedSparsityModifier": "hosts.llm_compressor.modifier",
    "RecoveryModifier": "hosts.llm_compressor.recovery",
}
__all__ = ["MixedSparsityModifier", "RecoveryModifier", *_PUBLIC]

if TYPE_CHECKING:
    from msp_plugin.hosts.llm_compressor.modifier import MixedSparsityModifier
    from msp_plugin.hosts.llm_compressor.recovery import RecoveryModifier


def __getattr__(name: str) -> Any:
    places = _MODIFIERS | _PUBLIC
    if name not in places:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODIFIERS:
        from msp_plugin.hosts.llm_compressor.register import register_modifier

        register_modifier()
    return getattr(importlib.import_module(f"{__name__}.{places[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
