"""A sparse model with its dense one, and what a recovery of it is given."""

import copy
from dataclasses import dataclass, field

import pytest
import torch

from msp_plugin import Recovery, RecoveryResult, hookimpl
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plugins.manager import Plugins
from msp_plugin.recovery.base import RecoveryInputs
from msp_plugin.recovery.masks import Masks
from msp_plugin.runs import recover as module


def sparse_copy(dense, share=0.6):
    """Return a copy of a model without the smallest weights of each layer, and its masks."""
    model = copy.deepcopy(dense)
    names = [layer.name for layer in prunable_layers(model).layers]
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            weight.masked_fill_(weight.abs() < weight.abs().float().quantile(share), 0)
    return model, Masks.of(model, names)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [
        f"The cat sat on mat {i}, and the dog sat on log {i * 7 % 23}; two of every four weights.\n"
        for i in range(80)
    ]
    path.write_text("".join(lines))
    return path


@dataclass
class Case:
    """A dense model, and inputs for recoveries of sparse copies of it."""

    dense: torch.nn.Module
    data: object
    holdout: object
    folder: object
    options: dict = field(default_factory=dict)

    def inputs(self, name="folder", **options):
        model, masks = sparse_copy(self.dense)
        given = {"original": self.dense, "batch_tokens": 48} | options
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return RecoveryInputs(
            given.pop("model", model), masks, self.data, given.pop("holdout", self.holdout), given.pop("original"),
            folder, **given,
        )  # fmt: skip


@pytest.fixture
def case(llama, make_samples, tmp_path):
    return Case(llama, make_samples(12, 24), make_samples(4, 24, seed=1), tmp_path)


@pytest.fixture(scope="session")
def weights_of():
    """The weights of the masked layers by name."""
    return lambda model, masks: {n: model.get_submodule(n).weight.detach().clone() for n in masks}


@pytest.fixture
def with_recovery(monkeypatch):
    """Register a recovery method whose ``recover`` is a function of the inputs."""

    def register(work, needs_original=True):
        @dataclass(frozen=True)
        class Made(Recovery):
            name = "made"

            def recover(self, inputs):
                with torch.no_grad():
                    work(inputs)
                return RecoveryResult(tokens=7, notes=("a note",))

        Made.needs_original = needs_original

        class Plugin:
            @hookimpl
            def msp_register_recoveries(self):
                return [Made]

        monkeypatch.setattr(module, "Plugins", lambda: Plugins({"made": Plugin()}, entry_points=False))

    return register
