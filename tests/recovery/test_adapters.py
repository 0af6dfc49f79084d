"""Adapters that a trained recovery saves beside its result."""

import dataclasses
import importlib
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("peft")

from msp_plugin.errors import ModelError, OutputError, RecipeError
from msp_plugin.recovery.full import Full
from msp_plugin.recovery.lora import LoRA
from msp_plugin.recovery.masked_lora import MaskedLoRA
from msp_plugin.recovery.masks import Masks
from msp_plugin.recovery.sparse_delta import SparseDelta
from msp_plugin.recovery.spp import SPP
from msp_plugin.runs.prune import prune
from msp_plugin.runs.recover import recover
from msp_plugin.runtime.context import RunContext

SHORT = {"tokens": 8 * 96, "step_tokens": 96, "evaluations": 2, "warmup": 0.0}


@pytest.mark.parametrize(
    "method",
    [
        SparseDelta(learning_rate=1e-2, **SHORT),
        *(
            pytest.param(method, marks=pytest.mark.slow)
            for method in (
                MaskedLoRA(rank=4, learning_rate=1e-2, **SHORT),
                SPP(groups=8, learning_rate=3e-2, **SHORT),
                Full(learning_rate=1e-3, **SHORT),
            )
        ),
    ],
    ids=lambda method: method.name,
)
def test_a_saved_adapter_gives_the_merged_model_again(method, case, make_samples):
    from peft import PeftModel

    importlib.import_module("msp_plugin.recovery.adapters")
    inputs = case.inputs()
    method = dataclasses.replace(method, adapter=str(case.folder / "adapter"), norms=True)
    method.recover(inputs)
    again = PeftModel.from_pretrained(case.inputs("other").model, str(case.folder / "adapter"))
    ids = torch.stack(make_samples(2, 16, seed=5).samples)
    with torch.no_grad():
        merged = inputs.model(ids).logits
        assert torch.equal(again(ids).logits, merged)
        assert torch.equal(again.merge_and_unload()(ids).logits, merged)
    assert (case.folder / "adapter" / "adapter_config.json").is_file()
    method.recover(case.inputs())  # as after a stop before its result was written
    shutil.copytree(case.folder / "adapter", case.folder / "of another")
    with pytest.raises(OutputError, match="is not empty"):
        dataclasses.replace(method, adapter=str(case.folder / "of another")).recover(case.inputs())
    with pytest.raises(OutputError, match="is not empty"):
        method.recover(dataclasses.replace(case.inputs(), folder=case.folder / "another"))


def test_an_adapter_that_cannot_be_written_is_refused_before_any_work(case, tmp_path):
    inputs = case.inputs()
    for path, holds in ((tmp_path / "file", "is a file"), (tmp_path, "is not empty")):
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match=holds):
            MaskedLoRA(adapter=str(path)).check(inputs.model, inputs.masks)


def test_a_saved_lora_that_peft_would_merge_into_the_zeros_is_refused(case, tmp_path):
    inputs = case.inputs()
    with pytest.raises(RecipeError, match="into the .* pruned weights too"):
        LoRA(masked_merge=True, adapter=str(tmp_path / "adapter")).check(inputs.model, inputs.masks)
    rows = Masks({"layer": (8, 8)}, {"layer": np.array([255] * 7 + [0], np.uint8)})  # a whole row is zero
    LoRA(rank=2, adapter="adapter").check_layers(rows)
    with pytest.raises(RecipeError, match="into the 8 pruned weights too"):
        LoRA(rank=2, masked_merge=True, adapter="adapter").check_layers(rows)


def test_an_adapter_inside_the_result_is_refused_before_any_work(run_dir, tmp_path):
    for adapter in (tmp_path / "out", tmp_path / "out" / "adapter"):
        with pytest.raises(OutputError, match="into .*out, which gets the result"):
            recover(run_dir, "no text", tmp_path / "out", method={"name": "masked_lora", "adapter": str(adapter),
                    "kl_weight": 0})  # fmt: skip


@pytest.mark.parametrize("stopped", [False, True])
def test_an_adapter_of_another_recovery_is_refused_before_a_model_is_loaded(stopped, tmp_path):
    """The state of a stopped recovery says that it wrote the adapter, and then the run goes on: to a source that is none."""
    adapter, state = tmp_path / "adapter", tmp_path / "cache" / "recovery" / "state"
    for folder in (adapter, state):
        folder.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (state / "adapter_written").write_text(str(adapter if stopped else tmp_path / "other"))
    method = {"name": "masked_lora", "adapter": str(adapter), "kl_weight": 0}
    cache = str(tmp_path / "cache")
    with pytest.raises(ModelError if stopped else OutputError, match="no_such" if stopped else "not empty"):
        recover(tmp_path / "no_such", "no text", tmp_path / "out", method=method, cache=cache)
    with pytest.raises(OutputError, match="not empty"):
        recover(tmp_path / "no_such", "no text", tmp_path / "out", method=method, cache=cache,
                context=RunContext(fresh=True))  # fmt: skip


def test_adapters_of_two_methods_live_in_one_model(case, make_samples):
    from peft import PeftModel

    importlib.import_module("msp_plugin.recovery.adapters")
    ids, logits = torch.stack(make_samples(2, 16, seed=5).samples), {}
    methods = (
        SparseDelta(learning_rate=1e-2, norms=True, **SHORT),
        SPP(groups=8, learning_rate=3e-2, **SHORT),
    )
    for method in methods:
        inputs = dataclasses.replace(case.inputs(), folder=case.folder / f"state of {method.name}")
        dataclasses.replace(method, adapter=str(case.folder / method.name)).recover(inputs)
        with torch.no_grad():
            logits[method.name] = inputs.model(ids).logits
    first, second = logits
    model = PeftModel.from_pretrained(
        case.inputs("other").model, str(case.folder / first), adapter_name=first
    )
    model.load_adapter(str(case.folder / second), second)
    for name in (second, first):
        model.set_adapter(name)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits[name])


def test_an_adapter_that_would_change_nothing_is_not_written_and_a_note_says_so(case):
    method = SPP(groups=8, learning_rate=1e-12, adapter=str(case.folder / "none"), **SHORT)
    notes = method.recover(case.inputs()).notes
    assert (
        not (case.folder / "none").exists() and f"no adapter was written to {case.folder / 'none'}" in notes
    )


def test_an_adapter_of_a_pruned_model_that_nobody_writes_is_refused(llama_dir, tmp_path):
    method = {"name": "masked_lora", "adapter": str(tmp_path / "adapter")}
    with pytest.raises(RecipeError, match="which is not saved where a recovery follows") as error:
        prune(llama_dir, "no text", tmp_path / "out", sparsity=0.5, recover=method)
    assert "msp recover" in error.value.hint
