"""The code in the READMEs runs: Python as it stands, commands as far as their options go, recipes as far as they are read."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import click
import pytest
import typer

import msp_plugin
from msp_plugin.cli.app import app
from msp_plugin.plugins.manager import Plugins

ROOT = Path(__file__).parent.parent
TEXT = "The search says which layer may keep fewer, and a sparse matrix keeps two of every four weights.\n"
READMES = [
    ROOT / "README.md",
    ROOT / "recipes" / "README.md",
    *sorted((ROOT / "msp_plugin").rglob("README.md")),
]


def blocks(language):
    """Return (a name for it, the code) of every block in this language of all READMEs."""
    return [
        pytest.param(code, id=f"{readme.parent.relative_to(ROOT)}-{number}")
        for readme in READMES
        for number, code in enumerate(
            re.findall(
                rf"^```{language}\n(.*?)^```", readme.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
            )
        )
    ]


def commands():
    """Return the arguments of every ``msp`` command in the READMEs, one list for each."""
    found = []
    for block in blocks("bash"):
        text = re.sub(r"\\\n", " ", block.values[0])
        for line in re.split(r"[\n;]|&&", text):
            words = shlex.split(line, comments=True)
            starts = [i for i, word in enumerate(words) if word == "msp" or word.endswith("/msp")]
            if "msp_plugin" in words[:6]:  # torchrun -m msp_plugin
                starts.append(words.index("msp_plugin"))
            if starts:
                found.append(words[starts[0] + 1 :])
    return found


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_a_command_has_the_options_that_a_readme_gives_it(arguments):
    command = typer.main.get_command(app)
    context = click.Context(command, info_name="msp")
    name, found, rest = command.resolve_command(context, list(arguments))
    found.make_context(name, rest, parent=context)  # raises UsageError for an unknown option or a missing one


def test_the_readmes_have_code_to_run():
    assert len(commands()) > 12 and len(blocks("python")) >= 4 and len(blocks("yaml")) >= 1


@pytest.mark.parametrize("code", [b for b in blocks("python") if "hookimpl" in b.values[0]])
def test_a_plugin_written_from_a_readme_alone_prunes_a_model(code, llama_dir, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    package = tmp_path / "site"
    about = package / "written_from_readme-1.0.dist-info"
    about.mkdir(parents=True)
    (package / "written_from_readme.py").write_text(code)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: written-from-readme\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[msp_plugin]\nreadme = written_from_readme\n")
    (about / "top_level.txt").write_text("written_from_readme\n")
    monkeypatch.syspath_prepend(package)
    monkeypatch.delitem(sys.modules, "written_from_readme", raising=False)
    importlib.invalidate_caches()
    name = re.search(r'name = "(\w+)"', code)[1]
    role = {
        "pruners": "method",
        "structured_pruners": "method",
        "recoveries": "recover",
        "allocators": "allocator",
    }[re.search(r"msp_register_(\w+)", code)[1]]
    levels = {"levels": "width"} if "StructuredPruner" in code else {}
    run = msp_plugin.prune(
        llama_dir, msp_plugin.Text(str(text), samples=8, length=16, test_samples=2), tmp_path / "out", sparsity=0.5,
        cache=str(tmp_path / "cache"),
        **{"method": "magnitude", "allocator": "uniform", role: name}, **levels,
    )  # fmt: skip
    allocation = json.loads((tmp_path / "out" / "allocation.json").read_text())
    if role == "recover":
        assert run.record.stages[-1].recovery.method["name"] == name
    else:
        assert allocation["provenance"][role]["name"] == name
    assert 2 * allocation["budget"]["zeros"] == allocation["budget"]["weights"]


@pytest.mark.parametrize("code", blocks("yaml"))
def test_a_recipe_of_a_readme_is_read(code):
    pytest.importorskip("llmcompressor")
    import yaml

    from msp_plugin.hosts.llm_compressor.recipe import Recipe

    assert Recipe.parse(yaml.safe_load(code), Plugins()).options is not None


@pytest.mark.slow
def test_the_readmes_job_for_llm_compressor_runs(llama_dir, make_samples, tmp_path, monkeypatch):
    pytest.importorskip("llmcompressor")
    from torch.utils.data import DataLoader

    (code,) = [b.values[0] for b in blocks("python") if "oneshot(" in b.values[0]]
    for there, here in (("meta-llama/Llama-3.1-8B", str(llama_dir)), ("llama-75", str(tmp_path / "out"))):
        code = code.replace(f'"{there}"', repr(here))
    text = DataLoader([{"input_ids": sample} for sample in make_samples(16, 32).samples], batch_size=2)
    monkeypatch.setenv("MSP_CACHE", str(tmp_path / "cache"))
    exec(code.replace('"open_platypus"', "text"), {"text": text})  # noqa: S102 - our own README
    allocation = json.loads((tmp_path / "out" / "allocation.json").read_text())
    assert 4 * allocation["budget"]["zeros"] == 3 * allocation["budget"]["weights"]
    assert type(msp_plugin.load(tmp_path / "out")).__name__ == "LlamaForCausalLM"
