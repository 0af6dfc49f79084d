"""Where a training starts and ends: its seed, its learning rate, its blocks, and an early stop."""

import dataclasses

import pytest
import torch

pytest.importorskip("peft")

from msp_plugin.recovery.lora import LoRA
from msp_plugin.recovery.masked_lora import MaskedLoRA
from msp_plugin.recovery.masks import Masks

#: Eight steps of four samples.
SHORT = {"tokens": 8 * 96, "step_tokens": 96, "evaluations": 2, "warmup": 0.0}


def bytes_of(model):
    return {name: p.detach().view(torch.uint8).numpy().tobytes() for name, p in model.named_parameters()}


def test_a_training_that_ended_early_ends_there_again(case):
    """After a result that could not be written, the same command gives the same result and trains no more."""
    method = MaskedLoRA(rank=4, learning_rate=0.3, tokens=20 * 96, step_tokens=96, evaluations=10, patience=1)
    first = case.inputs("early")
    expected = method.recover(first)
    assert "of 20 steps: 1 evaluations were no better" in " ".join(expected.notes)
    log = (case.folder / "early" / "log.jsonl").read_text()
    again = case.inputs("early")
    assert method.recover(again) == expected
    assert bytes_of(again.model) == bytes_of(first.model)
    assert (case.folder / "early" / "log.jsonl").read_text() == log


@pytest.mark.parametrize("method", [LoRA(rank=2, masked_merge=True, **SHORT), MaskedLoRA(rank=2, **SHORT)])
def test_the_seed_decides_where_an_adapter_starts(case, method):
    models = []
    for turn in range(2):
        torch.manual_seed(turn)  # whatever ran before in the process
        inputs = case.inputs(f"turn {turn}")
        method.recover(inputs)
        models.append(bytes_of(inputs.model))
    assert models[0] == models[1]


def test_ist_leaves_blocks_that_were_not_pruned_out(case):
    inputs = case.inputs()
    masks = Masks.of(inputs.model, [name for name in inputs.masks if ".layers.1." in name])
    MaskedLoRA(layers="ist", norms=True, **SHORT).recover(dataclasses.replace(inputs, masks=masks))
    dense, own = (
        case.dense.model.layers[0].mlp.up_proj.weight,
        inputs.model.model.layers[0].mlp.up_proj.weight,
    )
    assert torch.equal(own, torch.where(own == 0, own, dense))


def test_the_learning_rate_goes_by_the_width_of_the_model_unless_it_is_given(case):
    width = case.dense.config.hidden_size
    assert MaskedLoRA().rate_for(case.dense) == LoRA().rate_for(case.dense) == 1 / width
    assert MaskedLoRA(learning_rate=3e-4).rate_for(case.dense) == 3e-4
    result = MaskedLoRA(rank=2, **{k: v for k, v in SHORT.items() if k != "learning_rate"}).recover(
        case.inputs()
    )
    assert f"the learning rate was {1 / width:.2g}, 1 / hidden size" in result.notes
