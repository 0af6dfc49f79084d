"""`msp enable`, `msp disable` and a third-party distribution, in fresh interpreters."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from msp_plugin.cli import enable

RIA = Path(__file__).parents[1] / "plugins" / "msp-ria"
RECIPE = "a_stage: {b_modifiers: {MixedSparsityModifier: {sparsity: 0.5}}}"
SCRIPT = f"from llmcompressor.recipe import Recipe; print(Recipe.create_instance({RECIPE!r}).modifiers)"


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )


def test_enable_leaves_one_file_and_disable_removes_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda *a, **k: {"purelib": str(tmp_path)})
    enable.enable()
    assert enable.is_enabled() and [p.name for p in tmp_path.iterdir()] == ["msp_plugin_autoload.pth"]
    enable.disable()
    assert not enable.is_enabled() and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_enable_makes_an_unchanged_script_know_the_modifier_and_disable_undoes_it(tmp_path):
    # A site directory of its own stands for site-packages: this environment is left as it is.
    code = (
        "import sysconfig, sys; from pathlib import Path\n"
        f"sysconfig.get_paths = lambda *a, **k: {{'purelib': {str(tmp_path)!r}}}\n"
        "from msp_plugin.cli import enable\n"
    )
    script = f"import site; site.addsitedir({str(tmp_path)!r})\n{SCRIPT}"
    before = python(script)
    assert before.returncode != 0 and "No modifier of type 'MixedSparsityModifier'" in before.stderr
    assert python(code + "enable.enable(); assert enable.is_enabled()").returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["msp_plugin_autoload.pth"]
    during = python(script)
    assert "MixedSparsityModifier" in during.stdout, during.stderr
    assert python(code + "enable.disable(); assert not enable.is_enabled()").returncode == 0
    assert list(tmp_path.iterdir()) == []  # as before


def test_the_start_up_hook_imports_neither_torch_nor_the_host():
    code = (
        "import msp_plugin._autoload, sys; print([m for m in ('torch', 'llmcompressor') if m in sys.modules])"
    )
    assert python(code).stdout.strip() == "[]"


@pytest.mark.slow
def test_one_import_makes_the_modifier_known():
    done = python(f"from msp_plugin import MixedSparsityModifier; {SCRIPT}")
    assert "MixedSparsityModifier" in done.stdout, done.stderr


@pytest.fixture
def ria(tmp_path, monkeypatch):
    """msp-ria as an installer leaves it: its module and its metadata, from its pyproject.toml."""
    about = tomllib.loads((RIA / "pyproject.toml").read_text())["project"]
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "msp_ria.py").write_text((RIA / "msp_ria.py").read_text())
    info = tmp_path / "site" / f"msp_ria-{about['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {about['name']}\nVersion: {about['version']}\n")
    points = "\n".join(f"{name} = {module}" for name, module in about["entry-points"]["msp_plugin"].items())
    (info / "entry_points.txt").write_text(f"[msp_plugin]\n{points}\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    sys.modules.pop("msp_ria", None)


@pytest.fixture(scope="module")
def installed_ria(tmp_path_factory):
    """The environment variables of processes in which pip has installed msp-ria."""
    target = tmp_path_factory.mktemp("site")
    copy = tmp_path_factory.mktemp("src")
    for name in ("pyproject.toml", "msp_ria.py"):
        (copy / name).write_text((RIA / name).read_text())
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation",
         "--target", str(target), str(copy)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return {"PYTHONPATH": os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.slow
def test_a_third_party_method_of_25_lines_prunes_like_a_built_in_one(installed_ria, tmp_path):
    assert len((RIA / "msp_ria.py").read_text().splitlines()) <= 25
    text = tmp_path / "text.txt"
    text.write_text("for i in range(10):\n    print(i * i)\n" * 200)
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "msp_plugin", "prune", "demo:qwen2", "-s", "0.75", "-m", "ria", "--data",
         str(text), "--samples", "6", "--length", "64", "--test-samples", "2", "--dtype", "float32",
         "--set", "allocator.rounds=1", "--set", "allocator.seeds=3", "--set", "allocator.tokens=128",
         "--set", "allocator.holdout=64", "--set", "method.power=0.7", "--cache", str(tmp_path / "cache"),
         "--out", str(out)],
        capture_output=True, text=True, env={**os.environ, **installed_ria},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from msp_plugin.checkpoint.recount import recount_model
    from msp_plugin.models.load import load_model
    from msp_plugin.plan.allocation import Allocation

    allocation = Allocation.read(out / "allocation.json")
    assert allocation.provenance["method"]["power"] == 0.7
    assert recount_model(load_model(out), allocation).sparsity == 0.75


def test_the_plugin_list_names_the_distribution_of_each_component(ria, msp):
    assert '"ria (msp-ria 1.0)"' in msp("plugins", "--json").out


def test_a_blocked_plugin_is_not_loaded(ria, msp, monkeypatch):
    monkeypatch.setenv("MSP_BLOCK_PLUGINS", "ria")
    assert "msp-ria" not in msp("plugins", "--json").out
