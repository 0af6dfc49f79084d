"""An estimator and an allocator that note what they are asked and given."""

from dataclasses import dataclass, field
from fractions import Fraction

from msp_plugin.allocators.base import AllocationResult, Allocator
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.sensitivity.base import Estimator, silent


@dataclass(frozen=True)
class Zeros(Estimator):
    """The count of zeros: it tells which weights a model holds. It counts its calls."""

    calls: list = field(default_factory=list)
    needs_data = False
    name = "zeros"

    def layer_sensitivities(self, model, data, layers, progress=silent):
        self.calls.append(data)
        progress(1, 1)
        return {name: float((model.get_submodule(name).weight == 0).sum()) for name in layers}


@dataclass(frozen=True)
class Asking(Allocator):
    """Asks for everything, keeps what it was given, and returns uniform."""

    name = "asking"
    needs_database = True
    measures = True
    remeasures = True

    tokens: int = 48
    holdout: int = 24
    errors: tuple[str, ...] = ("weight", "output", "fisher", "kl")
    sensitivities: tuple[str, ...] = ("zeros", "fisher")
    seen: list = field(default_factory=list)

    def allocate(self, inputs):
        uniform = inputs.problem.uniform()
        self.seen.append((inputs, inputs.loss(uniform), inputs.holdout and inputs.holdout(uniform)))
        return AllocationResult(uniform, holdout=((1, float("inf")),), predictions=((0.5, float("inf")),))


def problem_of(held, target=Fraction(1, 2)):
    return AllocationProblem(held.table, held.menu, target)


def times(tmp_path):
    """When the files of the database and of what is measured once were written; journals are per search."""
    return {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "cache").rglob("*")
        if path.suffix in (".safetensors", ".json")
    }
