"""Checkpoints with widths: recount, verify, export, report."""

import json
from fractions import Fraction

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig

import msp_plugin
from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import export_checkpoint
from msp_plugin.checkpoint.packed_export import Bitmask
from msp_plugin.checkpoint.recount import recount_model
from msp_plugin.checkpoint.smaller import Small
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.build import build_database
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import FormatError, ModelError, VerificationError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.models.load import load_model
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.levels import Level
from msp_plugin.plan.menus import parse_menu
from msp_plugin.plugins.manager import Plugins
from msp_plugin.report.grid import level_grid
from msp_plugin.report.run_page import run_page
from msp_plugin.report.size import sizes
from msp_plugin.report.source import read_source
from msp_plugin.report.storage import storages
from msp_plugin.search.allocate import check_model
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import resolve
from msp_plugin.structure.groups import with_groups

LEVELS = ("3/4 wide", "1/2 wide", "dropped", "1/2 wide 2:4", "dense", "dropped", "1/2 wide", "2:4")


@pytest.fixture(params=["llama with biases", "qwen2"])
def pruned(tiny, tmp_path, request):
    """Return the directory of a tiny model whose halves have LEVELS, with its allocation."""
    model = tiny(request.param)
    table = with_groups(model, prunable_layers(model, granularity="half"), 4)
    names = LEVELS if request.param != "qwen2" else ("2/3 wide", *LEVELS[1:6], "1/3 wide", LEVELS[7])
    levels = tuple(map(Level.parse, names))
    database = LevelDatabase(tmp_path / "database", {"test": "files"}, parse_menu(list(dict.fromkeys(names))))
    ids = torch.randint(0, 96, (2, 14), generator=torch.Generator().manual_seed(5))
    build_database(
        database,
        model,
        table,
        Plugins(entry_points=False).build("pruners", "l2"),
        CalibrationSet(tuple(ids), "test"),
    )
    with torch.no_grad():
        for unit, level in zip(table, levels, strict=True):
            for layer in unit.layers if not level.is_dense else ():
                weight = model.get_submodule(layer.name).weight
                weight.copy_(database.weight(layer.name, level.name))
    kept = sum(level.kept(unit) for unit, level in zip(table, levels, strict=True))
    allocation = Allocation(table, levels, 1 - Fraction(kept, table.weights))
    recount_model(model, allocation)
    model.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "allocation.json").write_text(allocation.to_json())
    return tmp_path / "run"


def test_the_zeros_of_a_checkpoint_are_held_against_its_widths(pruned):
    model, allocation = load_model(pruned, "float32"), Allocation.read(pruned / "allocation.json")
    stats = recount_model(model, allocation)
    assert stats.total_zeros == allocation.budget.zeros
    down = model.model.layers[0].mlp.down_proj.weight
    gone, there = (down != 0).any(0).logical_not().nonzero()[0], (down != 0).any(0).nonzero()[0]
    with torch.no_grad():  # as many weights as before, in one channel more
        down[0, gone], down[0, there] = 1.0, 0.0
    with pytest.raises(VerificationError, match="down_proj keeps 13 of 24 heads or channels instead of 12"):
        recount_model(model, allocation)


def test_what_is_left_out_is_what_the_report_says(pruned, tmp_path):
    export_checkpoint(pruned, Small(), tmp_path / "small")
    model, small = (msp_plugin.load(path, dtype="float32") for path in (pruned, tmp_path / "small"))
    checkpoint = Checkpoint.open(pruned)
    full, less = sizes(checkpoint.allocation, checkpoint)
    for size, of in ((full, model), (less, small)):
        assert (
            size.parameters == sum(p.numel() for p in of.parameters()) and size.bytes == 4 * size.parameters
        )
        linears = [m for m in of.modules() if isinstance(m, torch.nn.Linear)]
        assert size.macs == sum(m.weight.numel() for m in linears)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, model(ids).logits, rtol=0, atol=1e-4)


def test_the_map_of_levels_shows_widths_and_what_is_dropped(pruned):
    grid = level_grid(Allocation.read(pruned / "allocation.json"))
    assert grid.columns == ("self_attn", "mlp")
    texts = [[cell.text for (cell,) in row.cells] for row in grid.rows]
    assert texts[1] == ["dropped", "1/2 wide 2:4"] and texts[2] == ["dense", "dropped"]
    assert "12 of 24 heads or channels stay, 50 % zeros of 2,304 weights" in grid.rows[0].cells[1][0].title


