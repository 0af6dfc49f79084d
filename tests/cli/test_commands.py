"""The command line in one process, on the embedded Qwen2-type model with a small search."""

import json
import platform

import pytest
import torch

from msp_plugin.demo import demo_model_path
from msp_plugin.errors import RecipeError
from msp_plugin.plan.allocation import Allocation
from tests.helpers.commands import SEARCH

SMALL = ["--samples", "6", "--length", "64", "--text-column", "text"]


def test_every_command_shows_an_example_in_its_help(msp):
    commands = (
        "demo", "run", "prune", "recover", "allocate", "sensitivity", "export", "verify", "eval", "bench", "report", "compare",
        "plugins", "doctor", "enable", "disable",
    )  # fmt: skip
    listed = msp("--help").out
    for command in commands:
        assert command in listed
        assert f"Example: msp {command}" in msp(command, "--help").out, command


def test_prune_leaves_a_whole_run_and_json_equals_the_file(msp, text_file, qwen2_dir, tmp_path):
    out = tmp_path / "out"
    printed = msp(
        "prune", qwen2_dir, "-s", "0.75", "--method", "wanda", "--data", text_file, "--out", out,
        *SMALL, *SEARCH, "--test-samples", "4", "--dtype", "float32", "--json",
    )  # fmt: skip
    record = json.loads(printed.out)
    assert record == json.loads((out / "run.json").read_text())
    assert record["sparsity"]["achieved"] == record["sparsity"]["target"] == 0.75
    assert set(record["perplexity"]) == {"dense", "uniform", "mixed"}
    assert all(value > 1 for value in record["perplexity"].values())
    assert [stage["name"] for stage in record["stages"]] == ["dense", "uniform", "prune"]
    assert [stage["perplexity"] for stage in record["stages"]] == [
        record["perplexity"][name] for name in ("dense", "uniform", "mixed")
    ]
    assert [stage["sparsity"] for stage in record["stages"]] == [None, 0.75, 0.75]
    assert record["stages"][0]["seconds"] is None and record["stages"][1]["seconds"] > 0
    assert record["stages"][2]["seconds"] == record["seconds"]
    search = record["search"]
    assert search["allocator"] == "search" and search["forward_tokens"] > 128 and search["evaluations"] >= 3
    assert min(loss for _, loss in search["holdout"]) <= search["holdout"][0][1]  # uniform's
    assert Allocation.read(out / "allocation.json").budget.exact
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml"} <= {
        p.name for p in out.iterdir()
    }
    assert [p.name for p in tmp_path.iterdir() if ".partial" in p.name] == []


def test_run_takes_any_recipe_of_the_host(msp, text_file, qwen2_dir, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        'a_stage:\n  b_modifiers:\n    WandaPruningModifier: {sparsity: 0.5, mask_structure: "2:4", '
        'targets: [Linear], ignore: ["re:.*lm_head"]}\n'
    )
    out = tmp_path / "out"
    msp(
        "run", recipe, "--model", qwen2_dir, "--data", text_file, "--out", out, *SMALL,
        "--test-samples", "4", "--dtype", "float32",
    )  # fmt: skip
    record = json.loads((out / "run.json").read_text())
    assert set(record["perplexity"]) == {"dense", "result"}
    assert record["python"] == platform.python_version()
    assert not (out / "allocation.json").exists()


def test_an_allocation_made_once_prunes_later(msp, text_file, qwen2_dir, tmp_path, monkeypatch):
    path, out = tmp_path / "allocation.json", tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shown = msp(
        "allocate", qwen2_dir, "-s", "5/8", "--method", "magnitude", "--data", text_file,
        "--out=~/allocation.json", *SMALL, *SEARCH, "--dtype", "float32",  # no shell opens this ~
    )  # fmt: skip
    assert "model.layers.0.self_attn.q_proj" in shown.out and not (tmp_path / "~").exists()
    msp(
        "prune", qwen2_dir, "--allocation", path.name, "--method", "magnitude", "--data", text_file,
        "--out", out, *SMALL, "--test-samples", "4", "--dtype", "float32", "--no-baseline",
    )  # fmt: skip
    assert Allocation.read(out / "allocation.json") == Allocation.read(path)
    monkeypatch.chdir("/")  # the recipe runs again from anywhere
    again = (
        "run", out / "recipe.yaml", "--model", qwen2_dir, "--data", text_file, *SMALL, "--test-samples", "4",
        "--dtype", "float32", "--no-baseline", "--out", tmp_path / "again",
    )  # fmt: skip
    msp(*again)
    assert (tmp_path / "again" / "allocation.json").read_bytes() == (out / "allocation.json").read_bytes()


