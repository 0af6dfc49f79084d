"""The model card of an export."""

import json
import re

import pytest

from msp_plugin.checkpoint.card import model_card
from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.export import Dense, export_checkpoint
from msp_plugin.checkpoint.manifest import Manifest
from msp_plugin.checkpoint.packed_export import Sparse24


@pytest.fixture
def card(packed_dir):
    return (packed_dir / "README.md").read_text(encoding="utf-8")


def test_the_front_matter_is_yaml_between_its_marks(card):
    import yaml

    _, front, rest = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["pruned", "sparsity", "2:4"]}
    assert rest.lstrip().startswith("# LlamaForCausalLM, pruned with mixed N:M sparsity\n")


def test_the_bytes_and_layers_are_the_manifests(card, packed_dir):
    data = json.loads((packed_dir / "export.json").read_text())
    assert data["packed_bytes"] * 16 == data["dense_bytes"] * 9
    assert "9 layers are stored in the compressed-tensors format `sparse-24-bitmask`" in card
    assert f"0.5625 of their dense bytes ({data['packed_bytes']:,} of {data['dense_bytes']:,})" in card


def test_layers_that_stay_dense_are_counted_by_reason(card):
    assert "- 2 because level 3:8 does not run on 2:4 kernels\n" in card
    assert "- 3 because level dense does not run on 2:4 kernels\n" in card


def test_fused_layers_are_counted_together_whatever_their_siblings_are_called(make_run, tmp_path):
    run = make_run(tmp_path / "run", ignore=["layers.0.self_attn.v_proj", "layers.1.mlp.up_proj"])
    export_checkpoint(run, Sparse24(), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- 3 because inference fuses them with a dense one\n" in card
    assert "v_proj" not in card


def test_the_levels_are_counted_over_all_layers(card, run_dir):
    rows = dict(re.findall(r"^\| (\S+) \| (\d+) \|$", card, re.MULTILINE))
    assert rows == {"1:8": "1", "2:4": "4", "2:8": "4", "3:8": "2", "dense": "3"}
    budget = Checkpoint.open(run_dir).allocation.budget
    share = 100 * budget.zeros / budget.weights
    assert f"{budget.zeros:,} of {budget.weights:,} prunable weights are zero ({share:.2f} %)" in card


def test_a_packed_card_says_what_does_not_work_and_the_way_out(card):
    assert "vllm serve THIS_DIRECTORY" in card and 'msp_plugin.load("THIS_DIRECTORY")' in card
    assert "transformers fails on it" in card and "--to dense" in card


def test_a_dense_card_says_that_plain_transformers_loads_it(run_dir, tmp_path):
    export_checkpoint(run_dir, Dense(), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained" in card and "--quantization\nsparse24" in card
    assert 'tags: [pruned, sparsity, "N:M"]' in card and "sparse-24-bitmask" not in card
    assert "| 2:4 | 4 |" in card


def test_the_card_of_a_quantized_model_does_not_call_it_plain(run_dir, copied, edit_json, tmp_path):
    path = copied(run_dir)
    edit_json(path / "config.json", lambda data: data.update(quantization_config={"quant_method": "fp8"}))
    export_checkpoint(path, Dense(), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "quantized as config.json says" in card and "plain dense" not in card and "sparse24" not in card


def test_without_an_allocation_there_are_no_levels_to_count(run_dir, copied, tmp_path):
    path = copied(run_dir)
    (path / "allocation.json").unlink()
    export_checkpoint(path, Sparse24(), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Sparsity" not in card and "- 5 because its weights are not 2:4" in card


def test_the_same_checkpoint_gives_the_same_text_without_paths(run_dir, packed_dir, card):
    format = Checkpoint.open(packed_dir).format
    assert model_card(Checkpoint.open(run_dir), Manifest.read(packed_dir), format) == card
    assert str(run_dir.parent) not in card


def test_a_config_without_architectures_has_a_card_too(run_dir, copied, tmp_path, edit_json):
    path = copied(run_dir)
    edit_json(path / "config.json", lambda data: data.pop("architectures") and None)
    export_checkpoint(path, Sparse24(), tmp_path / "out")
    assert "# A model, pruned with mixed N:M sparsity" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_of_images_and_text_is_loaded_as_one(run_dir, copied, edit_json, tmp_path):
    source = copied(run_dir)
    edit_json(source / "config.json", lambda config: {**config, "vision_config": {}})
    export_checkpoint(source, Dense(), tmp_path / "dense")
    card = (tmp_path / "dense" / "README.md").read_text(encoding="utf-8")
    assert (
        "from transformers import AutoModelForImageTextToText\nmodel = AutoModelForImageTextToText." in card
    )


def test_a_model_without_masks_is_not_called_nm(msp, llama_dir, tmp_path):
    text = ("--data", "demo:train", "--test-samples", "0", "--samples", "4", "--length", "16")
    method = ("--levels", "width", "--quantum", "16", "-m", "l2", "--allocator", "uniform")
    msp("prune", llama_dir, "-s", "0.25", *method, *text, "--out", tmp_path / "run")
    msp("export", tmp_path / "run", "--to", "dense", "--out", tmp_path / "dense")
    card = (tmp_path / "dense" / "README.md").read_text()
    assert "N:M" not in card and "pruned with heads, channels or halves gone" in card
    assert "tags: [pruned, sparsity, structured]" in card and "wide" in card
