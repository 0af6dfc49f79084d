"""The check that a vLLM server answers with the tokens and log-probabilities that transformers computes."""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.load import load
from msp_plugin.errors import RecipeError, nearest
from msp_plugin.models.source import load_tokenizer
from msp_plugin.progress import StepProgress
from msp_plugin.verify.base import FAIL, OK, Check, Finding, Subject
from msp_plugin.verify.server import Completion, serving

#: Beginnings of texts that any language model can continue: prose and code, short and longer.
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time there was",
    "import os\nimport sys\n\n",
    "In the beginning",
    "class Stack:\n    def __init__(self):\n",
    "The three laws of thermodynamics are",
    "for i in range(10):\n    print(",
    "Dear Sir or Madam,\n",
    "SELECT name FROM users WHERE",
)

#: Nats by which log-probabilities may differ. In float32 the order of sums shows in the sixth digit. With 16 bits the
#: logits are rounded too: between 16 and 32, neighbouring numbers are 2**-3 apart in bfloat16 and 2**-6 in float16;
#: the tolerance is twice that.
TOLERANCE = {"float32": 1e-3, "float16": 2**-5, "bfloat16": 2**-2}


@dataclass(frozen=True)
class Served(Check):
    """A vLLM server gives the greedy tokens and log-probabilities of transformers; also lists its kernels.

    Args:
        prompts: number of prompts, at most ten.
        tokens: greedy tokens after each prompt.
        dtype: of the server and of transformers. In float32 the greedy tokens must be the same. With 16 bits near ties
            may fall either way, so transformers scores the server's tokens: each must be within ``tolerance`` of the
            most likely one.
        tolerance: largest difference of a token's log-probability in nats; null takes the dtype's in TOLERANCE.
        quantization: value of vLLM's ``--quantization``: ``sparse24`` packs a dense checkpoint at load time.
            A packed checkpoint needs none.
        arguments: further arguments of ``vllm serve``, quoted as in a shell.
        port: 0 for any free port.
        patience: seconds that the server may take to get ready.
    """

    name = "served"
    needs = ("environment",)

    prompts: int = 8
    tokens: int = 64
    dtype: str = "float32"
    tolerance: float | None = None
    quantization: str | None = None
    arguments: str = ""
    port: int = 0
    patience: float = 600

    def __post_init__(self) -> None:
        if not 1 <= self.prompts <= len(PROMPTS):
            raise RecipeError(f"served: prompts = {self.prompts}", hint=f"give 1 to {len(PROMPTS)}")
        if self.tokens < 1 or not 0 <= self.port < 65536:
            raise RecipeError(f"served: tokens = {self.tokens}, port = {self.port}", hint="see `msp plugins`")
        if not self.patience > 0 or (self.tolerance is not None and not self.tolerance >= 0):
            raise RecipeError(
                f"served: patience = {self.patience}, tolerance = {self.tolerance}",
                hint="give a patience above 0 and a tolerance of at least 0",
            )
        try:
            shlex.split(self.arguments)
        except ValueError as error:
            raise RecipeError(f"served: arguments = {self.arguments!r}: {error}") from None
        if self.dtype not in TOLERANCE:
            raise RecipeError(f"served: dtype = {self.dtype!r}", hint=nearest(self.dtype, TOLERANCE))

    def run(self, subject: Subject, progress: StepProgress) -> list[Finding]:
        path = subject.checkpoint.path
        tokenizer = load_tokenizer(path, trust_remote_code=subject.trust_remote_code)
        prompts = [tokenizer(text)["input_ids"] for text in PROMPTS[: self.prompts]]
        extra = ["--quantization", self.quantization] if self.quantization else []
        extra += ["--trust-remote-code"] if subject.trust_remote_code else []
        extra += shlex.split(self.arguments)
        progress("server", 0, 1)
        assert subject.environment is not None, "the check needs an environment"
        port, arguments = self.port or None, ["--dtype", self.dtype, *extra]
        with serving(subject.environment, path, arguments, port=port, patience=self.patience) as server:
            progress("server", 1, 1)
            answers = []
            for i, prompt in enumerate(prompts, 1):
                answers.append(server.complete(prompt, self.tokens))
                progress("served", i, len(prompts))
            layers = server.layers()
        model = load(path, self.dtype, checksums=False, trust_remote_code=subject.trust_remote_code)
        compared = self._compare(model, prompts, answers, progress)
        return [*compared, *_kernels(subject.checkpoint, layers, bool(self.quantization))]

    def _compare(
        self,
        model: torch.nn.Module,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Completion],
        progress: StepProgress,
    ) -> list[Finding]:
        """Compare the server's answers with transformers': by token in float32, by probability in 16 bits."""
        completions, scored = [], []
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
            if self.dtype == "float32":
                completions.append(greedy(model, prompt, self.tokens))
            else:
                scored.append(scores(model, prompt, answer.tokens))
            progress("transformers", i, len(prompts))
        return self._same_tokens(answers, completions) if completions else self._near_tokens(answers, scored)

    @property
    def _most(self) -> float:
        """The largest difference of log-probabilities that passes, in nats."""
        return TOLERANCE[self.dtype] if self.tolerance is None else self.tolerance

    def _same_tokens(self, answers: Sequence[Completion], own: Sequence[Completion]) -> list[Finding]:
        """Compare the server's greedy tokens with transformers'."""
        pairs = list(zip(answers, own, strict=True))
        same = sum(a == b for x, y in pairs for a, b in zip(x.tokens, y.tokens, strict=True))
        first = next((i for i, (x, y) in enumerate(pairs) if x.tokens != y.tokens), None)
        text = f"{same} of {len(own) * self.tokens} ({len(own)} prompts x {self.tokens}, {self.dtype})"
        if first is not None:
            at = next(k for k in range(self.tokens) if answers[first].tokens[k] != own[first].tokens[k])
            text += f"; prompt {first} differs first at token {at}"
        tokens = Finding("greedy tokens", OK if first is None else FAIL, text, "those of transformers")
        return [tokens, self._distance([abs(a - b) for x, y in pairs for a, b in _while_equal(x, y)])]

    def _near_tokens(self, answers: Sequence[Completion], own: Sequence[Scores]) -> list[Finding]:
        """Compare the server's tokens with the log-probabilities that transformers gives them."""
        behind = [gap for score in own for gap in score.behind]
        best, worst = sum(gap == 0 for gap in behind), _largest(behind)
        tokens = Finding(
            "greedy tokens",
            OK if worst <= self._most else FAIL,
            f"{best} of {len(behind)} are transformers' most likely one, the others at most {worst:.2g} nats "
            f"behind it ({len(own)} prompts x {self.tokens}, {self.dtype})",
            f"at most {self._most:g} behind",
            {"behind": worst},
        )
        pairs = zip(answers, own, strict=True)
        apart = [abs(p - q) for x, y in pairs for p, q in zip(x.logprobs, y.logprobs, strict=True)]
        return [tokens, self._distance(apart)]

    def _distance(self, apart: list[float]) -> Finding:
        worst = _largest(apart)
        return Finding(
            "log-probabilities",
            OK if worst <= self._most else FAIL,
            f"largest difference {worst:.2g} nats",
            f"at most {self._most:g}",
            {"largest": worst},
        )


