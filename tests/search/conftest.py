from dataclasses import replace

import pytest

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.data.samples import TextSplit
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plugins.manager import Plugins
from msp_plugin.pruning.wanda import Wanda
from msp_plugin.search.measurements import Measurements
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import resolve
from msp_plugin.sensitivity.fisher import FisherTrace
from tests.helpers.allocating import MSP
from tests.helpers.losses import MENU, magnitude_levels
from tests.helpers.measuring import Zeros


@pytest.fixture
def measured(tmp_path):
    """A magnitude database for any model, and a problem at one half."""
    return lambda model: magnitude_levels(model, tmp_path / "cache")


@pytest.fixture
def mixed(make_samples):
    """Samples of two lengths."""
    return CalibrationSet(make_samples(3, 9).samples + make_samples(4, 20, seed=1).samples, "mixed")


@pytest.fixture
def make_measurements(llama, tmp_path, make_samples):
    """Measurements of llama with 4 samples for statistics, 4 of search text, and 2 of hold-out."""
    samples = make_samples(10)

    def make(**changes):
        text = TextSplit(
            CalibrationSet(samples.samples[:4], "head"),
            CalibrationSet(samples.samples[4:8], "search"),
            CalibrationSet(samples.samples[8:], "holdout"),
        )
        parts = changes.keys() & {"calibration", "search", "holdout"}
        text = replace(text, **{name: changes.pop(name) for name in parts})
        options = {
            "model": llama, "table": prunable_layers(llama), "menu": MENU, "pruner": Wanda(),
            "text": text,
            "estimators": {"fisher": FisherTrace(), "zeros": Zeros()}, "cache": str(tmp_path / "cache"),
        }  # fmt: skip
        return Measurements(**{**options, **changes})

    return make


@pytest.fixture
def count(monkeypatch):
    """Count the calls of a function that a module imported."""

    def count(module, name):
        calls, original = [], getattr(module, name)

        def counting(*args, **kwargs):
            calls.append(args)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)
        return calls

    return count


@pytest.fixture
def plan(tmp_path):
    """Resolve options: by magnitude to one half, if they do not say otherwise."""

    def make(plugins=None, **options):
        options = {"sparsity": 0.5, "method": "magnitude", "cache": str(tmp_path / "cache"), **options}
        return resolve(Options(**options), plugins or Plugins(entry_points=False))

    return make


@pytest.fixture
def msp_plan(plan):
    """``plan`` with a small search by msp over units."""

    def make(plugins=None, **options):
        units = {} if "allocation" in options else {"granularity": "unit"}
        return plan(plugins, **{"allocator": MSP, **units, **options})

    return make
