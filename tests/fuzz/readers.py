"""Everything that reads a file from outside: what a valid file holds, and how it is read and then used."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msp_plugin.errors import MSPError
from msp_plugin.plan.allocation import ALLOCATION_FILE, Allocation

RECIPE = """\
quantization_stage:
  quantization_modifiers:
    GPTQModifier: {ignore: [lm_head], scheme: W4A16}
sparsity_stage:
  sparsity_modifiers:
    MixedSparsityModifier:
      sparsity: 0.75
      method: {name: sparsegpt, block_size: 64, dampening_frac: 0.01}
      levels: [dense, "7:8", "2:4", "0.9"]
      targets: [Linear]
      ignore: ["re:.*down_proj"]
      granularity: unit
      bounds: {down_proj: [0.25, "1/2"]}
      protect: [o_proj]
      allocator: {name: search, tokens: 12288}
      estimators: {fisher: {samples: 64}}
      seed: 3
"""
TASK = """\
task: next_line
tag: [lines, code]
output_type: multiple_choice
dataset_path: json
dataset_kwargs: {data_files: lines.jsonl}
doc_to_text: "{{text}}"
doc_to_target: !function scoring.target
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
JSONL = '{"text": "The cat sat on the mat.", "id": 1}\n{"text": "A sparse matrix: \\u00fc", "id": 2}\n"a line alone"\n'


@dataclass(frozen=True)
class Reader:
    """A reader.

    Args:
        file: the name under which damaged bytes are written.
        read: reads it from a directory and uses what was read.
        named: True if an error names the file.
    """

    file: str
    read: Callable[[Path], Any]
    named: bool = True


def check(reader: Reader, directory: Path, content: bytes) -> MSPError | None:
    """Read a file with this content; return our error, None if it was read. All other errors come through."""
    (directory / reader.file).unlink(missing_ok=True)  # its bytes may still be mapped
    (directory / reader.file).write_bytes(content)
    try:
        reader.read(directory)
    except MSPError as error:
        text = str(error)
        assert len(text) < 3000, f"{len(text)} characters: {text[:200]}"
        assert not reader.named or reader.file in text or directory.name in text, text
        text.encode(errors="backslashreplace")
        return error
    return None


def read_recipe(directory: Path) -> None:
    from msp_plugin.hosts.llm_compressor.recipe import our_line, read_recipe

    our_line(read_recipe(directory / "recipe.yaml"))


def build_recipe(directory: Path) -> None:
    """All that a run does with a recipe before it loads a model."""
    from msp_plugin.hosts.llm_compressor.recipe import Recipe

    Recipe.parse(directory / "recipe.yaml", _plugins())


_PLUGINS: list[Any] = []


def _plugins() -> Any:
    from msp_plugin.plugins.manager import Plugins

    if not _PLUGINS:
        _PLUGINS.append(Plugins(entry_points=False))
    return _PLUGINS[0]


def read_allocation(directory: Path) -> None:
    found = Allocation.read(directory / ALLOCATION_FILE)
    text = found.to_json()
    text.encode()
    assert Allocation.from_dict(json.loads(text)).to_json() == text
    assert 0 <= found.budget.kept <= found.table.weights
    assert all(isinstance(level.servable, bool) for level in found.by_layer.values())


def read_run(directory: Path) -> Any:
    from msp_plugin.report.source import read_source

    return read_source(directory)


def draw_run(directory: Path) -> None:
    from msp_plugin.report import write_report

    write_report(directory, directory / "report.html", plugins=_plugins())


def read_checkpoint(directory: Path) -> None:
    from msp_plugin.checkpoint.checkpoint import Checkpoint

    opened = Checkpoint.open(directory)
    opened.check_files()
    opened.allocation  # noqa: B018 - read when first asked for
    for name, tensor in opened.dense_tensors():
        assert tensor.is_contiguous(), name


def load_checkpoint(directory: Path) -> None:
    from msp_plugin.checkpoint.load import load
    from msp_plugin.models.source import load_tokenizer, max_length

    max_length(directory)
    load(directory, checksums=False)
    load_tokenizer(directory)