def test_sensitivity_prints_one_row_per_unit(msp, text_file, qwen2_dir):
    printed = msp("sensitivity", qwen2_dir, "--data", text_file, "--samples", "2", "--length", "64", "--json")
    rows = json.loads(printed.out)["units"]
    assert len(rows) == 2 * 4
    assert all(row["sensitivity"] > 0 for row in rows)


def test_plugins_and_doctor_speak_json(msp):
    rows = json.loads(msp("plugins", "--json").out)
    expected = {
        ("pruner", "sparsegpt"),
        ("allocator", "msp"),
        ("estimator", "fisher"),
        ("exporter", "sparse24"),
    }
    assert {*expected, ("check", "structure")} <= {(row["kind"], row["name"]) for row in rows}
    checks = json.loads(msp("doctor", "--json").out)
    assert {c["name"] for c in checks} >= {"python", "torch", "llmcompressor", "modifier", "plugins"}


def test_doctor_names_the_space_of_a_cache_and_one_that_cannot_be_written(msp, monkeypatch, tmp_path):
    from msp_plugin.cli import doctor

    def cache(path):
        monkeypatch.setenv("MSP_CACHE", str(path))
        return next(check for check in doctor.examine() if check.name == "cache")

    (tmp_path / "a").write_bytes(bytes(2**20))
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert cache(tmp_path).state == "ok" and f"{tmp_path}, 1 MiB, " in cache(tmp_path).found
    assert "GiB free" in cache(tmp_path / "new" / "one").found and len(list(tmp_path.iterdir())) == 2
    for path in ("/proc/nope/x", tmp_path / "a" / "x"):
        check = cache(path)
        assert check.state == "fail" and check.advice.startswith("set MSP_CACHE to")
        assert str(path) in check.found or f"{tmp_path}/a is a file" in check.found


@pytest.mark.parametrize(("kernel", "state", "words"), [
    ("avx1024", "fail", "avx1024"), ("dense", "warn", "MSP_CPU_KERNEL says so"), ("", "ok", "not built yet"),
])  # fmt: skip
def test_doctor_reads_which_kernel_is_forced_before_one_is_built(kernel, state, words, monkeypatch):
    from msp_plugin.cli import doctor
    from msp_plugin.serving.cpu import build

    monkeypatch.setattr(build, "is_built", lambda: False)
    monkeypatch.setenv("MSP_CPU_KERNEL", kernel)
    check = next(check for check in doctor.examine() if check.name == "cpu kernel")
    assert check.state == state and words in check.found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"-s": "75"}, ["outside [0, 1)", "write 0.75"]),
        ({"-s": "0.99"}, ["out of reach", "0 to 0.875"]),
        ({"--method": "wandda"}, ["no pruner called 'wandda'", "did you mean 'wanda'"]),
        ({"--allocator": "mps"}, ["no allocator called 'mps'"]),
        ({"--set": "allocator.popsize=3"}, ["has no option 'popsize'"]),
        ({"--set": "methd.block_size=3"}, ["no such role 'methd'", "did you mean 'method'"]),
        ({"--levels": "2:4,3:7,dense"}, ["3:7 does not fit", "does not divide in_features"]),
        ({"--data": "/nowhere/text.txt"}, ["no data file at /nowhere/text.txt"]),
        ({"--length": "4000"}, ["samples of 4000", "takes 1024 at most"]),
        ({"--samples": "5000"}, ["needed: 5004"]),
        ({"--batch": "0"}, ["batch = 0"]),
        ({"--seed": "-1"}, ["seed = -1"]),
        ({"--set": "allocator.tokens=["}, ["is not a value"]),
        ({"--ignore": "mlp"}, ["matches LlamaMLP".replace("Llama", "Qwen2"), "but no linear"]),
        ({"--ignore": "layers.99"}, ["ignore 'layers.99' matches no module"]),
        ({"--target": "q_prj"}, ["target 'q_prj' matches no module", "did you mean 'q_proj'"]),
        ({"--dtype": "int8"}, ["dtype 'int8' is unknown"]),
        ({"model": "/nowhere/model"}, ["no model directory at /nowhere/model"]),
        ({"model": "demo:lama"}, ["no demo model 'lama'", "did you mean 'llama'"]),
        ({"--set": "allocator.tokens=100000"}, ["held-out tokens", "leave at most 192 for it"]),
    ],
)  # fmt: skip
def test_bad_input_is_explained_and_nothing_is_written(msp, text_file, tmp_path, change, words):
    given = {"-s": "0.75", "--data": str(text_file), "--method": "wanda", **change}
    model = given.pop("model", "demo:qwen2")
    extra = [] if "--length" in change else ["--length", "64"]
    flat = [part for pair in given.items() for part in pair]
    out = tmp_path / "out"
    printed = msp(
        "prune", model, "--samples", "6", *flat, *extra, "--test-samples", "4", "--out", out, code=2
    )
    assert "error: " in printed.err and "Traceback" not in printed.err
    assert "perplexity" not in printed.err  # nothing that takes time was done
    for word in words:
        assert word in printed.err
    assert not out.exists()
    assert [p.name for p in tmp_path.iterdir() if ".partial" in p.name] == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["bench", "{run}", "--against", ""], "the argument after --against is blank"),
        (["bench", " "], "the argument after bench is blank"),
        (["eval", "{run}", "--data", "demo:test", "--reference="], "--reference is blank"),
        (["recover", "{run}", "--original", "", "--data", "demo:test", "--out", "x"], "--original is blank"),
        (["report", "{run}", "--out", ""], "--out is blank"),
    ],
)
def test_a_blank_model_or_path_is_refused_and_does_not_count_as_none(line, words, msp, run_dir):
    assert words in msp(*(part.format(run=run_dir) for part in line), code=2).err


