"""Exports: whole directories in another form, or nothing at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import Dense, export_checkpoint
from msp_plugin.checkpoint.manifest import Manifest
from msp_plugin.checkpoint.packed_export import Sparse24
from msp_plugin.errors import ModelError
from msp_plugin.formats.sparse24 import pack
from msp_plugin.formats.tensor_files import INDEX

UP = "model.layers.1.mlp.up_proj"


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def contents(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def dense_bits(directory):
    return {name: (t.dtype, tuple(t.shape), raw(t)) for name, t in Checkpoint.open(directory).dense_tensors()}


# what comes out


def test_packed_layers_are_three_tensors_each_and_all_others_are_untouched(run_dir, packed_dir):
    dense, packed = (load_file(path / "model.safetensors") for path in (run_dir, packed_dir))
    layers = Checkpoint.open(packed_dir).packed
    expected = {}
    for name, tensor in dense.items():
        layer = name.removesuffix(".weight")
        expected.update(pack(tensor).tensors(layer) if layer in layers else {name: tensor})
    assert set(packed) == set(expected)
    for name, tensor in expected.items():
        assert packed[name].dtype == tensor.dtype and packed[name].shape == tensor.shape, name
        assert raw(packed[name]) == raw(tensor), name


def test_the_manifest_is_what_the_files_hold(packed_dir, run_dir):
    manifest = Manifest.read(packed_dir)
    assert manifest.differences(packed_dir) == []
    assert set(manifest.files) == {"model.safetensors", "config.json", "allocation.json", "run.json"}
    tensors = load_file(packed_dir / "model.safetensors")
    assert manifest.tensors == {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert manifest.packed_bytes == sum(
        t.numel() * t.element_size() for n, t in tensors.items() if n.endswith((".compressed", ".bitmask"))
    )
    assert manifest.dense_bytes * 9 == manifest.packed_bytes * 16
    assert sorted([*manifest.packed, *manifest.kept_dense]) == sorted(
        Checkpoint.open(run_dir).allocation.by_layer
    )
    assert manifest.negative_zeros == {} and manifest.versions["torch"] == torch.__version__


def test_the_function_returns_the_manifest_that_it_wrote(run_dir, tmp_path):
    manifest = export_checkpoint(run_dir, Sparse24(), tmp_path / "out")
    manifest.write(tmp_path)
    assert (tmp_path / "export.json").read_bytes() == (tmp_path / "out" / "export.json").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_to_sparse24_to_dense_is_byte_identical(dtype, make_run, tmp_path):
    run = make_run(tmp_path / "run", dtype=dtype)
    export_checkpoint(run, Dense(), tmp_path / "a")
    export_checkpoint(tmp_path / "a", Sparse24(), tmp_path / "b")
    export_checkpoint(tmp_path / "b", Dense(), tmp_path / "c")
    export_checkpoint(tmp_path / "c", Sparse24(), tmp_path / "d")
    assert contents(tmp_path / "a") == contents(tmp_path / "c")
    assert contents(tmp_path / "b") == contents(tmp_path / "d")
    assert contents(tmp_path / "a")["model.safetensors"] == contents(run)["model.safetensors"]
    assert json.loads(contents(tmp_path / "a")["config.json"]) == json.loads(contents(run)["config.json"])
    assert Checkpoint.open(tmp_path / "b").packed
    assert contents(tmp_path / "b")["model.safetensors"] != contents(run)["model.safetensors"]


def test_tied_embeddings_stay_one_tensor(qwen2, make_run, tmp_path):
    run = make_run(tmp_path / "run", qwen2)
    assert "lm_head.weight" not in load_file(run / "model.safetensors")
    export_checkpoint(run, Sparse24(), tmp_path / "packed")
    export_checkpoint(tmp_path / "packed", Dense(), tmp_path / "dense")
    names = set(load_file(tmp_path / "packed" / "model.safetensors"))
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
    assert "model.layers.0.self_attn.q_proj.bias" in names
    assert dense_bits(tmp_path / "packed") == dense_bits(run) == dense_bits(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("exporter", [Dense, Sparse24])
def test_small_shards_hold_the_same_tensors_and_an_index_names_them(exporter, run_dir, packed_dir, tmp_path):
    source = {Dense: packed_dir, Sparse24: run_dir}[exporter]
    manifest = export_checkpoint(source, exporter(shard_bytes=20_000), tmp_path / "out")
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 4 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(manifest.files) == {*shards, INDEX, "config.json", "allocation.json", "run.json"}
    sizes, index = {}, json.loads((tmp_path / "out" / INDEX).read_text())
    for shard in shards:
        held = load_file(tmp_path / "out" / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == set(held)
        sizes[shard] = sum(t.numel() * t.element_size() for t in held.values())
        assert sizes[shard] <= 20_000 or len(held) == 1
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert dense_bits(tmp_path / "out") == dense_bits(run_dir)


def test_transformers_loads_the_shards_of_a_dense_export_and_its_tokenizer(
    packed_dir, run_dir, tmp_path, bits
):
    export_checkpoint(packed_dir, Dense(shard_bytes=50_000), tmp_path / "out")
    assert (tmp_path / "out" / INDEX).is_file()
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert bits(model) == bits(AutoModelForCausalLM.from_pretrained(run_dir))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("cat")["input_ids"]


def test_the_shards_of_the_source_do_not_matter(run_dir, packed_dir, tmp_path):
    export_checkpoint(run_dir, Dense(shard_bytes=30_000), tmp_path / "sharded")
    export_checkpoint(tmp_path / "sharded", Sparse24(), tmp_path / "packed")
    assert not (tmp_path / "packed" / INDEX).exists()
    assert dense_bits(tmp_path / "packed") == dense_bits(run_dir)
    assert Checkpoint.open(tmp_path / "packed").packed == Checkpoint.open(packed_dir).packed


def test_negative_zeros_become_positive_are_counted_and_change_no_value(run_dir, copied, rewrite, tmp_path):
    path = rewrite(copied(run_dir), {f"{UP}.weight": lambda t: torch.where(t == 0, -0.0, t)})
    manifest = export_checkpoint(path, Sparse24(), tmp_path / "out")
    assert (
        manifest.negative_zeros == {UP: 128 * 64 * 3 // 4} == Manifest.read(tmp_path / "out").negative_zeros
    )
    assert dense_bits(tmp_path / "out") == dense_bits(run_dir)


def test_negative_zeros_stay_in_layers_that_have_a_place_for_them(run_dir, copied, rewrite, tmp_path):
    def change(weight):  # 1:8, so that there is a place in every group of four
        weight[:, 0] = torch.where(weight[:, 0] == 0, -0.0, weight[:, 0])
        return weight

    path = rewrite(copied(run_dir), {"model.layers.0.mlp.down_proj.weight": change})
    assert export_checkpoint(path, Sparse24(), tmp_path / "out").negative_zeros == {}
    assert dense_bits(tmp_path / "out") == dense_bits(path) != dense_bits(run_dir)


def test_negative_zeros_of_layers_that_stay_dense_stay(run_dir, copied, rewrite, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"  # 3:8
    path = rewrite(copied(run_dir), {name: lambda t: torch.where(t == 0, -0.0, t)})
    assert export_checkpoint(path, Sparse24(), tmp_path / "out").negative_zeros == {}
    assert dense_bits(tmp_path / "out") == dense_bits(path) != dense_bits(run_dir)


def test_the_number_of_negative_zeros_is_logged(run_dir, copied, rewrite, tmp_path, caplog):
    path = rewrite(copied(run_dir), {f"{UP}.weight": lambda t: torch.where(t == 0, -0.0, t)})
    with caplog.at_level("INFO", logger="msp_plugin"):
        export_checkpoint(path, Sparse24(), tmp_path / "out")
    assert "6144 negative zeros became positive" in caplog.text


def test_without_an_allocation_the_content_decides_and_no_allocation_is_made_up(run_dir, copied, tmp_path):
    path = copied(run_dir)
    (path / "allocation.json").unlink()
    manifest = export_checkpoint(path, Sparse24(), tmp_path / "out")
    assert set(manifest.packed) == set(Checkpoint.open(tmp_path / "out").packed) and len(manifest.packed) == 9
    assert not (tmp_path / "out" / "allocation.json").exists()
    assert dense_bits(tmp_path / "out") == dense_bits(run_dir)


def test_progress_counts_every_tensor_written(run_dir, tmp_path):
    seen = []
    manifest = export_checkpoint(
        run_dir, Sparse24(), tmp_path / "out", progress=lambda *step: seen.append(step)
    )
    assert seen == [(i, len(manifest.tensors)) for i in range(1, len(manifest.tensors) + 1)]


@pytest.mark.parametrize("exporter", [Dense(), Sparse24()], ids=["dense", "sparse24"])
def test_the_size_that_is_asked_of_the_disk_is_that_of_the_tensors(exporter, run_dir, packed_dir, tmp_path):
    source = packed_dir if exporter.name == "dense" else run_dir
    manifest = export_checkpoint(source, exporter, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert exporter.size(Checkpoint.open(source)) == sum(
        t.numel() * t.element_size() for t in tensors.values()
    )
    assert set(tensors) == set(manifest.tensors)


# other files


@pytest.fixture
def furnished(run_dir, copied, tmp_path):
    """A run with everything that a model's directory may hold beside its weights."""
    path = copied(run_dir)
    (tmp_path / "elsewhere.jinja").write_text("template")
    (path / "chat_template.jinja").symlink_to(tmp_path / "elsewhere.jinja")
    (path / "modeling_own.py").write_text("code")
    (path / "sub" / "deep").mkdir(parents=True)
    (path / "sub" / "deep" / "file.txt").write_text("deep")
    (path / "sub" / ".hidden").write_text("x")
    (path / "sub" / "consolidated.00.pth").write_bytes(b"weights")
    (path / "sub" / "other.safetensors").write_bytes(b"weights")
    (path / ".git").mkdir()
    (path / ".git" / "config").write_text("x")
    (path / ".cache").write_text("x")
    for name in ("pytorch_model.bin", "x.pt", "x.pth", "x.ckpt", "x.h5", "x.msgpack", "x.gguf", "x.onnx"):
        (path / name).write_bytes(b"weights")
    (path / "pytorch_model.bin.index.json").write_text("{}")
    (path / "README.md").write_text("the source's own card")
    return path


