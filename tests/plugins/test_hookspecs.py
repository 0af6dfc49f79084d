"""Every hook, exercised by a plugin of tests/plugins."""

import json
from fractions import Fraction

import pytest
import torch
import typer
from typer.testing import CliRunner

from msp_plugin import Text, hookimpl, load
from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import export_checkpoint
from msp_plugin.checkpoint.manifest import Manifest
from msp_plugin.checkpoint.packing import pack_layer
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.build import build_database
from msp_plugin.database.store import LevelDatabase
from msp_plugin.errors import FormatError, RecipeError
from msp_plugin.models.layers import prunable_layers
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.levels import Pattern
from msp_plugin.plan.menus import parse_menu
from msp_plugin.plugins import hookspecs
from msp_plugin.plugins.manager import Plugins
from msp_plugin.report import write_report
from msp_plugin.runs import recover as recover_module
from msp_plugin.search.candidate_weights import CandidateWeights
from msp_plugin.search.options import Options
from msp_plugin.search.resolve import resolve
from msp_plugin.structure.groups import with_groups
from msp_plugin.verify.base import Subject, run_checks

SAMPLES = (
    "squared_norm",
    "least_error",
    "loudest",
    "ria",
    "row_length",
    "bitmask",
    "listing",
    "no_nan",
    "observer",
    "hello",
    "densest",
)
EXERCISED = {
    "msp_register_estimators": "test_an_estimator_of_a_plugin_is_built_with_its_options",
    "msp_register_allocators": "test_an_allocator_of_a_plugin_gets_the_estimator_that_it_names",
    "msp_register_pruners": "test_a_pruner_of_a_plugin_is_built_with_its_options",
    "msp_register_structured_pruners": "test_a_structured_pruner_of_a_plugin_prunes_whole_heads_and_channels",
    "msp_register_recoveries": "test_a_recovery_of_a_plugin_changes_a_model",
    "msp_register_formats": "test_a_format_of_a_plugin_exports_and_is_read_and_verified",
    "msp_register_exporters": "test_an_exporter_of_a_plugin_writes_a_whole_directory",
    "msp_register_checks": "test_a_check_of_a_plugin_is_run_with_its_options",
    "msp_register_commands": "test_a_plugin_adds_a_command",
    "msp_run_started": "test_observers_are_told_of_a_run",
    "msp_layer_pruned": "test_observers_are_told_of_a_run",
    "msp_run_finished": "test_observers_are_told_of_a_run",
    "msp_report_section": "test_a_section_of_a_plugin_is_told_of_the_run",
}


def test_every_hook_has_a_test_and_a_sample_plugin(plugins_with):
    specs = {name for name in dir(hookspecs) if hasattr(getattr(hookspecs, name), "msp_plugin_spec")}
    assert specs == {name for name in dir(hookspecs) if name.startswith("msp_")}
    assert specs == set(EXERCISED)
    assert set(EXERCISED.values()) <= set(globals())
    manager = plugins_with(*SAMPLES).manager
    implemented = {
        caller.name for sample in SAMPLES for caller in manager.get_hookcallers(manager.get_plugin(sample))
    }
    assert implemented == specs


def test_all_samples_live_together_with_the_builtins(plugins_with):
    builtin, found = plugins_with().components, plugins_with(*SAMPLES).components
    added = {
        "estimators": {"squared_norm"},
        "allocators": {"dense_where_large", "least_error"},
        "pruners": {"loudest", "ria"},
        "recoveries": {"row_length"},
        "formats": {"row-bitmask"},
        "exporters": {"listing", "row_bitmask"},
        "checks": {"no_nan"},
    }
    assert {kind: set(found[kind]) - set(builtin[kind]) for kind in found} == added
    assert all(set(builtin[kind]) < set(found[kind]) for kind in found)


def test_an_estimator_of_a_plugin_is_built_with_its_options(plugins_with, llama, data):
    estimator = plugins_with("squared_norm").build("estimators", {"name": "squared_norm", "scale": 2})
    name = "model.layers.0.mlp.up_proj"
    expected = 2 * float(llama.get_submodule(name).weight.detach().square().sum())
    assert estimator.layer_sensitivities(llama, data, (name,)) == {name: expected}


def test_an_allocator_of_a_plugin_gets_the_estimator_that_it_names(plugins_with):
    plan = resolve(
        Options(sparsity=0.5, allocator="dense_where_large", estimators={"squared_norm": {"scale": 3.0}}),
        plugins_with("squared_norm"),
    )
    assert plan.allocator.name == "dense_where_large"
    assert {name: e.scale for name, e in plan.estimators.items()} == {"squared_norm": 3.0}


def test_a_pruner_of_a_plugin_is_built_with_its_options(plugins_with):
    plan = resolve(Options(sparsity=0.5, method={"name": "ria", "power": 1.0}), plugins_with("ria"))
    assert (plan.pruner.name, plan.pruner.power, plan.needs_data) == ("ria", 1.0, True)


