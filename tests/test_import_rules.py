"""What may import what. The names are those of docs and of the packages' own docstrings."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import msp_plugin

ROOT = Path(msp_plugin.__file__).parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
HOST = "hosts/llm_compressor/"
#: The onload of an offloaded weight; guarded, so that the recount works without the host.
GUARDED = ("checkpoint/recount.py", "compressed_tensors.utils")


def imports(file):
    found = []
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            found += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def is_of(name, packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_the_files_are_found():
    assert "plan/levels.py" in FILES and "hosts/llm_compressor/methods.py" in FILES
    packages = {file.partition("/")[0] for file in FILES if "/" in file}
    assert packages >= {"formats", "checkpoint", "verify", "serving"} and "serving/vllm/linear.py" in FILES


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("plan/")])
def test_plan_knows_only_itself_and_errors_and_no_torch(file):
    for name in imports(file):
        assert not is_of(name, ["torch", "transformers"]), name
        if is_of(name, ["msp_plugin"]):
            assert is_of(name, ["msp_plugin.plan", "msp_plugin.errors"]), name


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("allocators/")])
def test_allocators_never_import_torch(file):
    assert not [name for name in imports(file) if is_of(name, ["torch", "transformers"])]


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.startswith(("sensitivity/", "database/", "allocators/", "pruning/"))]
)
def test_components_know_no_host_and_no_command(file):
    above = [f"msp_plugin.{name}" for name in ("hosts", "checkpoint", "pipeline", "cli")]
    assert not [name for name in imports(file) if is_of(name, above)]


@pytest.mark.parametrize("file", [f for f in FILES if not f.startswith(HOST)])
def test_only_the_host_package_imports_the_host(file):
    found = {name for name in imports(file) if is_of(name, ["llmcompressor", "compressed_tensors"])}
    if file == GUARDED[0]:
        found -= {GUARDED[1], f"{GUARDED[1]}.align_module_device"}
    assert not found


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("formats/")])
def test_formats_know_torch_and_plans_and_nothing_else(file):
    for name in imports(file):
        known = is_of(name, ["torch", "msp_plugin.formats", "msp_plugin.errors", "msp_plugin.plan"])
        assert known or name.partition(".")[0] in sys.stdlib_module_names, name


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("checkpoint/")])
def test_checkpoints_know_no_check_no_command_and_no_run(file):
    above = [f"msp_plugin.{name}" for name in ("verify", "serving", "cli", "pipeline", "hosts")]
    assert not [name for name in imports(file) if is_of(name, above)]


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("serving/")])
def test_serving_knows_no_host_no_run_and_no_command(file):
    above = [f"msp_plugin.{name}" for name in ("hosts", "pipeline", "cli", "verify")]
    assert not [name for name in imports(file) if is_of(name, above)]


@pytest.mark.parametrize("file", [f for f in FILES if not f.startswith("serving/vllm/")])
def test_only_its_plugin_imports_vllm(file):
    assert not [name for name in imports(file) if is_of(name, ["vllm", "msp_plugin.serving.vllm"])]


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("verify/")])
def test_checks_know_no_command_and_no_host(file):
    above = [f"msp_plugin.{name}" for name in ("hosts", "cli", "serving", "pipeline")]
    assert not [name for name in imports(file) if is_of(name, above)]


RUNS = ("identity", "journal", "memory", "ranks", "resume", "writing")
PASSES = ("activations", "blockwise", "candidates", "exchange", "prefix", "recompute", "slopes")


@pytest.mark.parametrize("name", RUNS)
def test_what_makes_runs_safe_knows_nothing_of_what_they_do(name):
    known = [f"msp_plugin.{n}" for n in (*RUNS, "errors", "files", "calibration", "allocators.base")]
    for other in imports(f"{name}.py"):
        assert not is_of(other, ["msp_plugin"]) or other == "msp_plugin" or is_of(other, known), other


@pytest.mark.parametrize("name", PASSES)
def test_what_runs_a_model_knows_no_run_and_no_command(name):
    above = [
        f"msp_plugin.{n}" for n in ("hosts", "checkpoint", "verify", "measure", "pipeline", "cli", "report")
    ]
    assert not [other for other in imports(f"{name}.py") if is_of(other, above)]


def loaded_by(statement):
    code = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def test_importing_the_package_loads_neither_torch_nor_a_host():
    found = loaded_by("import msp_plugin; msp_plugin.hookimpl; msp_plugin.__version__")
    assert "msp_plugin" in found
    assert not found & {"torch", "transformers", "llmcompressor", "compressed_tensors", "pydantic", "numpy"}


def test_planning_and_allocators_run_without_torch():
    found = loaded_by(
        "import msp_plugin.plan.allocation, msp_plugin.plugins.manager\n"
        "import msp_plugin.allocators.msp, msp_plugin.allocators.uniform"
    )
    assert "numpy" in found and not found & {"torch", "transformers", "llmcompressor"}


def test_packing_and_unpacking_need_torch_alone():
    found = loaded_by("import msp_plugin.formats.sparse24")
    assert "torch" in found and not found & {
        "transformers",
        "safetensors",
        "llmcompressor",
        "pydantic",
        "vllm",
    }


def test_checkpoints_and_checks_run_without_a_host_and_without_vllm():
    found = loaded_by(
        "import msp_plugin.checkpoint.export, msp_plugin.checkpoint.load, msp_plugin.verify.served"
    )
    assert "safetensors" in found and not found & {"llmcompressor", "compressed_tensors", "vllm"}


def test_the_package_names_what_it_exports():
    from msp_plugin.checkpoint.load import load
    from msp_plugin.plugins.hookspecs import hookimpl
    from msp_plugin.pruning.base import LayerwisePruner

    assert msp_plugin.hookimpl is hookimpl and msp_plugin.LayerwisePruner is LayerwisePruner
    assert msp_plugin.load is load
    with pytest.raises(AttributeError, match="MixedSparsity'"):
        _ = msp_plugin.MixedSparsity
