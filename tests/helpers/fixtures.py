"""Shared fixtures: tiny seeded models, a tiny tokenizer, samples, problems and sample plugins."""

import contextlib
import copy
import functools
import importlib.util
import inspect
import json
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.database.build import build_database
from msp_plugin.database.store import LevelDatabase
from msp_plugin.models.layers import prunable_layers
from msp_plugin.models.offload import offloaded_module
from msp_plugin.plan.allocation import Allocation
from msp_plugin.plan.budget import AllocationProblem
from msp_plugin.plan.fractions import parse_sparsity
from msp_plugin.plan.levels import Level
from msp_plugin.plan.menus import parse_menu
from msp_plugin.plan.units import Layer, Unit, UnitTable
from msp_plugin.plugins.manager import Plugins
from msp_plugin.pruning.magnitude import Magnitude
from msp_plugin.pruning.masks import nm_mask
from msp_plugin.recovery.base import RecoveryInputs
from msp_plugin.recovery.masks import Masks
from msp_plugin.search.measurements import Measurements
from tests.helpers import models, ranks

settings.register_profile("msp", deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile("msp")

SAMPLE_PLUGINS = Path(__file__).parents[1] / "plugins"
#: Levels of the eight units of a tiny model in the runs that tests export: qkv, o, gate_up, down of both blocks.
RUN_LEVELS = ("2:4", "3:8", "2:8", "1:8", "dense", "2:4", "2:8", "3:8")
TEXT = (
    "The cat sat on the mat, and the dog sat on the log. A sparse matrix keeps two of every four weights; "
    "the search says which layer may keep fewer.\n"
)


@pytest.fixture
def llama():
    return models.llama()


@pytest.fixture
def qwen2():
    return models.qwen2()


@pytest.fixture(params=["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def model(request):
    return models.MODELS[request.param]()


#: A tiny model and where its weights are. Quick tests take each model and weights on disk, with some in memory or none.
OFFLOADED = [
    ("qwen2", "disk"),
    ("llama", "half on disk"),
    *(pytest.param(pair, marks=pytest.mark.slow) for pair in (("llama", "cpu"), ("qwen2", "half on disk"))),
]


@pytest.fixture(params=OFFLOADED, ids=" ".join)
def pair(request, tmp_path):
    """A model in memory, and a copy of it whose weights are elsewhere."""
    accelerate = pytest.importorskip("accelerate")
    name, place = request.param
    model = models.MODELS[name]()
    away, here = copy.deepcopy(model), torch.device("cpu")
    if place == "cpu":
        accelerate.cpu_offload(away, execution_device=here)
    elif place == "disk":
        accelerate.disk_offload(away, str(tmp_path / "away"), execution_device=here)
    else:
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
                  "model.layers.0": "cpu", "model.layers.1": "disk"}  # fmt: skip
        accelerate.dispatch_model(
            away, places, main_device="cpu", offload_dir=str(tmp_path / "away"), force_hooks=True
        )
    assert offloaded_module(away) is not None
    return model, away


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    raw = Tokenizer(BPE(unk_token="<unk>"))  # noqa: S106
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=96, special_tokens=["<unk>", "</s>"], show_progress=False)
    raw.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")  # noqa: S106


@pytest.fixture(scope="session")
def bos_tokenizer(tokenizer):
    """The tiny tokenizer with a token that it puts before every text, and a chat template that writes it."""
    from tokenizers.processors import TemplateProcessing

    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"bos_token": "<s>"})
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    return made


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "llama"
    models.llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def qwen2_dir(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "qwen2"
    models.qwen2().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def make_samples():
    def make(count=6, length=24, seed=0):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, models.SIZES["vocab_size"], (count, length), generator=generator)
        return CalibrationSet(tuple(row.clone() for row in ids), f"random {seed}")

    return make


@pytest.fixture
def data(make_samples):
    return make_samples()


@pytest.fixture(scope="session")
def make_problem():
    """A problem from (out, in) shapes, one layer a unit, with levels and a target as recipes write them."""

    def make(shapes, levels, target):
        units = tuple(
            Unit(f"layers.{i}.proj", i, (Layer(f"layers.{i}.proj", out, width),))
            for i, (out, width) in enumerate(shapes)
        )
        return AllocationProblem(UnitTable(units), parse_menu(levels), parse_sparsity(target))

    return make


@pytest.fixture
def magnitude_database(tmp_path, llama, data):
    """A database of ``llama`` at dense, 2:4 and 1:4 by magnitude, and the table it is for."""
    table = prunable_layers(llama)
    database = LevelDatabase(tmp_path / "cache", {"test": "magnitude"}, parse_menu(["dense", "2:4", "1:4"]))
    build_database(database, llama, table, Magnitude(), data)
    return database, table


@pytest.fixture(scope="session")
def bits():
    """The bytes and the ``requires_grad`` of every parameter and buffer, so that NaN equals NaN."""

    def bits(model):
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return {
            name: (t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), t.requires_grad)
            for name, t in tensors
        }

    return bits


@pytest.fixture(scope="session")
def count_hooks():
    def count(model):
        return sum(
            len(value)
            for module in model.modules()
            for name, value in vars(module).items()
            if name.endswith("_hooks") and isinstance(value, dict)
        )

    return count