def test_a_relative_model_is_recorded_so_that_the_reports_commands_find_it(
    msp, llama_dir, text_file, tmp_path, monkeypatch
):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "llama").symlink_to(llama_dir)
    monkeypatch.chdir(tmp_path)
    msp(
        "prune", "models/llama", "-s", "0.5", "-m", "magnitude", "--allocator", "uniform", "--data", text_file, "--length",
        "16", "--samples", "4", "--cache", "cache", "--out", "out",
    )  # fmt: skip
    msp("report", "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"msp prune {tmp_path}/models/llama -m magnitude --allocation allocation.json" in page


def test_the_command_of_a_plugin_may_take_a_blank_argument(msp, monkeypatch):
    from typer import Typer

    from msp_plugin.cli import app

    def hello(name: str) -> None:
        print(f"hello <{name}>")

    other = Typer(cls=app.Commands)
    other.command()(hello)
    group = Typer()
    group.command()(hello)
    group.command("other")(hello)
    other.add_typer(group, name="group")
    monkeypatch.setattr(app, "app", other)
    assert msp("hello", "").out == msp("group", "hello", "").out == "hello <>\n"


@pytest.mark.parametrize(("debug", "shown"), [("", True), ("0", True), ("1", False)])
def test_debug_is_on_only_where_its_switch_says_so(msp, monkeypatch, debug, shown):
    monkeypatch.setenv("MSP_DEBUG", debug)
    if shown:
        assert "error: " in msp("report", "/nowhere", code=2).err
    else:
        with pytest.raises(RecipeError):
            msp("report", "/nowhere")


def test_an_output_directory_with_something_in_it_is_refused_first(msp, text_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    printed = msp("prune", "demo:qwen2", "-s", "0.5", "--data", text_file, "--out", tmp_path / "out", code=2)
    assert "is not empty" in printed.err
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_a_checkpoint_with_nan_weights_is_refused_and_nothing_is_written(msp, text_file, tmp_path):
    from msp_plugin.models.load import load_model
    from msp_plugin.models.source import load_tokenizer

    model = load_model(demo_model_path("qwen2"), "float32")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    load_tokenizer(demo_model_path("qwen2")).save_pretrained(tmp_path / "broken")
    printed = msp(
        "prune", tmp_path / "broken", "-s", "0.5", "--method", "wanda", "--allocator", "uniform", "--data",
        text_file, "--out", tmp_path / "out", *SMALL, "--test-samples", "0", code=1,
    )  # fmt: skip
    assert "weights that are not finite, e.g. model.layers.2.mlp.up_proj" in printed.err
    assert not (tmp_path / "out").exists()


def test_the_uniform_allocation_is_not_compared_with_itself_and_a_demo_model_is_recorded_by_its_name(
    msp, text_file, tmp_path
):
    printed = msp(
        "prune", "demo:qwen2", "-s", "0.5", "-m", "magnitude", "--allocator", "uniform", "--data", text_file, "--out",
        tmp_path / "out", *SMALL, "--test-samples", "4",
    )  # fmt: skip
    assert "uniform" in printed.out and "takes back" not in printed.out
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model"]["source"] == "demo:qwen2"


def test_the_baseline_of_a_given_allocation_prunes_the_same_layers(msp, text_file, qwen2_dir, tmp_path):
    path, out = tmp_path / "allocation.json", tmp_path / "out"
    common = ("--method", "magnitude", "--data", text_file, *SMALL, "--dtype", "float32")
    msp("allocate", qwen2_dir, "-s", "0.5", "--allocator", "uniform", "--ignore", "down_proj", "--out", path,
        *common)  # fmt: skip
    msp("prune", qwen2_dir, "--allocation", path, "--out", out, "--test-samples", "4", *common)
    quality = json.loads((out / "run.json").read_text())["perplexity"]
    assert quality["uniform"] == quality["mixed"] != quality["dense"]


def test_sensitivity_takes_the_options_of_its_estimator(msp, text_file, qwen2_dir):
    common = ("sensitivity", qwen2_dir, "--data", text_file, "--length", "64", "--json")
    first = json.loads(msp(*common, "--samples", "3").out)
    assert first["estimator"] == {"name": "fisher", "samples": 3}
    second = json.loads(msp(*common, "--samples", "3", "--set", "estimator.samples=2").out)
    assert second["estimator"]["samples"] == 2 and second["units"] != first["units"]


@pytest.mark.parametrize(
    "step", ["msp_plugin.passes.by_block.BlockPass.run", "msp_plugin.search.measurements.unit_sensitivities"]
)
def test_memory_that_does_not_suffice_ends_a_command_with_one_error(
    step, msp, text_file, qwen2_dir, tmp_path, monkeypatch
):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nof 80 GiB")

    monkeypatch.setattr(step, full)
    ran = msp(
        "allocate", qwen2_dir, "-s", "0.75", "--method", "wanda", "--data", text_file, *SMALL, *SEARCH,
        "--out", tmp_path / "a.json", code=1,
    )  # fmt: skip
    assert "error: out of memory: CUDA out of memory. Tried to allocate 20.00 GiB." in ran.err
    assert "--length" in ran.err and "Traceback" not in ran.err and not (tmp_path / "a.json").exists()


@pytest.fixture
def bos_model(llama_dir, bos_tokenizer, copied):
    path = copied(llama_dir, "bos")
    bos_tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("options, bos", [((), "<s>"), (("--no-bos",), None)])
def test_a_run_says_what_it_read_and_how_samples_start(msp, bos_model, tmp_path, options, bos):
    pytest.importorskip("llmcompressor")
    rows = [{"messages": [{"role": "user", "content": "The cat sat on the mat. " * 3}]}] * 60 + [
        {"messages": None}
    ]
    data = tmp_path / "chats\udcff.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    common = ("--data", data, "--samples", 8, "--length", 16, *options)
    run = ("prune", bos_model, "-s", "0.5", "-m", "magnitude", "--allocator", "uniform", "--levels", "2:4")
    msp(*run, *common, "--test-samples", 4, "--out", tmp_path / "out", "--json")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    read = {
        "source": str(tmp_path / r"chats\udcff.jsonl"),
        "columns": ["messages"],
        "rows": 61,
        "skipped": 1,
        "bos": bos,
    }
    assert record["calibration"]["sources"] == [{**read, "samples": 8}]
    assert record["test"]["sources"] == [{**read, "samples": 4}]
    found = json.loads(msp("eval", tmp_path / "out", *common, "--json").out)["perplexity"][0]
    assert found["read"] == {**read, "samples": 8}
    verified = msp("verify", tmp_path / "out", "--check", "quality", *common, "--json")
    assert json.loads(verified.out)[0]["passed"]


@pytest.mark.parametrize("command", ["allocate", "sensitivity", "prune", "compare", "eval", "verify"])
def test_every_command_that_reads_text_can_start_samples(
    msp, llama_dir, run_dir, tmp_path, text_file, command
):
    more = {
        "allocate": ("-s", "0.5"),
        "prune": ("-s", "0.5", "--out", tmp_path / "out"),
        "compare": ("--out", tmp_path / "out"),
    }
    model = run_dir if command == "verify" else llama_dir
    shown = msp(command, model, "--data", text_file, "--length", 16, *more.get(command, ()), "--bos", code=2)
    assert "the tokenizer has no beginning-of-text token" in shown.err
