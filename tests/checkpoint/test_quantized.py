"""Models that are quantized already are refused before anything is loaded, wherever they would be pruned."""

import shutil

import pytest
import torch

from msp_plugin import MixedSparsityModifier
from msp_plugin.checkpoint.quantized import check_source_unquantized, check_unquantized
from msp_plugin.errors import ModelError
from msp_plugin.models.load import load_model

KINDS = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "(fp8)"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {}}},
        "(compressed-tensors, float-quantized)",
    ),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "(gptq, 4 bits)"),
    "awq": ({"quant_method": "awq", "bits": 4}, "(awq, 4 bits)"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "(bitsandbytes, 4 bits)"),
    "old bitsandbytes": ({"load_in_8bit": True}, "(in an unknown form, 8 bits)"),
    "gguf": ({"quant_method": "gguf"}, "(gguf)"),
    "damaged": ("int8", "(in an unknown form)"),
}


@pytest.fixture
def quantized(llama_dir, tmp_path, edit_json):
    """A directory whose config says that it is quantized so."""

    def quantized(how):
        path = shutil.copytree(llama_dir, tmp_path / "quantized")
        edit_json(path / "config.json", lambda config: config.update(quantization_config=how))
        return path

    return quantized


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("something was loaded")

    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", load)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_source_is_refused_by_its_kind(kind, quantized):
    how, words = KINDS[kind]
    with pytest.raises(ModelError) as found:
        check_source_unquantized(quantized(how))
    assert words in found.value.message and "QuantizationModifier after the pruning" in found.value.hint


@pytest.mark.parametrize("how", [None, {}])
def test_an_empty_quantization_is_none(how, quantized):
    check_source_unquantized(quantized(how))


def test_a_packed_export_is_not_quantized(packed_dir):
    check_source_unquantized(packed_dir)


@pytest.mark.parametrize(
    "command", ["prune", "run", "allocate", "compare", "compare --no-prune", "sensitivity"]
)
def test_every_command_that_prunes_refuses_one_before_anything_is_loaded(
    command, quantized, msp, tmp_path, nothing_is_loaded
):
    text, recipe, out = tmp_path / "text.txt", tmp_path / "recipe.yaml", tmp_path / "out"
    text.write_text("while True:\n    x = x + 1\n" * 300)
    recipe.write_text("a_stage:\n  b_modifiers:\n    MixedSparsityModifier: {sparsity: 0.5}\n")
    path = quantized(KINDS["fp8"][0])
    arguments = {
        "prune": ["prune", path, "-s", "0.5", "--out", out],
        "run": ["run", recipe, "--model", path, "--out", out],
        "allocate": ["allocate", path, "-s", "0.5", "--out", out],
        "compare": ["compare", path, "--out", out],
        "compare --no-prune": ["compare", path, "--no-prune", "--out", out],
        "sensitivity": ["sensitivity", path],
    }[command]
    said = msp(*arguments, "--data", text, code=2).err
    assert f"error: {path} is quantized (fp8)" in said and "Traceback" not in said and not out.exists()


def test_the_modifier_refuses_a_quantized_model_in_oneshot(llama_dir, tokenizer):
    from llmcompressor import oneshot

    llama = load_model(llama_dir)
    llama.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ModelError, match=r"the model is quantized \(bitsandbytes, 4 bits\)"):
        oneshot(
            model=llama, processor=tokenizer,
            recipe=[MixedSparsityModifier(sparsity=0.5, method="magnitude", allocator="uniform")],
        )  # fmt: skip


def test_a_model_that_was_brought_back_to_plain_weights_is_not_quantized(llama):
    from transformers import FineGrainedFP8Config

    llama.config.quantization_config = FineGrainedFP8Config()
    with pytest.raises(ModelError, match=r"quantized \(fp8\)"):
        check_unquantized(llama)
    llama.config.quantization_config = FineGrainedFP8Config(dequantize=True)
    check_unquantized(llama)
    check_unquantized(torch.nn.Linear(2, 2))