def test_widths_are_packed_as_any_zeros_and_their_bytes_foreseen(pruned, tmp_path):
    checkpoint = Checkpoint.open(pruned)
    assert [storage.format.name for storage in storages(checkpoint.allocation, "float32", checkpoint)]
    export_checkpoint(pruned, Bitmask(), tmp_path / "packed")
    model, packed = (msp_plugin.load(path, dtype="float32") for path in (pruned, tmp_path / "packed"))
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, packed(ids).logits)


def test_verify_finds_the_levels_and_a_head_that_came_back(pruned, msp):
    assert "every" not in msp("verify", pruned, "--check", "structure", "--json").err
    model = load_model(pruned, "float32")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(1.0)
    model.save_pretrained(pruned)
    found = msp("verify", pruned, "--check", "structure", "--json", code=1).out
    assert "down_proj" in found and "keeps 24 of 24 heads or channels instead of 12" in found


@pytest.mark.parametrize(
    ("name", "dropped", "small"),
    [
        ("gemma2 mixed", [2], False),
        ("gemma2", [2], True),
        ("llama", range(4), False),
        ("llama", range(3), True),
    ],
)
def test_the_report_offers_small_only_where_that_is_written(name, dropped, small, tiny, zeroing, tmp_path):
    model, run = tiny(name), tmp_path / "run"
    table = prunable_layers(model, granularity="half")
    gone = {f"model.layers.{block}.self_attn" for block in dropped}
    levels = tuple(Level.parse("dropped" if unit.name in gone else "dense") for unit in table)
    for block in dropped:
        zeroing(model).half(block, "attention")
    model.save_pretrained(run)
    kept = sum(level.kept(unit) for unit, level in zip(table, levels, strict=True))
    (run / "allocation.json").write_text(
        Allocation(table, levels, 1 - Fraction(kept, table.weights)).to_json()
    )
    record = {"schema": "msp_plugin/run", "version": 1}
    (run / "run.json").write_text(json.dumps(record))
    checkpoint = Checkpoint.open(run)
    assert bool(sizes(checkpoint.allocation, checkpoint)) == small
    page = run_page(read_source(run))
    assert any("--to small" in command for _, command in page["commands"]) == bool(page["sizes"]) == small
    if not small:
        with pytest.raises(FormatError):
            export_checkpoint(run, Small(), tmp_path / "small")


@pytest.mark.parametrize(
    ("name", "levels", "granularity", "warned"),
    [
        ("gemma2 mixed", "depth", "half", True),
        ("gemma2 mixed", "depth", "block", False),
        ("gemma2 mixed", "width", "half", False),
        ("gemma2", "depth", "half", False),
    ],
)
def test_mixed_windows_are_warned_of_before_a_search_that_may_drop_an_attention(
    name, levels, granularity, warned, tiny, caplog
):
    options = {"sparsity": 0.25, "method": "l2", "levels": levels, "granularity": granularity}
    if levels == "width":
        options["quantum"] = 8
    check_model(tiny(name), resolve(Options.parse(options), Plugins(entry_points=False)))
    assert ("mixes blocks with and without a sliding window" in caplog.text) == warned


@pytest.mark.parametrize(
    ("name", "form", "found"),
    [
        ("gemma2 mixed", "small", "form small cannot drop an attention"),
        ("gemma2 mixed", "uniform", None),
        ("gemma2", "small", None),
        ("falcon", "uniform", "fuses projections"),
        ("falcon", "bitmask", None),
    ],
)
def test_a_model_that_cannot_take_the_form_is_refused_before_the_search(name, form, found, tiny):
    plan = resolve(
        Options(sparsity=0.25, method="l2", form=form, quantum=8 if form == "small" else 64),
        Plugins(entry_points=False),
    )
    falcon = FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(falcon) if name == "falcon" else tiny(name)
    if found is None:
        check_model(model, plan)
    else:
        with pytest.raises(ModelError, match=found):
            check_model(model, plan)
