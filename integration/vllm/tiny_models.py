"""Tiny models, dense and packed, and a program that serves one after the other: tiny_models.py JOBS RESULTS."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch
from linears import Lines, masked, random
from safetensors.torch import load_file, save_file
from vllm.distributed import parallel_state

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [100] * 9]
DENSE_LAYER = "model.layers.0.self_attn.o_proj"
SIZES = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.15,
}


def save_models(directory):
    """Save tiny models with 2:4 weights, but for one layer, dense and in both packed formats."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Phi3Config,
        Phi3ForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    from msp_plugin.checkpoint.export import export_checkpoint
    from msp_plugin.checkpoint.packed_export import Bitmask, Sparse24

    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
        "phi3": Phi3ForCausalLM(Phi3Config(**SIZES)),
    }
    for name, model in models.items():
        for key, parameter in model.named_parameters():
            if key.endswith("proj.weight") and not key.startswith(DENSE_LAYER):
                parameter.data = masked(parameter.data)
            elif key.endswith("bias"):
                parameter.data.normal_()
        model.float().save_pretrained(directory / name)
        for exporter, form in ((Sparse24(), "packed"), (Bitmask(), "bitmask")):
            written = export_checkpoint(directory / name, exporter, directory / f"{name}-{form}")
            assert set(written.kept_dense) == {DENSE_LAYER}


def save_adapter(directory):
    """Save a LoRA adapter for layers of every kind."""
    sizes = {"self_attn.q_proj": (128, 128), "self_attn.o_proj": (128, 128), "mlp.up_proj": (128, 160)}
    tensors = {}
    for i, (name, (inputs, outputs)) in enumerate(sizes.items()):
        full = f"base_model.model.model.layers.1.{name}"
        tensors[f"{full}.lora_A.weight"] = random(8, inputs, seed=i)
        tensors[f"{full}.lora_B.weight"] = random(outputs, 8, seed=9 + i)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 8, "bias": "none"}
    about["target_modules"] = [name.rpartition(".")[2] for name in sizes]
    (directory / "adapter_config.json").write_text(json.dumps(about))


def without(source, target, lost, *, keep_manifest=True):
    """Copy a checkpoint without one of its tensors."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            del tensors[lost]
            save_file(tensors, target / file.name, metadata={"format": "pt"})
        elif keep_manifest or file.name != "export.json":
            (target / file.name).write_bytes(file.read_bytes())


def serve_all(jobs_file, results_file):
    """Serve one model after the other in this process and write down what they answer."""
    jobs, results = json.loads(Path(jobs_file).read_text()), {}
    for name, job in jobs.items():
        os.environ["MSP_SERVING_REPORT"] = f"{results_file}.{name}"
        with Lines() as lines:
            try:
                results[name] = serve(job)
            except Exception as error:
                results[name] = {"error": f"{type(error).__name__}: {error}"}
        results[name]["log"] = lines
        gc.collect()
        parallel_state.cleanup_dist_env_and_memory()
        Path(results_file).write_text(json.dumps(results))


def serve(job):
    from vllm import LLM

    llm = LLM(
        job["model"], dtype="float32", enforce_eager=True, max_model_len=64, max_num_batched_tokens=64, max_num_seqs=4,
        skip_tokenizer_init=True, disable_log_stats=True, **job.get("options", {}),
    )  # fmt: skip
    result = generate(llm, job.get("adapter"))
    result["cache"] = caches(llm)
    if job.get("reload"):
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        result["again"] = generate(llm, None)
    return result


def caches(llm):
    """Return the KV heads of each attention that has a KV cache; nothing of several processes."""
    if llm.llm_engine.vllm_config.parallel_config.world_size > 1:
        return {}
    (specs,) = llm.collective_rpc("get_kv_cache_spec")
    return {name: spec.num_kv_heads for name, spec in specs.items()}


def generate(llm, adapter):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    greedy = SamplingParams(temperature=0, max_tokens=16, logprobs=1, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    lora = LoRARequest("adapter", 1, adapter) if adapter else None
    found = [answer.outputs[0] for answer in llm.generate(prompts, greedy, lora_request=lora, use_tqdm=False)]
    chosen = [
        [step[token].logprob for token, step in zip(f.token_ids, f.logprobs, strict=True)] for f in found
    ]
    return {"tokens": [list(f.token_ids) for f in found], "logprobs": chosen}


def flip_a_bit(file):
    """Flip one bit of the last tensor's data."""
    data = bytearray(file.read_bytes())
    data[-5] ^= 16
    file.write_bytes(data)


if __name__ == "__main__":
    serve_all(*sys.argv[1:])
