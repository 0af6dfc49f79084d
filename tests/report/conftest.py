"""Records to draw. The comparison's numbers are made up, on a real allocation problem: these are tests of
drawing, and say nothing about any allocator."""

import json
import math
import random
import shutil
from fractions import Fraction
from html.parser import HTMLParser

import pytest

from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.levels import Level
from msp_plugin.plan.menus import parse_menu
from msp_plugin.plan.units import Layer, group_layers
from msp_plugin.plugins.manager import Plugins
from msp_plugin.report import write_report

LEVELS = ("dense", "7:8", "6:8", "5:8", "4:8", "3:8", "2:8", "1:8")
PROJECTIONS = (
    ("self_attn.q_proj", 64, 64), ("self_attn.k_proj", 32, 64), ("self_attn.v_proj", 32, 64),
    ("self_attn.o_proj", 64, 64), ("mlp.gate_proj", 128, 64), ("mlp.up_proj", 128, 64), ("mlp.down_proj", 64, 128),
)  # fmt: skip
#: By made-up allocator: options, forward tokens, how much better than uniform.
ALLOCATORS = {
    "uniform": ([{}], 0, 0.0),
    "knapsack": ([{"error": "output"}, {"error": "fisher"}], 0, 0.3),
    "evolution": ([{"loss": "kl"}], 2_400_000, 0.45),
    "msp": ([{"generations": 16, "loss": "kl"}, {"generations": 40, "loss": "kl"}], 704_512, 0.5),
}


def pytest_runtest_setup():
    for package in ("matplotlib", "jinja2"):
        pytest.importorskip(package, reason="no report is drawn: the extra `report` is not installed")


class Page(HTMLParser):
    """A page, taken apart: every tag with its attributes, the text, and the text of each table's rows."""

    VOID = ("meta", "link", "br", "img", "hr", "input")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.rows, self.words, self.errors = [], [], [], [], []
        self.feed(text)
        self.close()
        self.errors += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def row(self, first):
        """The cells of the first row that begins with a text."""
        return next([c.strip() for c in row] for row in self.rows if row and row[0].strip() == first)


@pytest.fixture(scope="session")
def page():
    def read(path):
        return Page(path.read_text(encoding="utf-8"))

    return read


@pytest.fixture(scope="session")
def table():
    """The units of a Llama-type model: four each in a number of blocks."""

    def make(blocks=4):
        return group_layers(
            [
                (i, Layer(f"model.layers.{i}.{name}", out, width))
                for i in range(blocks)
                for name, out, width in PROJECTIONS
            ]
        )

    return make


@pytest.fixture(scope="session")
def make_comparison(table):
    """The contents of a compare.json; allocations are solved on the budget, all measurements are made up."""

    def make(blocks=4, methods=("sparsegpt", "wanda"), sparsities=("5/8", "3/4"), seeds=3, units=None):
        units = units or table(blocks)
        rows = [
            made_up_row(units, method, sparsity, name, options, seed)
            for method in methods
            for sparsity in sparsities
            for name, (variants, _, _) in ALLOCATORS.items()
            for options in variants
            for seed in range(seeds if name != "uniform" else 1)
        ]
        rows[-1] = {**rows[-1], "perplexity": None, "kl": None, "error": "out of memory: 12 GiB asked for"}
        generator = random.Random(1)  # noqa: S311
        return {
            "schema": "msp_plugin/compare", "version": 1,
            "model": {
                "source": "/models/llama", "architecture": "LlamaForCausalLM", "fingerprint": "a" * 64,
                "dtype": "bfloat16",
            },
            "levels": list(LEVELS), "granularity": "unit",
            "texts": {
                name: {"source": f"{name}.txt", "samples": 64, "tokens": 16384, "fingerprint": "b" * 64}
                for name in ("calibration", "search", "holdout", "test")
            },
            "units": [unit_entry(unit) for unit in units],
            "dense": {"perplexity": 12.87},
            "sensitivities": {
                name: [10 ** generator.uniform(-3, 1) for _ in units] for name in ("fisher", "hutchinson")
            },
            "rows": rows,
            "versions": {"msp_plugin": "0.1.0", "torch": "2.13.0"}, "machine": "2 cores",
        }  # fmt: skip

    return make


@pytest.fixture(scope="session")
def compared(tmp_path_factory, make_comparison, page):
    """The report of a comparison in four cells, taken apart."""
    path = tmp_path_factory.mktemp("compared")
    (path / "compare.json").write_text(json.dumps(make_comparison()))
    found = page(write_report(path, plugins=Plugins(entry_points=False)))
    assert found.errors == []
    return found


def unit_entry(unit):
    layers = [{"name": a.name, "shape": [a.out_features, a.in_features]} for a in unit.layers]
    return {"name": unit.name, "block": unit.block, "weights": unit.weights, "layers": layers}


