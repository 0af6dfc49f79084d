"""What saving refuses is known before the work, and a pruned model is not lost when saving fails."""

import errno
import json
import logging
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from msp_plugin import MixedSparsityModifier
from msp_plugin.checkpoint import saving
from msp_plugin.checkpoint.saving import (
    check_savable,
    generation_config_kept,
    kept_if_it_fails,
    write_weights,
)
from msp_plugin.errors import ModelError, OutputError
from msp_plugin.models.load import load_model
from msp_plugin.plan.allocation import Allocation
from msp_plugin.runtime.files import output_directory

#: transformers reads it with a warning, and refuses to save it.
CONTRADICTORY = {"do_sample": False, "temperature": 0.6, "max_new_tokens": 7}
PLAIN = ["-s", "0.5", "-m", "magnitude", "--levels", "2:4", "--allocator", "uniform", "--test-samples", "0"]


@pytest.fixture
def source(llama_dir, tmp_path):
    """A model whose generation config transformers does not save."""
    path = shutil.copytree(llama_dir, tmp_path / "source")
    (path / "generation_config.json").write_text(json.dumps(CONTRADICTORY))
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("while True:\n    x = x + 1\n" * 300)
    return ["--data", path, "--samples", "4", "--length", "32"]


def uniform():
    return MixedSparsityModifier(sparsity=0.5, levels=["2:4"], method="magnitude", allocator="uniform")


def oneshot(model, **options):
    from llmcompressor import oneshot

    return oneshot(model=model, recipe=[uniform()], **options)


def failing(error):
    def save(*args, **kwargs):
        raise error

    return save


def is_pruned(path):
    """True if plain transformers loads a directory and the kept weights are 2:4."""
    model = AutoModelForCausalLM.from_pretrained(path)
    weights = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n]
    return all(((w.reshape(len(w), -1, 4) != 0).sum(-1) == 2).all() for w in weights)


def kept_generation(path):
    kept = json.loads((path / "generation_config.json").read_text())
    return {key: kept[key] for key in CONTRADICTORY} == CONTRADICTORY


def test_a_generation_config_that_transformers_refuses_is_kept_as_it_is(source, text, msp, tmp_path):
    printed = msp("prune", source, *PLAIN, *text, "--out", tmp_path / "out")
    assert "refuses to save this model's generation_config.json" in " ".join(printed.err.split())
    assert is_pruned(tmp_path / "out") and kept_generation(tmp_path / "out")


def test_a_recipe_without_our_line_keeps_it_too(source, text, msp, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        'a_stage:\n  b_modifiers:\n    WandaPruningModifier: {sparsity: 0.5, mask_structure: "2:4", '
        'targets: [Linear], ignore: ["re:.*lm_head"]}\n'
    )
    msp("run", recipe, "--model", source, *text, "--test-samples", "0", "--out", tmp_path / "out")
    assert is_pruned(tmp_path / "out") and kept_generation(tmp_path / "out")


def test_oneshot_with_an_output_directory_keeps_it_too(source, tmp_path, caplog):
    oneshot(load_model(source), output_dir=str(tmp_path / "out"))
    assert "refuses to save" in caplog.text
    assert is_pruned(tmp_path / "out") and kept_generation(tmp_path / "out")
    assert (tmp_path / "out" / "allocation.json").is_file()


def test_a_config_or_tokenizer_that_cannot_be_saved_is_refused_before_the_work(
    llama_dir, text, msp, tmp_path, monkeypatch
):
    def no_work(*args, **kwargs):
        raise AssertionError("the work began")

    monkeypatch.setattr("msp_plugin.hosts.builtin.prune_to", no_work)
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", failing(ValueError("odd\nvocabulary")))
    said = msp("prune", llama_dir, *PLAIN, *text, "--out", tmp_path / "out", code=2).err
    assert (
        "cannot save the model's" in said and "ValueError: odd vocabulary" in said and "Traceback" not in said
    )
    monkeypatch.setattr("transformers.PreTrainedConfig.save_pretrained", failing(ValueError("odd size")))
    said = msp("prune", llama_dir, *PLAIN, *text, "--out", tmp_path / "out", code=2).err
    assert "cannot save the config of this LlamaForCausalLM: ValueError: odd size" in said
    assert not (tmp_path / "out").exists()


def test_oneshot_only_warns_of_a_config_that_cannot_be_saved(llama_dir, monkeypatch, caplog):
    model = load_model(llama_dir)
    monkeypatch.setattr("transformers.PreTrainedConfig.save_pretrained", failing(ValueError("odd size")))
    oneshot(model)
    assert "cannot save the config of this LlamaForCausalLM: ValueError: odd size" in caplog.text