@pytest.fixture
def bitmask_dir(plugins_with, run_dir, tmp_path):
    """``run_dir`` in the format of the sample plugin."""
    exporter = plugins_with("bitmask").build("exporters", {"name": "row_bitmask", "shard_bytes": 50_000})
    export_checkpoint(run_dir, exporter, tmp_path / "packed")
    return tmp_path / "packed"


def test_a_structured_pruner_of_a_plugin_prunes_whole_heads_and_channels(plugins_with, llama, tmp_path):
    model, menu = llama, parse_menu("dense,1/2 wide")
    down = model.model.layers[1].mlp.down_proj
    lengths = down.weight.norm(dim=0)
    pruner = plugins_with("loudest").build("pruners", {"name": "loudest", "power": 0.0})
    table = with_groups(model, prunable_layers(model, granularity="half"), 4)
    problem = AllocationProblem(table, menu, Fraction(1, 2))
    data = CalibrationSet((torch.arange(14), torch.arange(14, 28)), "test")
    database = LevelDatabase(tmp_path, {"test": "loudest"}, menu)
    build_database(database, model, table, pruner, data)
    with CandidateWeights(model, database, problem) as weights:
        weights.set((1,) * len(table))
        kept = down.weight.any(dim=0)
        heads = model.model.layers[0].self_attn.o_proj.weight.any(dim=0)
    assert set(torch.where(kept)[0].tolist()) == set(lengths.topk(len(lengths) // 2).indices.tolist())
    assert heads.sum() == len(heads) / 2 and len(heads.view(-1, len(heads) // 2).any(dim=1).unique()) == 2


def test_a_recovery_of_a_plugin_changes_a_model(
    sample_plugin, monkeypatch, run_dir, llama_dir, plugins_with, tmp_path
):
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and the dog sat on the log. " * 40)
    monkeypatch.setattr(recover_module, "Plugins", lambda: plugins_with("row_length"))
    run = recover_module.recover(
        run_dir,
        Text(str(text), samples=4, length=16, test_samples=2),
        tmp_path / "out",
        original=llama_dir,
        method={"name": "row_length", "power": 1.0},
        cache=str(tmp_path / "cache"),
    )
    name = "model.layers.0.mlp.up_proj.weight"
    dense, recovered = (load(path, "float32").get_parameter(name) for path in (llama_dir, run.path))
    assert torch.count_nonzero(recovered == 0) > 0
    torch.testing.assert_close(recovered.norm(dim=1), dense.norm(dim=1), rtol=0.01, atol=0)
    assert run.record.stages[-1].recovery.method == {"name": "row_length", "power": 1.0}


def test_a_format_of_a_plugin_exports_and_is_read_and_verified(plugins_with, run_dir, bitmask_dir):
    plugins = plugins_with("bitmask")
    checkpoint, source = Checkpoint.open(bitmask_dir, plugins.formats), Checkpoint.open(run_dir)
    assert (checkpoint.format.name, len(checkpoint.packed)) == (
        "row-bitmask",
        11,
    )  # all but three dense layers
    manifest = checkpoint.manifest
    assert (manifest.format, set(manifest.packed.values())) == ("row_bitmask", {"2:4", "3:8", "2:8", "1:8"})
    assert set(manifest.kept_dense.values()) == {"it is dense"}
    stored = [info.bytes for name, info in checkpoint.tensors.items() if name.endswith((".kept", ".bits"))]
    assert manifest.packed_bytes == sum(stored) and len(stored) == 22
    results = run_checks(
        Subject(checkpoint, source), [plugins.build("checks", name) for name in ("structure", "round_trip")]
    )
    rows = {row.item: (row.state, row.found) for result in results for row in result.findings}
    assert {state for state, _ in rows.values()} == {"ok"}
    assert rows["reference"][1] == "all 21 tensors equal, bit for bit"
    assert rows["pack and unpack"][1].startswith("11 of 11 layers unchanged")


def test_a_format_of_an_installed_plugin_is_found_by_every_reader(
    bitmask_dir, run_dir, sample_plugin, tmp_path, monkeypatch, msp
):
    with pytest.raises(FormatError, match="sparsity format 'row-bitmask' is not read here") as error:
        load(bitmask_dir)
    assert "'sparse-24-bitmask'" in error.value.hint
    install(monkeypatch, sample_plugin("bitmask"), tmp_path)
    ours, theirs = load(bitmask_dir).state_dict(), load(run_dir).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    printed = json.loads(msp("verify", bitmask_dir, "--reference", run_dir, "--json").out)
    assert {row["state"] for check in printed for row in check["findings"]} == {"ok", "skip"}
    msp("export", bitmask_dir, "--to", "dense", "--out", tmp_path / "dense")
    dense, original = (path / "model.safetensors" for path in (tmp_path / "dense", run_dir))
    assert dense.read_bytes() == original.read_bytes()
    assert "packed as row-bitmask" in write_report(bitmask_dir, tmp_path / "report.html").read_text()


def install(monkeypatch, module, directory):
    """Make a loaded module an installed plugin."""
    info = directory / "sample-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[msp_plugin]\nsample = {module.__name__}\n")
    monkeypatch.syspath_prepend(directory)


def test_negative_zeros_become_positive_for_a_format_that_has_no_place_for_them(plugins_with):
    (format,) = (f for f in plugins_with("bitmask").formats if f.name == "row-bitmask")
    weight = torch.tensor([[-0.0, 1.0, 0, -0.0, 2, 0, 0, -3]])
    tensors, count = pack_layer(format, weight, "a.b")
    assert count == 2 and torch.equal(format.unpack(tensors, "a.b"), weight)


def test_an_exporter_of_a_plugin_writes_a_whole_directory(plugins_with, run_dir, packed_dir, tmp_path):
    exporter = plugins_with("listing").build("exporters", {"name": "listing", "file": "names.txt"})
    for source in (run_dir, packed_dir):
        out = tmp_path / source.name
        export_checkpoint(source, exporter, out)
        assert {p.name for p in out.iterdir()} == {"names.txt", "export.json"}
        assert Manifest.read(out).differences(out) == [] and Manifest.read(out).format == "listing"
        assert set((out / "names.txt").read_text().split()) == set(Checkpoint.open(run_dir).tensors)


def test_a_check_of_a_plugin_is_run_with_its_options(plugins_with, packed_dir, copied, rewrite):
    def spoil(tensor):
        tensor[:2] = float("nan")
        return tensor

    path = rewrite(copied(packed_dir), {"model.norm.weight": spoil})
    plugins = plugins_with("no_nan")
    found = {
        most: [
            (row.item, row.state, row.found)
            for result in run_checks(Subject(Checkpoint.open(path)), [plugins.build("checks", spec)])
            for row in result.findings
        ]
        for most, spec in ((0, "no_nan"), (2, {"name": "no_nan", "most": 2}))
    }
    assert found[0] == [("model.norm.weight", "fail", "2 NaN")]
    assert found[2] == [("tensors", "ok", "21 without NaN")]


def test_a_plugin_adds_a_command(plugins_with):
    app = typer.Typer()
    app.command("built-in")(lambda: None)
    plugins_with("hello").hook.msp_register_commands(app=app)
    result = CliRunner().invoke(app, ["hello", "--name", "you"])
    assert (result.exit_code, result.output) == (0, "hello you\n")


def test_observers_are_told_of_a_run(plugins_with, sample_plugin, make_problem):
    plugins, events = plugins_with("observer"), sample_plugin("observer").events
    problem = make_problem([(4, 8)], ["4:8"], 0.5)
    allocation = Allocation(problem.table, problem.menu, Fraction(1, 2))
    events.clear()
    plugins.tell("msp_run_started", allocation=allocation)
    plugins.tell("msp_layer_pruned", layer="layers.0.proj", level=Pattern(4, 8), zeros=16, weights=32)
    plugins.tell("msp_run_finished", record={"seed": 0})
    assert events == [
        ("started", allocation),
        ("pruned", "layers.0.proj", "4:8", 16, 32),
        ("finished", {"seed": 0}),
    ]


def test_an_observer_with_a_bug_ends_no_run_and_the_others_are_told(sample_plugin, caplog):
    class Broken:
        @hookimpl
        def msp_run_finished(self):
            raise KeyError("a bug")

        @hookimpl
        def msp_run_started(self, allocation):
            raise RecipeError("not this one")

    events = sample_plugin("observer").events
    events.clear()
    for first, second in (("broken", "observer"), ("observer", "broken")):
        extra = {"broken": Broken(), "observer": sample_plugin("observer")}
        plugins = Plugins({name: extra[name] for name in (first, second)}, entry_points=False)
        plugins.tell("msp_run_finished", record={})
        with pytest.raises(RecipeError, match="not this one"):  # what is meant for the user
            plugins.tell("msp_run_started", allocation=None)
    assert events.count(("finished", {})) == 2
    assert caplog.text.count("plugin broken: msp_run_finished() raised KeyError: 'a bug'") == 2


def test_a_section_of_a_plugin_is_told_of_the_run(plugins_with, make_problem):
    problem = make_problem([(4, 8), (4, 8)], ["4:8", "2:8"], "5/8")
    allocation = Allocation(problem.table, problem.menu, Fraction(5, 8))
    record = {"schema": "msp_plugin/run", "allocation": allocation.to_dict()}
    hook = plugins_with("densest").hook
    (section,) = hook.msp_report_section(record=record)
    assert section.title == "Densest units" and section.columns == ("unit", "level", "zeros")
    assert section.rows == [("layers.0.proj", "4:8", "16"), ("layers.1.proj", "2:8", "24")]
    assert hook.msp_report_section(record={"schema": "msp_plugin/compare"}) == []
