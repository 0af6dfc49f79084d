import pytest

from msp_plugin.checkpoint.source import ModelSource
from msp_plugin.data.samples import Text
from msp_plugin.plugins.manager import Plugins
from msp_plugin.runs.compare import compare
from msp_plugin.runs.grid import Grid
from msp_plugin.runtime.context import RunContext


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(
        "\n".join(f"the {i}th cat sat on mat {i * i % 97} and the dog {i % 13} did not" for i in range(300))
    )
    return Text(str(path), samples=8, length=20, test_samples=3)


@pytest.fixture
def run(llama_dir, text, tmp_path):
    """Compare on the tiny Llama by magnitude, without the final pruning unless asked for."""

    def run(allocators, sparsities=("3/4",), methods=("magnitude",), seeds=(0,), prune=False, **options):
        shared = {"cache": str(tmp_path / "cache"), "granularity": "unit", **options}
        finals = shared.pop("finals", None)
        context = RunContext(**{name: shared.pop(name) for name in ("ranks", "fresh") if name in shared})
        recover = shared.pop("recover", None)
        grid = Grid(sparsities, methods, allocators, seeds, shared, prune, recover)
        record = compare(ModelSource(llama_dir, "float32"), text, grid, finals=finals, context=context)
        return record and record.to_dict()

    return run


@pytest.fixture
def with_plugins(monkeypatch):
    def use(**extra):
        monkeypatch.setattr(
            "msp_plugin.runs.compare.Plugins", lambda: Plugins(extra=extra, entry_points=False)
        )

    return use


@pytest.fixture
def no_model(monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("msp_plugin.checkpoint.source.load", fail)
