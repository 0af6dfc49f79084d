"""What the modifier refuses."""

import subprocess
import sys

import pytest

from msp_plugin import MixedSparsityModifier
from msp_plugin.errors import HostError, RecipeError
from tests.helpers.oneshot import refused, run


@pytest.fixture
def model(demo_model):
    return demo_model


def test_options_are_refused_before_a_model_is_there():
    with refused(RecipeError, "sparsty", "did you mean 'sparsity'"):
        MixedSparsityModifier(sparsty=0.5)
    with refused(RecipeError, "wnda", "did you mean 'wanda'"):
        MixedSparsityModifier(sparsity=0.5, method="wnda")
    with refused(RecipeError, "2:4", "quotes"):
        MixedSparsityModifier(sparsity=0.5, levels=[124])
    with refused(RecipeError, "outside [0, 1)", "0.75"):
        MixedSparsityModifier(sparsity=75)
    with refused(RecipeError, "sparsity is missing"):
        MixedSparsityModifier()
    with refused(RecipeError, "block_size", "3:48"):
        MixedSparsityModifier(sparsity=0.5, levels=["3:48", "dense"], method="sparsegpt")


@pytest.mark.slow
def test_two_ranks_are_refused_with_a_reason(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import torch.distributed as dist; dist.init_process_group('gloo')\n"
        "from torch.utils.data import DataLoader; import torch\n"
        "from llmcompressor import oneshot\n"
        "from msp_plugin import MixedSparsityModifier\n"
        "from msp_plugin.demo import demo_model_path\n"
        "from msp_plugin.models.load import load_model\n"
        "data = DataLoader([{'input_ids': torch.arange(32)}])\n"
        "oneshot(model=load_model(demo_model_path('qwen2')), dataset=data,\n"
        "        recipe=[MixedSparsityModifier(sparsity=0.5, method='wanda', allocator='uniform')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "there are 2 ranks, and each would prune the whole model" in done.stderr


def test_processes_of_torchrun_that_have_not_met_are_refused_as_well(model, calibration, monkeypatch):
    def modifier():
        return MixedSparsityModifier(
            sparsity=0.5, method="magnitude", allocator="uniform", targets=["q_proj"]
        )

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run(model, [modifier()], calibration)  # another launcher's count, of jobs that have nothing in common
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(HostError, match="there are 2 ranks"):
        run(model, [modifier()], calibration)
