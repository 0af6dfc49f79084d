"""What a recovery keeps of its run: layers that were left out, measurements, and the records of a hub id."""

import pytest

from msp_plugin import Text
from msp_plugin.records.run import RunRecord
from msp_plugin.recovery.sources import records_folder
from msp_plugin.runs.recover import recover

SMALL = ["--samples", "12", "--length", "24", "--test-samples", "4"]


@pytest.fixture
def text(corpus):
    return Text(str(corpus), samples=12, length=24, test_samples=4)


@pytest.fixture
def left_out_dir(msp, llama_dir, corpus, tmp_path):
    """A run whose first block was left out of the pruning."""
    options = (
        "--method",
        "magnitude",
        "--allocator",
        "uniform",
        "--levels",
        "2:4",
        "--ignore",
        "re:.*layers.0.*",
    )
    msp("prune", llama_dir, "-s", "0.5", *options, "--data", corpus, "--out", tmp_path / "run", *SMALL)
    return tmp_path / "run"


def test_layers_that_were_left_out_of_the_pruning_are_left_alone(
    with_recovery, msp, left_out_dir, text, tmp_path
):
    layer = "model.layers.1.mlp.down_proj"

    def work(inputs):
        assert inputs.masks and all(".layers.1." in layer for layer in inputs.masks)
        weight = inputs.model.get_submodule(layer).weight
        first, second = weight.nonzero()[:2]
        weight[tuple(first)] = weight[tuple(second)] = 0  # as by rounding

    with_recovery(work, needs_original=False)
    done = recover(left_out_dir, text, tmp_path / "out", method="made", cache=str(tmp_path / "cache")).record
    before = RunRecord.beside(left_out_dir).sparsity
    assert (done.sparsity.zeros, done.sparsity.extra_zeros) == (before.zeros + 2, before.extra_zeros + 2)
    assert done.sparsity.achieved == done.stages[-1].sparsity == done.sparsity.zeros / before.weights
    msp("verify", tmp_path / "out")  # which counts them


def test_without_test_text_what_was_measured_before_stays(with_recovery, left_out_dir, corpus, tmp_path):
    with_recovery(lambda inputs: None, needs_original=False)
    text = Text(str(corpus), samples=12, length=24, test_samples=0)
    record = recover(
        left_out_dir, text, tmp_path / "out", method="made", cache=str(tmp_path / "cache")
    ).record
    before = RunRecord.beside(left_out_dir)
    assert record.stages[:-1] == before.stages and record.test == before.test
    assert record.perplexity == {**before.perplexity, "recovered": None} and before.perplexity["mixed"] > 1


@pytest.mark.parametrize("name", ["pairs", "estimators", "nobody"])
def test_a_method_that_nobody_knows_is_refused_by_name(msp, run_dir, llama_dir, corpus, tmp_path, name):
    options = ("--original", llama_dir, "--data", corpus, "--out", tmp_path / "out")
    assert f"no recovery called '{name}'" in msp("recover", run_dir, *options, "-m", name, code=2).err


def test_a_run_of_the_hub_keeps_its_records(run_dir, monkeypatch):
    import huggingface_hub

    def fetched(name, allow_patterns=None, **_):  # the hub is not reached from here
        assert name == "org/run" and "allocation.json" in allow_patterns
        return str(run_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert records_folder("org/run") == run_dir and records_folder(run_dir) == run_dir
