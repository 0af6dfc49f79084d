"""Models whose weights accelerate holds elsewhere."""

import copy
import weakref
from collections.abc import Mapping

import accelerate
import torch

from msp_plugin.models.offload import offload_hook
from msp_plugin.plan.fractions import parse_sparsity
from msp_plugin.plan.menus import parse_menu
from tests.helpers.losses import magnitude_levels

HERE = torch.device("cpu")
MENU = parse_menu(["dense", "2:4", "1:4", "1:8"])


def on_disk(model, path):
    away = copy.deepcopy(model)
    return accelerate.disk_offload(away, str(path), execution_device=HERE)


def hooks(model):
    return {name: hook for name, m in model.named_modules() if (hook := offload_hook(m)) is not None}


def state(model):
    """What an exchange may not leave changed, of the model itself and of what its hooks hold."""
    held = {name: (id(hook.weights_map), id(hook.tied_params_map)) for name, hook in hooks(model).items()}
    return held, {name: (p.device, p.requires_grad, p.shape) for name, p in model.named_parameters()}


class Counted(Mapping):
    """The weights of a hook, each a tensor of its own that is counted as long as anything holds it."""

    live, peak, reads = {}, 0, []

    def __init__(self, own, name):
        self.own, self.name = own, name

    @classmethod
    def watch(cls, model):
        for name, hook in hooks(model).items():
            hook.weights_map = cls(hook.weights_map, name)
        cls.live, cls.peak, cls.reads = {}, 0, []

    @classmethod
    def of(cls, tensor, name):
        array, key = tensor.numpy().copy(), object()
        cls.live[key] = array.nbytes
        weakref.finalize(array, cls.live.pop, key)
        cls.peak = max(cls.peak, sum(cls.live.values()))
        cls.reads.append(name)
        return torch.from_numpy(array)

    def __getitem__(self, key):
        return self.of(self.own[key], self.name)

    def __iter__(self):
        return iter(self.own)

    def __len__(self):
        return len(self.own)


def names_of(held):
    return [layer.name for layer in held[1].table.layers]


def measured_at(path):
    """Return a function of a model: a magnitude database and a problem at 0.6."""
    return lambda model: magnitude_levels(model, path, MENU, parse_sparsity("0.6"))
