"""An estimator and an allocator that reads it."""

from dataclasses import dataclass

from msp_plugin import AllocationResult, Allocator, Estimator, hookimpl


@dataclass(frozen=True)
class SquaredNorm(Estimator):
    """The squared Frobenius norm of the weight."""

    name = "squared_norm"
    scale: float = 1.0

    def layer_sensitivities(self, model, data, layers, progress=None):
        norms = {name: float(model.get_submodule(name).weight.detach().square().sum()) for name in layers}
        return {name: self.scale * norm for name, norm in norms.items()}


@dataclass(frozen=True)
class DenseWhereLarge(Allocator):
    """Large units stay as dense as the budget allows."""

    name = "dense_where_large"
    sensitivities = ("squared_norm",)

    def allocate(self, inputs):
        wish = inputs.sensitivities["squared_norm"] / inputs.sensitivities["squared_norm"].max()
        return AllocationResult(inputs.problem.repair(wish, wish + 1e-3))


@hookimpl
def msp_register_estimators():
    return [SquaredNorm]


@hookimpl
def msp_register_allocators():
    return [DenseWhereLarge]
