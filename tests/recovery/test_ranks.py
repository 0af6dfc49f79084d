"""Recoveries that ranks share: threads with a model each, and processes that torchrun starts."""

import copy
import json
import subprocess
import sys

import pytest
import torch

from msp_plugin.checkpoint.load import load
from msp_plugin.errors import NumericsError
from msp_plugin.passes import losses
from msp_plugin.recovery import blockwise, shared
from msp_plugin.recovery.blockwise import Blockwise
from msp_plugin.recovery.weight_update import WeightUpdate
from msp_plugin.runtime.ranks import ALONE

METHODS = [Blockwise(epochs=1, rates=(0.02, 0.06)), WeightUpdate()]


@pytest.fixture
def recovered(llama, prune_half, make_inputs):
    """Recover copies of one pruned model; return the weights and the result."""
    original = copy.deepcopy(llama)
    masks = prune_half(llama)

    def recover(method, ranks, folder):
        model = copy.deepcopy(llama)
        inputs = make_inputs(model, masks, copy.deepcopy(original), folder=folder, ranks=ranks)
        result = method.recover(inputs)
        assert masks.check(model, "the test") == {}
        return dict(model.named_parameters()), result

    return recover


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_that_share_the_samples_recover_as_one_process_does(method, size, recovered, on_ranks):
    expected, alone = recovered(method, ALONE, "one")
    found = on_ranks(size, lambda ranks: recovered(method, ranks, f"of {size}"))
    for weights, result in found:
        assert result.tokens == alone.tokens
        assert [loss for _, loss in result.curve] == pytest.approx(
            [loss for _, loss in alone.curve], rel=1e-3
        )
        for name, weight in weights.items():
            assert torch.equal(weight, found[0][0][name]), name
            torch.testing.assert_close(weight, expected[name], rtol=0.02, atol=2e-3)


def test_a_stopped_recovery_goes_on_with_another_number_of_ranks(recovered, on_ranks, monkeypatch):
    expected, _ = recovered(METHODS[0], ALONE, "state")  # the caller removes the state, and here nobody does

    def trained_again(*arguments, **options):
        raise AssertionError("a window was trained again")

    monkeypatch.setattr(blockwise, "fit", trained_again)
    for weights, _ in on_ranks(2, lambda ranks: recovered(METHODS[0], ranks, "state")):
        assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def test_shared_measurements_are_those_of_all_samples(llama, make_samples, on_ranks):
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    data = make_samples(5, 24)
    kl, perplexity = losses.mean_kl(llama, other, data), losses.perplexity(other, data)
    assert shared.mean_kl(llama, other, data, ALONE) == kl
    found = on_ranks(
        2, lambda ranks: (shared.mean_kl(llama, other, data, ranks), shared.perplexity(other, data, ranks))
    )
    assert found == [pytest.approx((kl, perplexity), rel=1e-6)] * 2
    with torch.no_grad():
        other.lm_head.weight.fill_(float("nan"))
    failed = on_ranks(2, lambda ranks: shared.mean_kl(llama, other, data, ranks))
    assert [type(error) for error in failed] == [NumericsError] * 2


def command(*arguments, ranks):
    start = (
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else [sys.executable]
    )
    done = subprocess.run([*start, "-m", "msp_plugin", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["blockwise", "masked_lora", "full", "ist"])
def test_processes_of_torchrun_recover_as_one_does(method, run_dir, llama_dir, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("MSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    trained = [f"{method}.tokens=1500", f"{method}.step_tokens=192", f"{method}.evaluations=2"]
    options = ["blockwise.epochs=1", "blockwise.rates=[0.06]"] if method == "blockwise" else trained
    if method == "masked_lora":
        options.append("masked_lora.rank=4")
    if method == "ist":  # sixteen steps, after ten of which the importance is measured
        method, options = "spp", ["spp.layers=ist", "spp.tokens=3000", "spp.step_tokens=192", "spp.groups=8"]
    records = []
    for ranks in (1, 2):
        command(
            "recover", run_dir, "--original", llama_dir, "--data", corpus, "--samples", "16", "--length", "24",
            "--test-samples", "4", "--dtype", "float32", "--method", method,
            *(part for option in options for part in ("--set", option)), "--out", tmp_path / f"{ranks}", ranks=ranks,
        )  # fmt: skip
        records.append(json.loads((tmp_path / f"{ranks}" / "run.json").read_text()))
    one, two = (record["stages"][-1] for record in records)
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)
    assert two["kl"] == pytest.approx(one["kl"], rel=5e-3) and two["kl"] < records[1]["stages"][-2]["kl"]
    assert two["sparsity"] == one["sparsity"]
    assert two["recovery"]["tokens"] == one["recovery"]["tokens"]
    losses = [[loss for _, loss in stage["recovery"]["curve"]] for stage in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_processes_of_torchrun_prune_and_recover_as_one_does(llama_dir, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for ranks in (1, 2):
        monkeypatch.setenv("MSP_CACHE", str(tmp_path / f"cache-{ranks}"))
        command(
            "prune", llama_dir, "-s", "0.5", "--levels", "2:4", "--allocator", "uniform", "-m", "magnitude", "--data", corpus,
            "--samples", "16", "--length", "24", "--test-samples", "4", "--dtype", "float32", "--recover", "blockwise",
            "--set", "blockwise.epochs=1", "--set", "blockwise.rates=[0.06]", "--out", tmp_path / f"{ranks}", ranks=ranks,
        )  # fmt: skip
    records = [json.loads((tmp_path / f"{ranks}" / "run.json").read_text()) for ranks in (1, 2)]
    assert [stage["name"] for stage in records[1]["stages"]] == ["dense", "prune", "recover"]
    values = [record["perplexity"] for record in records]
    assert values[1] == pytest.approx(values[0], rel=1e-3)
    assert records[1]["stages"][2]["kl"] < records[1]["stages"][1]["kl"]
    zeros = [{n: p == 0 for n, p in load(tmp_path / f"{ranks}").named_parameters()} for ranks in (1, 2)]
    assert all(torch.equal(zeros[0][name], zeros[1][name]) for name in zeros[0] if "proj" in name)