def test_a_disk_without_room_for_the_result_is_refused_before_the_work(
    llama_dir, text, msp, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("msp_plugin.runtime.disk.shutil.disk_usage", lambda where: usage)
    said = msp("prune", llama_dir, *PLAIN, *text, "--out", tmp_path / "out", code=2).err
    assert "the pruned model takes" in said and "GiB free" in said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("a\nbug"), "could not be written: RuntimeError: a bug"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write"),
    ],
)
def test_a_run_that_cannot_save_its_model_keeps_it_and_says_where(
    error, words, llama_dir, text, msp, tmp_path, monkeypatch
):
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", failing(error))
    said = msp("prune", llama_dir, *PLAIN, *text, "--out", tmp_path / "out", code=2).err
    kept = tmp_path / "out.unsaved"
    assert words in said and f"kept in {kept}" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.partial"))
    assert is_pruned(kept) and Allocation.read(kept / "allocation.json").budget.exact
    assert json.loads((kept / "run.json").read_text())["sparsity"]["achieved"] == 0.5
    msp("prune", llama_dir, *PLAIN, *text, "--out", tmp_path / "out", code=2)
    assert is_pruned(tmp_path / "out.unsaved-2")  # the first one is not overwritten


def test_a_run_that_fails_when_its_model_is_measured_keeps_it(llama_dir, text, msp, tmp_path, monkeypatch):
    from msp_plugin.runs import steps as runs

    measured = []
    real = runs.perplexity

    def perplexity(*arguments, **options):
        measured.append(1)
        return real(*arguments, **options) if len(measured) == 1 else failing(KeyError(1))()

    monkeypatch.setattr(runs, "perplexity", perplexity)
    said = msp(
        "prune", llama_dir, *PLAIN, *text, "--test-samples", "2", "--out", tmp_path / "out", code=2
    ).err
    assert "KeyError: 1" in said and is_pruned(tmp_path / "out.unsaved")


def test_oneshot_keeps_a_model_that_it_cannot_save(llama_dir, tmp_path, monkeypatch):
    model = load_model(llama_dir)
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", failing(RuntimeError("a bug")))
    with pytest.raises(OutputError, match="RuntimeError: a bug") as found:
        oneshot(model, output_dir=str(tmp_path / "out"))
    kept = tmp_path / "out.unsaved"
    assert str(kept) in found.value.hint and is_pruned(kept) and (kept / "allocation.json").is_file()


def test_where_nothing_can_be_written_the_cache_keeps_the_model(llama, tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError) as found,
        kept_if_it_fails(llama, tmp_path / "file" / "out", lambda folder: None, str(tmp_path / "cache")),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    kept = tmp_path / "cache" / "unsaved" / "out.unsaved"
    assert str(kept) in found.value.hint and "free some space" in found.value.hint
    assert {file.name for file in kept.iterdir()} == {"config.json", "model.safetensors"}


def test_records_that_cannot_be_written_do_not_cost_the_weights(llama, tmp_path):
    with pytest.raises(OutputError), kept_if_it_fails(llama, tmp_path / "out", failing(TypeError("no JSON"))):
        raise ValueError("odd")
    assert (tmp_path / "out.unsaved" / "model.safetensors").is_file()


def test_a_stop_keeps_nothing(llama, tmp_path):
    with pytest.raises(SystemExit), kept_if_it_fails(llama, tmp_path / "out", lambda folder: None):
        raise SystemExit(130)
    assert not list(tmp_path.iterdir())


def test_the_weights_of_a_model_anywhere_are_written_whole_and_tied_ones_once(pair, tmp_path):
    here, away = pair
    for name, model in (("one", here), ("two", away)):
        with output_directory(tmp_path / name) as folder:
            write_weights(model, folder)
            here.config.to_json_file(folder / "config.json")
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), here.parameters(), strict=True))


def test_persistent_buffers_are_written_and_several_files_have_an_index(tmp_path, monkeypatch):
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    module.register_buffer("scratch", torch.ones(1), persistent=False)
    monkeypatch.setattr(saving, "SHARD_BYTES", 40)
    write_weights(module, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(module.state_dict())


def test_what_can_be_saved_is_left_to_transformers(llama, tokenizer, tmp_path, caplog):
    config = llama.generation_config = GenerationConfig(do_sample=True, temperature=0.6)
    caplog.set_level(logging.WARNING)
    check_savable(llama, tokenizer)
    with generation_config_kept(llama, tmp_path):
        assert llama.generation_config is config
    llama.generation_config = None
    with generation_config_kept(llama, tmp_path):
        pass
    assert not caplog.records and not list(tmp_path.iterdir())


def test_a_config_that_holds_what_cannot_be_written_is_refused(llama):
    llama.config.odd = torch.nn.Linear
    with pytest.raises(ModelError, match="cannot save the config of this LlamaForCausalLM: TypeError"):
        check_savable(llama)
