"""What the tests of the vLLM plugin share; vLLM reads these variables when it is imported."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "MSP_CPU_KERNEL": "dense",  # exact products show how weights are loaded; test_cpu.py turns the kernels on
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
}

if importlib.util.find_spec("vllm") is None:
    pytest.exit("without vLLM it cannot be checked that vLLM serves 2:4 checkpoints", returncode=5)

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside this one
import torch
from linears import Lines
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state

from msp_plugin.serving.kernels import Choice, Packed24
from msp_plugin.serving.vllm import linear as plugin


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    with set_current_vllm_config(VllmConfig()):
        rendezvous = tmp_path_factory.mktemp("distributed") / "file"
        init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
    parallel_state.cleanup_dist_env_and_memory()


@pytest.fixture(params=[0, 1], ids=["rank0", "rank1"])
def rank(request, monkeypatch):
    """One process of a tensor parallel group of two, as far as loading goes."""
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=request.param, world_size=2))
    return request.param


@pytest.fixture
def log():
    """The lines that the plugin logs; vLLM's loggers do not reach pytest's."""
    with Lines() as lines:
        yield lines


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Return the lines of the report so far."""
    file = tmp_path / "report.jsonl"
    monkeypatch.setenv("MSP_SERVING_REPORT", str(file))
    return lambda: [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def gpu(monkeypatch):
    """Stand-ins for a GPU's kernels: the packed weight is the weight twice over, with its sign changed."""
    calls = []

    def choose(shape, dtype, device):
        return Choice("cusparselt", "played")

    def pack24(weight, kernel, *, found):
        found["packed"] = found.get("packed", 0) + 1
        meta = torch.full((weight.shape[0], 1), 7, dtype=torch.int16)
        return Packed24(kernel, torch.cat([-weight, -weight]), meta, *weight.shape, algorithms=(3, 1, 4))

    def multiply(x, packed, meta, bias, out_features, kernel, algorithms):
        assert bool((meta == 7).all())
        calls.append((kernel, algorithms))
        return torch.nn.functional.linear(x, -packed[:out_features], bias)

    monkeypatch.setattr(plugin.kernels, "choose", choose)
    monkeypatch.setattr(plugin.kernels, "pack", pack24)
    monkeypatch.setattr(plugin.kernels, "self_check", lambda weight, packed: 0.001)
    monkeypatch.setattr(torch.ops.msp_plugin, "sparse24_linear", multiply)
    return calls
