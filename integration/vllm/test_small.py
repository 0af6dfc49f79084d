"""Smaller models inside vLLM: blocks of their own widths, dropped halves, against transformers and the form with zeros.

    pytest integration/vllm/test_small.py

in the environment that integration/vllm/serve_demo.py builds, with pytest installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import tiny_models
import torch
from linears import masked
from tiny_models import PROMPTS, SIZES
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import msp_plugin
from msp_plugin.checkpoint.export import export_checkpoint
from msp_plugin.checkpoint.packed_export import Bitmask, Sparse24
from msp_plugin.checkpoint.smaller import Small, Uniform
from msp_plugin.serving.cpu.build import load_operator
from msp_plugin.serving.cpu.kernel import FORCE

WIDER = {**SIZES, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
#: vLLM's class for Qwen2, which serves the form with zeros, takes the size of a head from the hidden size.
QWEN2 = {key: value for key, value in WIDER.items() if key != "head_dim"} | {
    "hidden_size": 256,
    "tie_word_embeddings": True,
}
TYPES = {
    "llama": (LlamaConfig, WIDER),
    "llama-bias": (LlamaConfig, {**WIDER, "attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {**WIDER, "sliding_window": None}),
    "mistral-window": (MistralConfig, {**WIDER, "sliding_window": 6}),
    "qwen2": (Qwen2Config, QWEN2),
    "qwen3": (Qwen3Config, WIDER),
}
#: What is zeroed, by block: KV heads, channels, whole halves. A first block without attention has no residual before
#: its MLP; one without anything hands its input on.
ZEROED = {
    0: ((), range(0, 64), ("self_attn",)),
    1: ((0, 3), range(7, 39), ()),
    2: ((2,), (), ("mlp",)),
    3: ((), (), ("self_attn", "mlp")),
    4: ((), range(0, 160, 2), ()),
}
EVEN = {block: ((1,), range(16, 48), ()) for block in range(4)} | {4: ((), (), ("self_attn", "mlp"))}
TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
#: With biases on o_proj and down_proj a half without heads still adds those.
WHOLE = {block: (heads, channels, ()) for block, (heads, channels, _) in ZEROED.items()}


def zeroed(name, zeros, seed=0, **changes):
    """Return a tiny random model with zeros in heads, channels and halves."""
    config, sizes = TYPES[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(**{**sizes, **changes})).float().eval()
    size = model.model.layers[0].self_attn.o_proj.in_features // model.config.num_key_value_heads
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.1)
        for block, (heads, channels, halves) in zeros.items():
            layer = model.model.layers[block]
            for head in heads:
                layer.self_attn.o_proj.weight[:, head * size : (head + 1) * size] = 0
            layer.mlp.down_proj.weight[:, list(channels)] = 0
            for half in halves:
                module = getattr(layer, half)
                (module.o_proj if half == "self_attn" else module.down_proj).weight.zero_()
    return model


def save(directory, name, zeros, exporter, form, **changes):
    """Save a model with zeros and its smaller form; return the greedy tokens of the smaller one in transformers."""
    model = zeroed(name, zeros, **changes)
    model.save_pretrained(directory / f"{name}-zeros")
    export_checkpoint(directory / f"{name}-zeros", exporter, directory / f"{name}-{form}")
    small = msp_plugin.load(directory / f"{name}-{form}")
    return [greedy(small, prompt) for prompt in PROMPTS]


def greedy(model, prompt):
    ids = torch.tensor([prompt])
    return model.generate(
        ids, max_new_tokens=16, min_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0,
        attention_mask=torch.ones_like(ids),
    )[0, len(prompt) :].tolist()  # fmt: skip


def serve(directory, names, *, plugins=None, kernels=False, **options):
    """Serve models of a directory one after the other in a process of their own; return what each answers.

    Args:
        kernels: multiply packed weights on the CPU's kernels, not dense.
    """
    jobs = {name: {"model": str(directory / name), "options": options} for name in names}
    asked, answered = directory / "jobs.json", directory / "results.json"
    asked.write_text(json.dumps(jobs))
    for name in names:  # reports are appended to
        (directory / f"{answered.name}.{name}").unlink(missing_ok=True)
    environment = dict(os.environ) if plugins is None else {**os.environ, "VLLM_PLUGINS": plugins}
    if kernels:
        environment.pop(FORCE)
    command = [sys.executable, tiny_models.__file__, str(asked), str(answered)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(answered.read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a directory of models in both forms, and by type the tokens that transformers gives."""
    directory = tmp_path_factory.mktemp("models")
    tokens = {
        name: save(directory, name, WHOLE if name == "llama-bias" else ZEROED, Small(), "small")
        for name in TYPES
    }
    return directory, tokens


@pytest.fixture(scope="module")
def answers(models):
    directory, _ = models
    return serve(directory, [f"{name}-{form}" for name in TYPES for form in ("zeros", "small")])


def tokens_of(result):
    assert "error" not in result, result["error"]
    return result["tokens"]


@pytest.mark.parametrize("name", TYPES)
def test_a_smaller_model_gives_the_tokens_of_transformers(answers, models, name):
    assert tokens_of(answers[f"{name}-small"]) == models[1][name]


