"""The fingerprint of a model: all that its outputs depend on, and nothing else."""

import copy

import pytest
import torch

from msp_plugin.models.fingerprint import fingerprint
from msp_plugin.models.load import load_model


def test_the_fingerprint_follows_every_parameter_and_nothing_else(model):
    before = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == before
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        kept = flat[-1].clone()
        flat[-1] += 1
        assert fingerprint(model) != before, name
        flat[-1] = kept
    assert fingerprint(model) == before


def test_the_fingerprint_tells_dtypes_and_configs_apart(llama):
    before = fingerprint(llama)
    other = copy.deepcopy(llama)
    other.config.rms_norm_eps = 1e-3
    assert fingerprint(other) != before
    assert fingerprint(llama.bfloat16()) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_keeps_its_fingerprint_when_it_is_saved_and_loaded(model, tmp_path, dtype):
    before = fingerprint(model.to(dtype))
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    loaded = load_model(tmp_path / "b")
    assert next(loaded.parameters()).dtype == dtype
    assert fingerprint(loaded) == fingerprint(model) == before


def test_the_fingerprint_follows_buffers_that_a_checkpoint_holds_and_no_others(llama):
    block = llama.model.layers[0]
    block.register_buffer("saved", torch.zeros(3))
    block.register_buffer("passing", torch.zeros(3), persistent=False)
    before = fingerprint(llama)
    block.passing += 1
    assert fingerprint(llama) == before
    block.saved += 1
    assert fingerprint(llama) != before


def test_the_fingerprint_follows_code_that_no_version_stands_for(llama):
    before = fingerprint(llama)
    mlp = llama.model.layers[0].mlp

    class Doubled(type(mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    mlp.__class__ = Doubled
    assert fingerprint(llama) != before