@pytest.mark.parametrize("exporter", [Dense(), Sparse24()], ids=["dense", "sparse24"])
def test_all_other_files_are_kept_and_weights_of_other_formats_and_hidden_files_are_not(
    exporter, furnished, tmp_path
):
    export_checkpoint(furnished, exporter, tmp_path / "out")
    found = contents(tmp_path / "out")
    assert set(found) == {
        "README.md", "README.source.md", "allocation.json", "chat_template.jinja", "config.json", "export.json",
        "generation_config.json", "model.safetensors", "modeling_own.py", "run.json", "sub/deep/file.txt",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for name in (
        "allocation.json",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "sub/deep/file.txt",
    ):
        assert found[name] == (furnished / name).read_bytes()
    assert (
        found["chat_template.jinja"] == b"template"
        and not (tmp_path / "out" / "chat_template.jinja").is_symlink()
    )
    assert found["README.source.md"] == b"the source's own card" and b"mixed N:M" in found["README.md"]


def test_our_own_card_is_written_anew_and_the_sources_card_goes_along(furnished, tmp_path):
    export_checkpoint(furnished, Sparse24(), tmp_path / "packed")
    export_checkpoint(tmp_path / "packed", Dense(), tmp_path / "dense")
    found = contents(tmp_path / "dense")
    assert (
        found["README.source.md"] == b"the source's own card"
        and b"plain dense safetensors" in found["README.md"]
    )


def test_a_link_to_nowhere_is_named_and_nothing_is_left(run_dir, copied, nothing_left):
    path = copied(run_dir)
    (path / "vocab.txt").symlink_to(path / "gone.txt")
    with pytest.raises(ModelError, match=r"cannot copy .*vocab\.txt"):
        export_checkpoint(path, Dense(), nothing_left)


def test_the_files_can_be_read_by_others(run_dir, tmp_path):
    before = os.umask(0o022)
    try:
        export_checkpoint(run_dir, Sparse24(shard_bytes=50_000), tmp_path / "out")
    finally:
        os.umask(before)
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in (tmp_path / "out").iterdir())