@pytest.mark.parametrize("name", TYPES)
def test_a_smaller_model_answers_as_the_one_with_zeros(answers, name):
    small, zeros = answers[f"{name}-small"], answers[f"{name}-zeros"]
    assert tokens_of(small) == tokens_of(zeros)
    for ours, theirs in zip(small["logprobs"], zeros["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_the_answers_are_worth_comparing(models):
    for tokens in models[1].values():
        assert len({token for of_prompt in tokens for token in of_prompt}) > 8


def test_a_dropped_attention_has_no_cache_and_the_others_have_caches_of_their_own_size(answers):
    kept = {1: 2, 2: 3, 4: 4}  # by block its KV heads
    cache = answers["llama-small"]["cache"]
    assert {name.split(".")[2] for name in cache} == {str(block) for block in kept}
    assert {int(name.split(".")[2]): heads for name, heads in cache.items()} == kept


def test_processes_that_cannot_share_the_heads_of_a_block_are_refused_by_name(models):
    found = serve(models[0], ["llama-small"], **TWO)
    error = found["llama-small"]["error"]
    assert "block 2 has 3 KV heads, which 2 tensor parallel processes cannot share" in error


def test_two_processes_share_blocks_of_different_widths(tmp_path):
    """Blocks of 2, 1 and 4 KV heads of 4: one KV head stands in both processes, also beside blocks that share two."""
    zeros = {0: ((0, 1), range(32), ()), 1: ((0, 1, 3), range(10), ()), 2: ((), (), ("self_attn",))}
    tokens = {name: save(tmp_path, name, zeros, Small(), "small") for name in ("llama", "qwen3")}
    found = serve(tmp_path, [f"{name}-small" for name in tokens], **TWO)
    assert {name: tokens_of(found[f"{name}-small"]) for name in tokens} == tokens


def test_two_processes_share_what_is_left_of_heads_that_they_could_not_share(tmp_path):
    """Seven heads and 161 channels, of which each block lost an odd number."""
    sizes = {"hidden_size": 224, "num_attention_heads": 7, "num_key_value_heads": 7, "intermediate_size": 161}
    zeros = {block: (range(1 + 2 * (block % 2)), range(1 + 2 * block), ()) for block in range(5)}
    tokens = save(tmp_path, "llama", zeros, Small(), "small", **sizes)
    found = serve(tmp_path, ["llama-small"], **TWO)
    assert tokens_of(found["llama-small"]) == tokens


def test_an_even_model_is_served_by_vllm_without_the_plugin(tmp_path):
    names = ("llama", "mistral", "qwen2", "qwen3")
    tokens = {name: save(tmp_path, name, EVEN, Uniform(), "uniform") for name in names}
    config = json.loads((tmp_path / "llama-uniform" / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"] and config["num_hidden_layers"] == 4
    config = json.loads((tmp_path / "qwen2-uniform" / "config.json").read_text())
    assert config["architectures"] == ["SeedOssForCausalLM"]
    found = serve(tmp_path, [f"{name}-uniform" for name in tokens], plugins="")
    assert {name: tokens_of(found[f"{name}-uniform"]) for name in tokens} == tokens


#: By block the KV heads and channels of a model with a 2:4 mask in all that stays.
WIDTHS = ((4, 64), (2, 96), (2, 0), (0, 128), (4, 160))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Return a directory of a smaller model in both packed forms, and the tokens that transformers gives."""
    directory, model = tmp_path_factory.mktemp("packed"), zeroed("llama", {})
    for block, (heads, channels) in zip(model.model.layers, WIDTHS, strict=True):
        sizes = {"q": 64 * heads, "k": 32 * heads, "v": 32 * heads, "gate": channels, "up": channels}
        for name, layer in block.named_modules():
            kind = name.rpartition(".")[2].removesuffix("_proj")
            if kind in sizes:
                keep(layer.weight, slice(sizes[kind]), slice(None))
            elif kind in ("o", "down"):
                keep(layer.weight, slice(None), slice(sizes["q" if kind == "o" else "up"]))
    model.save_pretrained(directory / "zeros")
    export_checkpoint(directory / "zeros", Small(), directory / "small")
    for packer in (Sparse24(), Bitmask()):
        written = export_checkpoint(directory / "small", packer, directory / packer.name)
        assert len(written.packed) == 4 * 4 + 3 * 4 and not written.kept_dense
    small = msp_plugin.load(directory / "small")
    return directory, [greedy(small, prompt) for prompt in PROMPTS]


@torch.no_grad()
def keep(weight, rows, columns):
    """Zero a weight but for some rows and columns, in which 2:4 of the weights stay."""
    part = masked(weight[rows, columns].clone()) if weight[rows, columns].numel() else 0
    weight.zero_()
    weight[rows, columns] = part


@pytest.mark.skipif(load_operator() is not None, reason="no kernels here")
@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_left_is_served_packed_on_the_kernels(packed, processes):
    """Four linears a block, less what is dropped, each multiplied packed in every process."""
    directory, tokens = packed
    names = ["sparse24", "bitmask"]
    found = serve(directory, names, kernels=True, **(TWO if processes == 2 else {}))
    for name in names:
        assert tokens_of(found[name]) == tokens
        lines = (directory / f"results.json.{name}").read_text().splitlines()
        report = [json.loads(line) for line in lines]
        assert sorted(line["rank"] for line in report) == [r for r in range(processes) for _ in range(16)]
        assert "dense" not in {line["kernel"] for line in report}


def test_without_the_plugin_vllm_refuses_a_smaller_model(models):
    found = serve(models[0], ["llama-small", "mistral-small"], plugins="")
    assert all("error" in result for result in found.values())


def test_a_type_that_is_not_served_is_refused_by_name(tmp_path):
    from transformers import GemmaConfig, GemmaForCausalLM

    model = GemmaForCausalLM(GemmaConfig(**WIDER))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path / "zeros")
    export_checkpoint(tmp_path / "zeros", Small(), tmp_path / "gemma-small")
    error = serve(tmp_path, ["gemma-small"])["gemma-small"]["error"]
    assert "is a smaller gemma; vLLM serves smaller models of the types llama, mistral, qwen2, qwen3" in error
