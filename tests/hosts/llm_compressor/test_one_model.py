"""The host keeps hold of the models that it pruned; commands must not, or each costs a model's memory."""

import gc
import weakref

import pytest

from msp_plugin.checkpoint.load import load

SMALL = ["--samples", "6", "--length", "64", "--test-samples", "4", "--dtype", "float32"]


@pytest.fixture
def alive(monkeypatch):
    """For every model that a command loads, how many of those before are in memory then."""
    seen, models = [], []

    def recorded(*args, **options):
        seen.append(sum(model() is not None for model in models))
        models.append(weakref.ref(model := load(*args, **options)))
        return model

    monkeypatch.setattr("msp_plugin.checkpoint.source.load", recorded)
    gc.collect()
    return seen


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"def function_{i}(a, b):\n    return a * {i} + b\n" for i in range(800)))
    return path


@pytest.mark.parametrize("method", ["wanda", pytest.param("sparsegpt", marks=pytest.mark.slow)])
def test_a_run_holds_one_model_at_a_time(method, alive, msp, llama_dir, text_file, tmp_path):
    msp(
        "prune", llama_dir, "-s", "0.75", "--method", method, "--allocator", "owl", "--data", text_file, *SMALL,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert alive == [0, 0, 0]  # dense, uniform, mixed
    assert (tmp_path / "out" / "recipe.yaml").exists()


def test_a_comparison_holds_one_model(alive, msp, llama_dir, text_file, tmp_path):
    msp(
        "compare", llama_dir, "-s", "0.75", "--methods", "wanda", "--allocators", "uniform,owl",
        "--data", text_file, *SMALL, "--out", tmp_path / "out",
    )  # fmt: skip
    assert alive == [0]