def test_no_card_of_the_source_is_lost(run_dir, copied, tmp_path):
    path = copied(run_dir)
    for name in ("README.md", "README.source.md", "README.source-2.md"):
        (path / name).write_text(name)
    export_checkpoint(path, Sparse24(), tmp_path / "out")
    found = {file.name: file.read_text() for file in (tmp_path / "out").glob("README.source*")}
    assert found == {
        "README.source.md": "README.source.md", "README.source-2.md": "README.source-2.md",
        "README.source-3.md": "README.md",
    }  # fmt: skip


# memory

_MEASURE = """
import sys, threading
from pathlib import Path
from msp_plugin.checkpoint.export import Dense, export_checkpoint
from msp_plugin.checkpoint.packed_export import Sparse24

root = Path(sys.argv[1])

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

def watch():
    while not stop.wait(0.002):
        seen.append(anonymous())

for source, exporter in (("source", Sparse24(20 * 10**6)), ("sparse24", Dense(20 * 10**6))):
    export_checkpoint(root / f"{source}-small", exporter, root / f"{exporter.name}-small")  # imports, threads
    stop, seen = threading.Event(), []
    before = anonymous()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    export_checkpoint(root / source, exporter, root / exporter.name)
    stop.set()
    thread.join()
    print(max(seen) - before, len(seen))
"""


def random_checkpoint(path, layers, rows=2048, columns=640):
    """A 2:4 checkpoint of ``layers`` weights in float32, four in each file."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    weight = torch.randn(rows, columns // 4, 4, generator=torch.Generator().manual_seed(0))
    for first in range(0, layers, 4):
        tensors = {}
        for i in range(first, min(first + 4, layers)):
            pruned = weight.clone()
            pruned[..., [i % 4, (i + 1) % 4]] = 0
            tensors[f"model.layers.{i}.mlp.down_proj.weight"] = pruned.reshape(rows, columns)
        save_file(tensors, path / f"part-{first:03d}.safetensors")
    return path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_an_export_holds_a_shard_and_a_layer_and_never_the_model(tmp_path):
    random_checkpoint(tmp_path / "source", 36)
    random_checkpoint(tmp_path / "source-small", 1)
    layer, shard = 2048 * 640 * 4, 20 * 10**6
    bound = shard + layer + 20 * 2**20  # the last part for the chunk that is being packed
    assert 36 * layer * 17 / 32 > 1.3 * bound  # what the smaller form takes
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, tmp_path], capture_output=True, text=True, check=True, timeout=100,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},  # what is freed is given back at once
    )  # fmt: skip
    readings = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(readings) == 2
    assert all(count > 50 and shard / 2 < peak < bound for peak, count in readings), readings