def _largest(values: list[float]) -> float:
    """Return the largest value; NaN if one is."""
    return math.nan if any(map(math.isnan, values)) else max(values)


@dataclass(frozen=True)
class Scores:
    """By token, its log-probability (nats), and how far that is below the most likely token's at its position."""

    logprobs: tuple[float, ...]
    behind: tuple[float, ...]


@torch.no_grad()
def scores(model: torch.nn.Module, prompt: Sequence[int], tokens: Sequence[int]) -> Scores:
    """Return the scores that a model gives to tokens after a prompt."""
    ids = torch.tensor([[*prompt, *tokens]], device=next(model.parameters()).device)
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    of_tokens = logits.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    return Scores(tuple(of_tokens.tolist()), tuple((logits.amax(-1) - of_tokens).tolist()))


def _while_equal(x: Completion, y: Completion) -> list[tuple[float, float]]:
    """Return the pairs of log-probabilities up to and including the first token that differs."""
    pairs = []
    for a, b, p, q in zip(x.tokens, y.tokens, x.logprobs, y.logprobs, strict=True):
        pairs.append((p, q))
        if a != b:
            break
    return pairs


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: Sequence[int], count: int) -> Completion:
    """Return ``count`` greedy tokens after a prompt, and their log-probabilities (nats)."""
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
    """Return a row for each kernel: its layers and the bytes of their weights.

    Args:
        asked: True if vLLM was told to pack a dense checkpoint.
    """
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
        stored, dense = sum(m["bytes"] for m in members), sum(m["dense_bytes"] for m in members)
        why = f"; {reason}" if reason else ""
        names = {m["layer"] for m in members}  # each process of a tensor parallel group reports its share
        rows.append(
            Finding(
                f"kernel {kernel}",
                FAIL if any(m.get("failed") for m in members) else OK,
                f"{len(names)} layers, {stored:,} bytes ({stored / dense:.3f} of dense){why}",
                details={"layers": members},
            )
        )
    served = {shard for layer in layers for shard in layer["packed"]}
    lost = [layer for layer in checkpoint.packed if layer not in served]
    if lost:
        rows.append(Finding("kernels", FAIL, f"{len(lost)} packed layers were not reported, e.g. {lost[0]}"))
    return rows
