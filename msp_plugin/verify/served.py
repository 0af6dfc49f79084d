"""What a server answers against what transformers computes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.load import load
from msp_plugin.errors import RecipeError
from msp_plugin.models import load_tokenizer
from msp_plugin.verify.base import FAIL, OK, Check, Finding, StepProgress, Subject
from msp_plugin.verify.server import Completion, serving

#: Beginnings that any language model can go on from; prose and code, short and longer.
PROMPTS = (
    "The capital of France is", "def fibonacci(n):\n", "Once upon a time there was", "import os\nimport sys\n\n",
    "In the beginning", "class Stack:\n    def __init__(self):\n", "The three laws of thermodynamics are",
    "for i in range(10):\n    print(", "Dear Sir or Madam,\n", "SELECT name FROM users WHERE",
)  # fmt: skip


@dataclass(frozen=True)
class Served(Check):
    """A real vLLM server gives the greedy tokens and log-probabilities of transformers; kernels and bytes by layer.

    Args:
        prompts: how many, at most ten.
        tokens: greedy tokens after each.
        dtype: of the server and of transformers. Below float32, near ties make greedy tokens differ.
        tolerance: largest difference of a token's log-probability, nats.
        quantization: value of vLLM's ``--quantization``: ``sparse24`` packs a dense checkpoint at load time. A packed
            checkpoint needs none.
        arguments: further ones of ``vllm serve``, split at spaces.
        port: 0 for any free one.
        patience: seconds that the server may take to get ready.
    """

    name = "served"
    needs = ("environment",)

    prompts: int = 8
    tokens: int = 64
    dtype: str = "float32"
    tolerance: float = 1e-3
    quantization: str | None = None
    arguments: str = ""
    port: int = 0
    patience: float = 600

    def __post_init__(self) -> None:
        if not 1 <= self.prompts <= len(PROMPTS):
            raise RecipeError(f"served: prompts = {self.prompts}", hint=f"give 1 to {len(PROMPTS)}")
        if self.tokens < 1 or not 0 <= self.port < 65536:
            raise RecipeError(f"served: tokens = {self.tokens}, port = {self.port}", hint="see `msp plugins`")

    def run(self, subject: Subject, progress: StepProgress) -> list[Finding]:
        path = subject.checkpoint.path
        tokenizer = load_tokenizer(path, trust_remote_code=subject.trust_remote_code)
        prompts = [tokenizer(text)["input_ids"] for text in PROMPTS[: self.prompts]]
        extra = ["--quantization", self.quantization] if self.quantization else []
        extra += ["--trust-remote-code"] if subject.trust_remote_code else []
        progress("server", 0, 1)
        with serving(
            subject.environment, path, ["--dtype", self.dtype, *extra, *self.arguments.split()],
            port=self.port or None, patience=self.patience,
        ) as server:  # fmt: skip
            progress("server", 1, 1)
            answers = []
            for i, prompt in enumerate(prompts, 1):
                answers.append(server.complete(prompt, self.tokens))
                progress("served", i, len(prompts))
            layers = server.layers()
        model = load(path, self.dtype, checksums=False, trust_remote_code=subject.trust_remote_code)
        own = []
        for i, prompt in enumerate(prompts, 1):
            own.append(greedy(model, prompt, self.tokens))
            progress("transformers", i, len(prompts))
        return [*self._compare(answers, own), *_kernels(subject.checkpoint, layers, bool(self.quantization))]

    def _compare(self, answers: Sequence[Completion], own: Sequence[Completion]) -> list[Finding]:
        same = sum(
            a == b for x, y in zip(answers, own, strict=True) for a, b in zip(x.tokens, y.tokens, strict=True)
        )
        total = len(own) * self.tokens
        first = next(
            (i for i, (x, y) in enumerate(zip(answers, own, strict=True)) if x.tokens != y.tokens), None
        )
        found = f"{same} of {total} ({len(own)} prompts x {self.tokens}, {self.dtype})"
        if first is not None:
            at = next(k for k in range(self.tokens) if answers[first].tokens[k] != own[first].tokens[k])
            found += f"; prompt {first} differs first at token {at}"
        worst = max(abs(a - b) for x, y in zip(answers, own, strict=True) for a, b in _while_equal(x, y))
        return [
            Finding("greedy tokens", OK if first is None else FAIL, found, "those of transformers"),
            Finding(
                "log-probabilities", OK if worst <= self.tolerance else FAIL,
                f"largest difference {worst:.2g} nats", f"at most {self.tolerance:g}", {"largest": worst},
            ),
        ]  # fmt: skip


def _while_equal(x: Completion, y: Completion) -> list[tuple[float, float]]:
    """Return the pairs of log-probabilities up to and with the first token that differs."""
    pairs = []
    for a, b, p, q in zip(x.tokens, y.tokens, x.logprobs, y.logprobs, strict=True):
        pairs.append((p, q))
        if a != b:
            break
    return pairs


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: Sequence[int], count: int) -> Completion:
    """Return the ``count`` most likely tokens after a prompt, one by one, and their log-probabilities (nats)."""
    ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    cache, tokens, logprobs = None, [], []
    for _ in range(count):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        scores = out.logits[0, -1].float().log_softmax(-1)
        best = int(scores.argmax())
        tokens.append(best)
        logprobs.append(float(scores[best]))
        ids = torch.tensor([[best]], device=ids.device)
    return Completion(tuple(tokens), tuple(logprobs))


def _kernels(checkpoint: Checkpoint, layers: list[dict[str, Any]], asked: bool) -> list[Finding]:
    """Return a row for each kernel: its layers and the bytes of their weights."""
    if not layers:
        if checkpoint.packed or asked:
            return [
                Finding(
                    "kernels", FAIL, "the vLLM plugin reported no layer", "install msp_plugin beside vLLM"
                )
            ]
        return [
            Finding(
                "kernels", OK, "vLLM's own dense ones: the checkpoint is dense, and no packing was asked for"
            )
        ]
    rows, groups = [], defaultdict(list)
    for layer in layers:
        groups[layer["kernel"], layer["reason"]].append(layer)
    for (kernel, reason), members in sorted(groups.items()):
        held, dense = sum(m["bytes"] for m in members), sum(m["dense_bytes"] for m in members)
        why = f"; {reason}" if reason else ""
        rows.append(
            Finding(
                f"kernel {kernel}", OK, f"{len(members)} layers, {held:,} bytes ({held / dense:.3f} of dense){why}",
                details={"layers": members},
            )
        )  # fmt: skip
    served = {shard for layer in layers for shard in layer["packed"]}
    lost = [layer for layer in checkpoint.packed if layer not in served]
    if lost:
        rows.append(Finding("kernels", FAIL, f"{len(lost)} packed layers were not reported, e.g. {lost[0]}"))
    return rows
