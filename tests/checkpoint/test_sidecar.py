import json
import os
import platform
import stat
from fractions import Fraction

import pytest
import torch

from msp_plugin.checkpoint.recount import recount_model
from msp_plugin.checkpoint.run_files import attach_files, run_record, write_files
from msp_plugin.models.layers import prunable_layers
from msp_plugin.models.load import load_model
from msp_plugin.plan.allocation import ALLOCATION_FILE, Allocation
from msp_plugin.plan.menus import parse_menu
from msp_plugin.pruning.magnitude import Magnitude
from msp_plugin.records.parts import SearchRecord
from msp_plugin.records.run import RUN_FILE, Outcome, RunRecord


@pytest.fixture
def run(llama):
    """A pruned model, its outcome and its statistics."""
    table, level = prunable_layers(llama), parse_menu(["2:4"])[0]
    allocation = Allocation(table, (level,) * len(table), Fraction(1, 2), {}, {"seed": 3})
    with torch.no_grad():
        for name in allocation.by_layer:
            module = llama.get_submodule(name)
            module.weight.copy_(next(Magnitude().prune_levels(module, None, [level], name)))
    search = SearchRecord(allocator="msp", evaluations=5, curve=((10, 0.5),))
    return llama, Outcome(allocation, search), recount_model(llama, allocation)


def test_the_record_says_what_was_asked_planned_and_achieved(run):
    _, outcome, stats = run
    record = run_record(outcome, stats, 3).to_dict()
    assert (record["schema"], record["version"]) == ("msp_plugin/run", 2)
    weights = outcome.allocation.budget.weights
    assert record["sparsity"] == {
        "target": 0.5, "planned": 0.5, "achieved": 0.5, "exact": True, "weights": weights,
        "zeros": weights // 2, "planned_zeros": weights // 2, "extra_zeros": 0,
    }  # fmt: skip
    assert record["perplexity"] == {"dense": None, "uniform": None, "mixed": None}
    assert record["stages"] == [
        {"name": "prune", "perplexity": None, "kl": None, "seconds": None, "sparsity": 0.5, "recovery": None}
    ]
    assert record["search"] == outcome.search.to_dict() and record["seed"] == 3
    assert record["python"] == platform.python_version() and record["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(record)) == record


def test_more_zeros_than_planned_show_in_the_record(run):
    model, outcome, _ = run
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = 0
    record = run_record(outcome, recount_model(model, outcome.allocation, exact=False), 0).sparsity
    assert (
        record.zeros == record.planned_zeros + 32
        and record.extra_zeros == 32
        and record.achieved > record.planned
    )


def test_both_files_are_written_and_read_back(run, tmp_path):
    _, outcome, stats = run
    record = run_record(outcome, stats, 0)
    write_files(tmp_path, outcome, record)
    assert sorted(p.name for p in tmp_path.iterdir()) == [ALLOCATION_FILE, RUN_FILE]
    assert Allocation.read(tmp_path / ALLOCATION_FILE) == outcome.allocation
    assert json.loads((tmp_path / RUN_FILE).read_text(encoding="utf-8")) == record.to_dict()
    assert RunRecord.read(tmp_path / RUN_FILE) == record


def test_saving_the_model_writes_the_files_beside_it(run, tmp_path):
    model, outcome, stats = run
    attach_files(model, outcome, run_record(outcome, stats, 3))
    before = os.umask(0o022)
    try:
        model.save_pretrained(tmp_path / "a")
        model.save_pretrained(save_directory=str(tmp_path / "b"))
    finally:
        os.umask(before)
    for name in (ALLOCATION_FILE, RUN_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert stat.S_IMODE((tmp_path / "a" / name).stat().st_mode) == 0o644
    assert json.loads((tmp_path / "a" / RUN_FILE).read_text())["seed"] == 3
    loaded = load_model(tmp_path / "a")
    assert recount_model(loaded, Allocation.read(tmp_path / "a" / ALLOCATION_FILE)) == stats


def test_the_hosts_mark_keeps_it_from_wrapping_again(run):
    model, outcome, stats = run
    attach_files(model, outcome, run_record(outcome, stats, 0))
    assert model.save_pretrained._overridden is True
