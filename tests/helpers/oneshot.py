"""llm-compressor's ``oneshot`` on calibration samples."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils.data import DataLoader

SEARCH = {"name": "msp", "population": 3, "generations": 1, "offspring": 2, "tokens": 128}
FISHER = {"fisher": {"samples": 2}}


def loader(calibration):
    return DataLoader([{"input_ids": sample} for sample in calibration.samples], batch_size=4)


def run(model, recipe, calibration, **kwargs):
    from llmcompressor import oneshot

    return oneshot(model=model, recipe=recipe, dataset=loader(calibration), **kwargs)


def hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )


def groups(weight, m):
    return (weight.reshape(weight.shape[0], -1, m) != 0).sum(-1)


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n}


@contextmanager
def refused(error, *words):
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert word in str(caught.value)