def read_lines(directory: Path) -> Any:
    return _read_text(directory / "data.jsonl")


def read_text(directory: Path) -> Any:
    return _read_text(directory / "data.txt")


def _read_text(path: Path) -> Any:
    from msp_plugin.data.sources import load_texts
    from msp_plugin.data.tokenize import tokenize

    return tokenize(_tokenizer(), load_texts(str(path)), samples=2, length=4, source=path.name)


_TOKENIZER: list[Any] = []


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if not _TOKENIZER:
        letters = {letter: i for i, letter in enumerate(["</s>", *pre_tokenizers.ByteLevel.alphabet()])}
        raw = Tokenizer(models.BPE(vocab=letters, merges=[]))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        _TOKENIZER.append(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>"))  # noqa: S106
    return _TOKENIZER[0]


def read_tasks(directory: Path) -> None:
    from msp_plugin.evaluation.tasks import local_tasks

    for name, kind in local_tasks(directory).items():
        assert isinstance(name, str) and kind in ("task", "group", "tag")


READERS = {
    "recipe": Reader("recipe.yaml", read_recipe),
    "built recipe": Reader("recipe.yaml", build_recipe, named=False),
    "allocation": Reader(ALLOCATION_FILE, read_allocation),
    "run": Reader("run.json", read_run),
    "comparison": Reader("compare.json", read_run),
    "run's page": Reader("run.json", draw_run, named=False),
    "comparison's page": Reader("compare.json", draw_run, named=False),
    "tensors": Reader("model.safetensors", read_checkpoint, named=False),
    "bitmask tensors": Reader("model.safetensors", read_checkpoint, named=False),
    "index": Reader("model.safetensors.index.json", read_checkpoint),
    "config": Reader("config.json", read_checkpoint, named=False),
    "loaded tokenizer": Reader("tokenizer.json", load_checkpoint, named=False),
    "manifest": Reader("export.json", read_checkpoint),
    "lines": Reader("data.jsonl", read_lines),
    "text": Reader("data.txt", read_text),
    "task": Reader("task.yaml", read_tasks),
}


def allocation_document() -> dict[str, Any]:
    """A valid allocation.json: two blocks, four units, three levels."""
    units = [
        unit(0, "self_attn.qkv_proj", "4:8", [("self_attn.q_proj", 16, 32), ("self_attn.k_proj", 8, 32)]),
        unit(0, "mlp.down_proj", "2:8", [("mlp.down_proj", 32, 64)]),
        unit(1, "self_attn.qkv_proj", "dense", [("self_attn.q_proj", 16, 32), ("self_attn.k_proj", 8, 32)]),
        unit(1, "mlp.down_proj", "2/3", [("mlp.down_proj", 32, 66)]),
    ]
    weights, zeros = (sum(u[key] for u in units) for key in ("weights", "zeros"))
    return {
        "schema": "msp_plugin/allocation", "version": 1, "units": units,
        "budget": {
            "target": "1/2", "weights": weights, "kept": weights - zeros, "zeros": zeros, "sparsity": zeros / weights,
        },
        "provenance": {
            "model": {"architecture": "LlamaForCausalLM", "fingerprint": "ab"}, "seed": 0, "loss": 0.5,
            "method": {"name": "sparsegpt", "host": "llmcompressor", "version": "0"}, "ignore": [], "targets": ["Linear"],
            "allocator": {"name": "search", "tokens": 64}, "estimators": {"fisher": {"name": "fisher", "samples": 4}},
            "levels": ["dense", "4:8", "2:8"], "uniform_loss": 0.7, "versions": {"torch": "2"},
            "calibration": {"fingerprint": "cd", "samples": 4},
        },
    }  # fmt: skip


def unit(block: int, name: str, level: str, layers: list[tuple[str, int, int]]) -> dict[str, Any]:
    """An entry of ``units``."""
    kept = {"dense": 1, "4:8": 1 / 2, "2:8": 1 / 4, "2/3": 1 / 3}[level]
    weights = sum(rows * columns for _, rows, columns in layers)
    path = f"model.layers.{block}"
    return {
        "name": f"{path}.{name}", "block": block, "level": level, "weights": weights,
        "zeros": weights - round(weights * kept), "sensitivity": {"fisher": 0.25 * (block + 1)},
        "layers": [{"name": f"{path}.{layer}", "shape": [rows, columns]} for layer, rows, columns in layers],
    }  # fmt: skip


def run_document() -> dict[str, Any]:
    """A valid run.json beside it."""
    return {
        "schema": "msp_plugin/run", "version": 2, "seed": 0, "seconds": 1.5, "versions": {"torch": "2"}, "python": "3",
        "sparsity": {
            "target": 0.5, "planned": 0.5, "achieved": 0.5, "exact": False, "weights": 5696, "zeros": 2848,
            "planned_zeros": 2848, "extra_zeros": 0,
        },
        "stages": [
            {"name": "dense", "perplexity": 12.0, "seconds": None, "sparsity": None},
            {"name": "prune", "perplexity": 15.0, "seconds": 1.5, "sparsity": 0.5},
        ],
        "perplexity": {"dense": 12.0, "uniform": 20.0, "mixed": 15.0}, "kl": {"uniform": 0.5, "mixed": 0.3},
        "search": {
            "allocator": "search", "forward_tokens": 4096, "evaluations": 7, "seconds": 1.0, "total_seconds": 2.0,
            "loss": 0.4, "uniform_loss": 0.6, "curve": [[512, 0.6], [4096, 0.4]], "holdout": [[4096, 0.5]],
            "predictions": [[0.1, 0.2], [0.2, 0.3]], "notes": ["a note"],
        },
        "speed": [{"name": "decode", "value": 1.5, "unit": "tokens/s", "source": "a script"}], "command": "msp run",
        "model": {"source": "demo:llama", "dtype": "float32"},
        "calibration": {"source": "a", "samples": 4, "tokens": 64, "fingerprint": "ab", "length": 16, "seed": 0},
        "test": None,
    }  # fmt: skip


def comparison_document() -> dict[str, Any]:
    """A valid compare.json."""
    row = {
        "method": "sparsegpt", "sparsity": "1/2", "allocator": "uniform", "options": {}, "seed": 0, "perplexity": 20.0,
        "kl": 0.5, "database": {"perplexity": 21.0, "kl": 0.6}, "loss": 0.5, "uniform_loss": 0.5, "holdout_loss": None,
        "forward_tokens": 0, "seconds": 1.0, "evaluations": 0, "curve": [], "holdout": [], "predictions": [],
        "levels": ["4:8", "4:8", "4:8", "1/2"], "notes": [], "error": None,
    }  # fmt: skip
    other = {
        **row, "allocator": "search", "options": {"tokens": 64}, "kl": 0.3, "levels": ["dense", "2:8", "4:8", "2/3"],
        "curve": [[64, 0.5], [128, 0.3]], "holdout": [[128, 0.4]], "predictions": [[0.1, 0.1], [0.2, 0.4]],
    }  # fmt: skip
    units = [{key: u[key] for key in ("name", "block", "layers")} for u in allocation_document()["units"]]
    return {
        "schema": "msp_plugin/compare", "version": 1, "model": {"source": "demo:llama", "architecture": "Llama"},
        "levels": ["dense", "4:8", "2:8"], "granularity": "unit", "texts": {"test": {"source": "a", "tokens": 64}},
        "units": units, "dense": {"perplexity": 12.0, "kl": None}, "sensitivities": {"fisher": [0.1, 0.2, 0.3, 0.4]},
        "rows": [row, {**row, "seed": 1, "kl": 0.55}, other], "speed": [], "versions": {"torch": "2"}, "machine": "x",
    }  # fmt: skip


def safetensors(header: object, data: bytes, length: int | None = None) -> bytes:
    """The bytes of a safetensors file, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", (len(text) if length is None else length) % 2**64) + text + data


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def fill(directory: Path, source: Path | None = None) -> Path:
    """Write the files that a damaged one lies beside: records, or a copy of a checkpoint."""
    if source is not None:
        return Path(shutil.copytree(source, directory, dirs_exist_ok=True))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ALLOCATION_FILE).write_text(json.dumps(allocation_document()), encoding="utf-8")
    return directory