def made_up_row(units, method, sparsity, name, options, seed):
    generator = random.Random(f"{method} {sparsity} {name} {options} {seed if name != 'uniform' else 0}")  # noqa: S311
    problem = AllocationProblem(units, parse_menu(LEVELS), Fraction(sparsity))
    wish = [0.25 + 0.1 * generator.gauss(0, 1) for _ in units]
    choice = problem.uniform() if name == "uniform" else problem.repair(wish, [1.0] * len(units))
    _, tokens, better = ALLOCATORS[name]
    worst = (0.5 if method == "sparsegpt" else 0.9) * (1.0 if sparsity == "3/4" else 0.4)
    kl = worst * (1 - better * len(options) / 2 + generator.gauss(0, 0.02))
    steps = [int(tokens * 2 ** (i - 9)) for i in range(10)] if tokens else []
    curve = [[step, kl + (worst - kl) * math.exp(-0.7 * i)] for i, step in enumerate(steps)]
    return {
        "method": method, "sparsity": sparsity, "allocator": name, "options": options, "seed": seed,
        "perplexity": 12.87 * math.exp(1.3 * kl), "kl": kl * 1.05,
        "database": {"perplexity": 12.9 * math.exp(1.4 * kl), "kl": kl * 1.1 + generator.gauss(0, 0.01)},
        "loss": kl, "uniform_loss": worst, "holdout_loss": kl * 1.02, "forward_tokens": tokens,
        "seconds": 0.1 + tokens / 9000, "evaluations": tokens // 4096, "curve": curve,
        "holdout": [[step, loss * 1.02] for step, loss in curve[::3]], "predictions": [],
        "levels": [problem.menu[k].name for k in choice], "kept": problem.budget.kept, "weights": units.weights,
        "notes": ["seeded with uniform"] if name == "msp" and seed == 0 else [], "error": None,
    }  # fmt: skip


RUN = {
    "schema": "msp_plugin/run", "version": 1,
    "model": {"source": "org/llama-tiny", "dtype": "bfloat16"},
    "sparsity": {"target": 0.75, "planned": 0.75, "achieved": 0.75, "zeros": 98304, "weights": 131072},
    "perplexity": {"dense": 12.872, "uniform": 20.181, "mixed": 15.626},
    "kl": {"uniform": 0.46, "mixed": 0.41},
    "search": {
        "allocator": "msp", "forward_tokens": 704512, "evaluations": 172, "seconds": 80.9, "total_seconds": 122.7,
        "loss": 0.44, "uniform_loss": 0.5, "curve": [[4096, 0.5], [40960, 0.45], [327680, 0.44]],
        "holdout": [[40960, 0.47], [327680, 0.46]],
        "predictions": [[-0.01 * i, -0.009 * i + 0.002 * (i % 3)] for i in range(12)],
        "notes": ["constant scores in block 2"],
    },
    "seed": 0, "seconds": 133.8, "versions": {"torch": "2.13.0"}, "python": "3.11.7",
}  # fmt: skip


@pytest.fixture
def records(tmp_path, table):
    """Write the records of a run, without a model; keywords replace keys of run.json, None removes one."""

    def write(name="run", levels=("2:8", "3:8", "1:8", "2:8"), units=None, sensitivities=True, **changes):
        units = units or table()
        chosen = tuple(Level.parse(levels[i % len(levels)]) for i in range(len(units)))
        values = {"fisher": tuple(0.01 * 1.7**i for i in range(len(units)))} if sensitivities else {}
        given = {"method": {"name": "sparsegpt", "block_size": 128}, "seed": 0, "levels": list(LEVELS)}
        path = tmp_path / name
        path.mkdir()
        (path / "allocation.json").write_text(
            Allocation(units, chosen, Fraction(3, 4), values, given).to_json()
        )
        record = {key: value for key, value in {**RUN, **changes}.items() if value is not None}
        (path / "run.json").write_text(json.dumps(record))
        return path

    return write


@pytest.fixture
def report(tmp_path, page):
    """Write a report with the built-in plugins alone and take it apart."""

    def draw(source, plugins=None):
        out = tmp_path / "drawn.html"
        write_report(source, out, plugins=plugins or Plugins(entry_points=False))
        found = page(out)
        assert found.errors == []
        return found

    return draw


@pytest.fixture
def comparison_dir(tmp_path, make_comparison):
    """Write a comparison; a function may change its contents before."""

    def write(change=None, **sizes):
        data = make_comparison(**sizes)
        path = tmp_path / "compared"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        data = (change(data) or data) if change else data
        (path / "compare.json").write_text(json.dumps(data))
        return path

    return write
