"""A whole model: a small Llama with its linears dense and packed, its logits and its forward passes."""

from __future__ import annotations

import copy
import json
import math

import torch
from common import Run, captured, describe, masked_24
from timings import Clock

from msp_plugin.serving import kernels
from msp_plugin.serving.algorithms import FoundAlgorithms

#: The operator in a whole model may stray this many times as far from float32 as the dense kernel does.
DRIFT = 1.5


class SparseLinear(torch.nn.Module):
    """A packed linear in the place of a dense one."""

    def __init__(self, dense: torch.nn.Linear, kernel: str, found: FoundAlgorithms):
        super().__init__()
        self.packed = kernels.pack(dense.weight, kernel, found=found)
        self.bias = dense.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.linear(x, self.packed, self.bias)


def pruned_llama(run: Run) -> torch.nn.Module:
    """Return a Llama of about 200 M random parameters, its decoder linears pruned to 2:4 by magnitude."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=2 if run.quick else 4,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).to(run.device, torch.bfloat16).eval()
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = masked_24(module.weight.data)
    return model


def with_sparse_linears(model: torch.nn.Module, run: Run) -> tuple[torch.nn.Module, float]:
    """Return a copy with the decoder linears packed, and their bytes relative to dense."""
    model = copy.deepcopy(model)
    dense_bytes = sparse_bytes = 0
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                kernel = run.kernels_for(tuple(child.weight.shape), child.weight.dtype)[0]
                sparse = SparseLinear(child, kernel, run.found)
                setattr(parent, name, sparse)
                dense_bytes += child.weight.numel() * child.weight.element_size()
                sparse_bytes += sparse.packed.bytes
    return model, sparse_bytes / dense_bytes


def end_to_end(run: Run) -> dict:
    """Return how far dense and sparse logits are from float32, and the times of whole forward passes."""
    dense = pruned_llama(run)
    sparse, share = with_sparse_linears(dense, run)
    ids = torch.randint(0, 4096, (2, 256), generator=torch.Generator().manual_seed(0)).to(run.device)
    reference = logits(copy.deepcopy(dense).float(), ids)
    of_dense, of_sparse = logits(dense, ids).float(), logits(sparse, ids).float()
    errors = {
        "dense": distance(of_dense, reference),
        "sparse": distance(of_sparse, reference),
        "between": distance(of_sparse, of_dense),
    }
    del reference
    rows = [forward_row(run, dense, sparse, shape) for shape in ((1, 1024), (8, 2048))]
    print("  relative errors:", json.dumps(errors))
    for row in rows:
        print("  forward:", json.dumps(row))
    return {
        "ok": math.isfinite(errors["sparse"]) and errors["sparse"] <= DRIFT * errors["dense"],
        "parameters": sum(p.numel() for p in dense.parameters()),
        "linear_bytes": share,
        "relative_errors": errors,
        "same_top_token": float((of_dense.argmax(-1) == of_sparse.argmax(-1)).float().mean()),
        "forwards": rows,
    }


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference relative to the norm of what was expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def forward_row(run: Run, dense: torch.nn.Module, sparse: torch.nn.Module, shape: tuple[int, int]) -> dict:
    """Return the times of a forward pass, launched by the host, and as a CUDA graph if it can be captured."""
    ids = torch.randint(0, 4096, shape, generator=torch.Generator().manual_seed(1)).to(run.device)
    clock, count = Clock(run), 5 if run.quick else 20
    calls = {"dense": lambda: logits(dense, ids), "sparse": lambda: logits(sparse, ids)}
    row: dict = {"shape": list(shape), "eager_us": clock.medians(calls, count)}
    row["eager_ratio"] = row["eager_us"]["dense"] / row["eager_us"]["sparse"]
    try:
        replays = {name: captured(call)[0].replay for name, call in calls.items()}
    except RuntimeError as error:  # the model's own code may wait for the GPU's results
        return row | {"graph_problem": describe(error)}
    row["graph_us"] = clock.medians(replays, count)
    row["graph_ratio"] = row["graph_us"]["dense"] / row["graph_us"]["sparse"]
    return row
