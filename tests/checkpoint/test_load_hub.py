"""Models of the hub, from its cache on this machine."""

import shutil

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM

from msp_plugin.checkpoint.export import export_checkpoint
from msp_plugin.checkpoint.load import load
from msp_plugin.checkpoint.smaller import Small
from msp_plugin.errors import FormatError, ModelError

HUB_NAME = "someone/pruned"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put a directory into an empty cache of the hub, as a download of ``HUB_NAME`` would."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(source):
        root = tmp_path / "hub" / "models--someone--pruned"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("0" * 40)
        return shutil.copytree(source, root / "snapshots" / ("0" * 40))

    return put


def test_a_hub_id_is_loaded_from_the_cache_in_both_forms(run_dir, packed_dir, hub, bits, tmp_path):
    expected = bits(load(run_dir))
    hub(packed_dir)
    with pytest.raises(AttributeError):  # as transformers alone does, so the packed path was taken
        AutoModelForCausalLM.from_pretrained(HUB_NAME)
    assert bits(load(HUB_NAME)) == expected
    shutil.rmtree(tmp_path / "hub")
    hub(run_dir)
    assert bits(load(HUB_NAME)) == expected


def test_a_smaller_model_is_loaded_from_the_cache(llama, hub, bits, tmp_path):
    with torch.no_grad():
        llama.model.layers[0].self_attn.o_proj.weight.zero_()
    llama.save_pretrained(tmp_path / "zeros")
    export_checkpoint(tmp_path / "zeros", Small(), tmp_path / "small")
    hub(tmp_path / "small")
    assert bits(load(HUB_NAME)) == bits(load(tmp_path / "small"))


def test_the_command_says_that_a_hub_model_is_loaded(msp, run_dir, packed_dir, hub, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the dog sat on the cat. " * 200)
    for source in (run_dir, packed_dir):
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
        hub(source)
        command = ["eval", HUB_NAME, "--data", text, "--samples", "2", "--length", "16", "--json"]
        assert f"loading {HUB_NAME} from the hub" in msp(*command).err
    assert "loading" not in msp("eval", run_dir, *command[2:]).err


def test_a_damaged_download_is_found(packed_dir, hub):
    path = hub(packed_dir)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"model\.safetensors has other bytes"):
        load(HUB_NAME)


def test_a_download_that_broke_off_is_found(packed_dir, hub):
    (hub(packed_dir) / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no safetensors files"):
        load(HUB_NAME)


def test_a_packed_hub_model_in_a_form_that_we_do_not_read_is_refused(packed_dir, hub, edit_json):
    path = hub(packed_dir)
    edit_json(
        path / "config.json",
        lambda data: data["quantization_config"]["sparsity_config"].update(targets=["Linear"]),
    )
    with pytest.raises(FormatError, match="someone/pruned: sparsity_config.targets does not name layers"):
        load(HUB_NAME)