@pytest.fixture(scope="session")
def sample_plugin():
    """Load a plugin module of tests/plugins by its file's stem."""

    def load(stem):
        name = f"msp_sample_{stem}"
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, SAMPLE_PLUGINS / f"{stem}.py")
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return sys.modules[name]

    return load


@pytest.fixture
def plugins_with(sample_plugin):
    """The built-in plugins with some of tests/plugins, and nothing that is installed."""

    def make(*stems):
        return Plugins(extra={stem: sample_plugin(stem) for stem in stems}, entry_points=False)

    return make


@pytest.fixture(scope="session")
def make_run(tokenizer):
    """Write the directory of a run: a model pruned by magnitude, its allocation, run.json, the tokenizer."""

    def make(path, model=None, levels=RUN_LEVELS, dtype=torch.bfloat16, ignore=()):
        model = (model if model is not None else models.llama()).to(dtype)
        table = prunable_layers(model, ignore=ignore)
        method = {"name": "sparsegpt", "host": "llmcompressor", "version": "0", "block_size": 64}
        allocation = Allocation(
            table, tuple(map(Level.parse, levels)), Fraction(5, 8), {}, {"method": method, "seed": 0}
        )
        with torch.no_grad():
            for name, level in allocation.by_layer.items():
                weight = model.get_submodule(name).weight
                weight.masked_fill_(~nm_mask(weight.abs().float(), level), 0)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        (path / "allocation.json").write_text(allocation.to_json(), encoding="utf-8")
        record = {"schema": "msp_plugin/run", "version": 1, "sparsity": {"zeros": allocation.budget.zeros}}
        (path / "run.json").write_text(json.dumps(record), encoding="utf-8")
        return path

    return make


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, make_run):
    """A run in bfloat16. Of its fourteen layers nine are at levels that 2:4 kernels run."""
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="session")
def packed_dir(tmp_path_factory, run_dir):
    """``run_dir``, packed."""
    from msp_plugin.checkpoint.export import export_checkpoint
    from msp_plugin.checkpoint.packed_export import Sparse24

    path = tmp_path_factory.mktemp("runs") / "packed"
    export_checkpoint(run_dir, Sparse24(), path)
    return path


@pytest.fixture(scope="session")
def packed_any_dir(tmp_path_factory, run_dir):
    """``run_dir``, in the bitmask format, which packs any level: eleven layers of fourteen, three are dense."""
    from msp_plugin.checkpoint.export import export_checkpoint
    from msp_plugin.checkpoint.packed_export import Bitmask

    path = tmp_path_factory.mktemp("runs") / "packed_any"
    export_checkpoint(run_dir, Bitmask(), path)
    return path


@pytest.fixture
def copied(tmp_path):
    """Copy a directory to one that a test may damage."""
    return lambda source, name="copy": shutil.copytree(source, tmp_path / name)


@pytest.fixture(scope="session")
def rewrite():
    """Change tensors of a single-file checkpoint: by name the new one, a function of the old one, or None."""

    def rewrite(path, changes):
        tensors = load_file(path / "model.safetensors")
        for name, change in changes.items():
            tensors[name] = change(tensors[name].clone()) if callable(change) else change
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return rewrite


@pytest.fixture(scope="session")
def edit_json():
    """Change a JSON file: the function may change what is read, or return what stands instead of it."""

    def edit(path, change):
        data = json.loads(path.read_text(encoding="utf-8"))
        found = change(data)
        path.write_text(json.dumps(data if found is None else found), encoding="utf-8")

    return edit


@pytest.fixture(scope="session")
def prune_half():
    """Prune a model in place to 2:4 by magnitude, its last layer excepted, and return its masks."""

    @torch.no_grad()
    def prune(model):
        layers = [layer.name for layer in prunable_layers(model).layers]
        for name in layers[:-1]:
            weight = model.get_submodule(name).weight
            weight.masked_fill_(~nm_mask(weight.abs().float(), Level.parse("2:4")), 0)
        return Masks.of(model, layers)

    return prune


@pytest.fixture
def make_inputs(make_samples, tmp_path):
    """Inputs of a recovery on random samples."""

    def make(model, masks, original, folder="state", **more):
        (tmp_path / folder).mkdir(exist_ok=True)
        data, holdout = make_samples(16, 24), make_samples(4, 24, seed=1)
        return RecoveryInputs(
            model, masks, data, holdout, original, tmp_path / folder, batch_tokens=96, **more
        )

    return make


@pytest.fixture
def msp(monkeypatch, capsys, tmp_path):
    """The command line in this process; the exit code is checked."""
    from msp_plugin.cli import main

    monkeypatch.setenv("MSP_CACHE", str(tmp_path / "cache"))

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["msp", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            main()
        captured = capsys.readouterr()
        assert (done.value.code or 0) == code, captured.err
        return captured

    return run


@pytest.fixture
def on_ranks(monkeypatch):
    """Return ranks.on_ranks.

    Python 3.11 locks a cached_property over all objects of its class, so that ranks would wait for ever; and
    its getsource, which parses, fails in several threads at once: what one process has read is kept.
    """
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
    for found in vars(Measurements).values():
        if isinstance(found, functools.cached_property):
            monkeypatch.setattr(found, "lock", contextlib.nullcontext(), raising=False)
    return ranks.on_ranks
