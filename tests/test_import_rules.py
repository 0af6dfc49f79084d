"""The order of the rooms: a file imports its own room and those before it in ORDER."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import msp_plugin

ROOT = Path(msp_plugin.__file__).parent
#: From the bottom up. Whoever adds a room finds its place here.
ORDER = (
    "errors", "progress", "runtime", "plan", "formats", "records", "models", "structure", "pruning", "allocators", "data", "demo",
    "passes", "plugins", "checkpoint", "sensitivity", "database", "recovery", "verify", "serving", "search", "hosts", "evaluation",
    "runs", "report", "cli",
)  # fmt: skip
#: Files that name what lies above them, and that nobody imports: the public names, the start of the command and of a
#: host, and the built-in plugins, which the manager loads by name.
LOOK_UP = ("__init__.py", "__main__.py", "_autoload.py", "plugins/builtin.py")
#: Packages that only these rooms may import.
FRAMEWORKS = {
    "llmcompressor": ("hosts/llm_compressor/",),
    "compressed_tensors": ("hosts/llm_compressor/",),
    "vllm": ("serving/vllm/",),
    "typer": ("cli/", "plugins/hookspecs.py"),
    "rich": ("cli/",),
}
#: Rooms that plan with whole numbers and lists, and never load a tensor library.
WITHOUT_TORCH = ("plan/", "allocators/", "records/")


@cache
def tree_of(file):
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


@cache
def imports(file):
    """Return (name, inside a function) of every import; ``from a import b`` counts as ``a.b`` where that is a module."""
    tree = tree_of(file)
    lazy = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.append((name if is_module(name) else node.module, id(node) in lazy))
    return found


def is_module(name):
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def room(file_or_module):
    return file_or_module.removeprefix("msp_plugin.").replace("/", ".").removesuffix(".py").partition(".")[0]


FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def test_every_file_has_a_room_in_the_order():
    assert {room(file) for file in FILES if file not in LOOK_UP} == set(ORDER)


def test_files_import_their_own_room_and_lower_ones():
    wrong = []
    for file in FILES:
        for name, lazy in imports(file):
            if not name.startswith("msp_plugin.") or (
                file in LOOK_UP and (lazy or file != "plugins/builtin.py")
            ):
                continue
            if ORDER.index(room(name)) > ORDER.index(room(file)):
                wrong.append(f"{file} imports {name}")
    assert not wrong


def test_no_file_imports_itself_by_way_of_others():
    graph = {
        "msp_plugin." + file.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): {
            name for name, _ in imports(file) if name.startswith("msp_plugin.")
        }
        for file in FILES
        if file not in ("__init__.py", "__main__.py")
    }
    done, circles = set(), []

    def visit(name, way):
        if name in way:
            circles.append(" > ".join([*way[way.index(name) :], name]))
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, [*way, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    assert not circles


def test_each_framework_is_imported_in_its_own_rooms():
    wrong = [
        f"{file} imports {name}"
        for file in FILES
        for name, _ in imports(file)
        if not file.startswith(FRAMEWORKS.get(name.partition(".")[0], ""))
    ]
    assert not wrong


def test_plans_allocators_and_records_know_no_torch():
    wrong = [
        f"{file} imports {name}"
        for file in FILES
        if file.startswith(WITHOUT_TORCH)
        for name, _ in imports(file)
        if name.partition(".")[0] in ("torch", "transformers", "safetensors")
    ]
    assert not wrong


def test_no_file_tells_the_kinds_of_levels_apart_but_asks_the_level():
    wrong = [
        f"{file}:{node.lineno}"
        for file in FILES
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id in ("isinstance", "type", "issubclass")
        if any(isinstance(name, ast.Name) and name.id in ("Width", "Pattern") for name in ast.walk(node))
    ]
    assert not wrong


#: Statements by the process that runs them, one after another, each with the packages that are not loaded then.
ABSENT = (
    (
        ("import msp_plugin; msp_plugin.hookimpl", "torch transformers llmcompressor pydantic numpy"),
        ("import msp_plugin.report, msp_plugin.cli.report", "torch matplotlib jinja2 pydantic numpy"),
        (
            "import msp_plugin.plan.allocation, msp_plugin.plugins.manager, msp_plugin.allocators.search",
            "torch transformers llmcompressor",
        ),
    ),
    (
        ("import msp_plugin.formats.sparse24", "transformers safetensors llmcompressor pydantic vllm"),
        (
            "import msp_plugin.serving.kernels; import torch; assert not torch.cuda.is_initialized(); "
            "assert hasattr(torch.ops.msp_plugin, 'sparse24_linear')",
            "llmcompressor compressed_tensors vllm",
        ),
        (
            "import msp_plugin.checkpoint.export, msp_plugin.checkpoint.load, msp_plugin.verify.served",
            "llmcompressor compressed_tensors vllm",
        ),
        ("import msp_plugin.evaluation.evaluate, msp_plugin.cli.evaluate", "lm_eval datasets llmcompressor"),
    ),
)


@pytest.mark.parametrize("steps", ABSENT, ids=("without torch", "with torch"))
def test_what_an_import_does_not_load(steps):
    listed = "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    code = "\n".join(["import sys", *(f"{statement}\n{listed}" for statement, _ in steps)])
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for (statement, absent), loaded in zip(steps, found.stdout.splitlines(), strict=True):
        assert not set(loaded.split()) & set(absent.split()), statement


def test_sample_plugins_import_from_the_package_alone():
    plugins = Path(__file__).parent / "plugins"
    wrong = [
        f"{path.name}: {node.module}"
        for path in plugins.rglob("*.py")
        if not path.name.startswith("test_")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("msp_plugin.")
    ]
    assert not wrong


def test_the_package_names_what_it_exports():
    for name in msp_plugin.__all__:
        assert getattr(msp_plugin, name) is not None
    with pytest.raises(AttributeError, match="MixedSparsity'"):
        _ = msp_plugin.MixedSparsity
