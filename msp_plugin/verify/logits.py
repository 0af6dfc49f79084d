"""The check that a smaller model gives the logits of the model that it was cut from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.load import load
from msp_plugin.errors import RecipeError
from msp_plugin.models.layers import text_config
from msp_plugin.progress import StepProgress
from msp_plugin.records.run import RECOVER, RunRecord
from msp_plugin.verify.base import FAIL, OK, SKIP, Check, Finding, Subject
from msp_plugin.verify.rounded import rounded_more
from msp_plugin.verify.sliced import is_smaller

#: The tolerance where int8 rounds the weights, and the reference's are not rounded: about five times as far as the demo models
#: were, with half of their weights and a quarter of their channels (0.0058 and 0.011).
_INT8 = 0.05


@dataclass(frozen=True)
class Logits(Check):
    """A smaller model gives the reference's float32 logits on random tokens, and the same greedy tokens.

    The terms that its sums leave out are zero, but the others are rounded in another order. Other exports keep the
    bits of their weights, so the check skips them. Weights in int8 give other logits, within a twentieth of the largest, and
    their tokens are not compared.

    Args:
        samples, length: number of samples of random tokens, and tokens of each.
        tokens: greedy tokens after each sample, through the KV cache.
        tolerance: largest difference of two logits, as a share of the largest logit.
    """

    name = "logits"
    needs = ("reference",)

    samples: int = 4
    length: int = 32
    tokens: int = 16
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if min(self.samples, self.length, self.tokens) < 1 or not self.tolerance > 0:
            raise RecipeError(
                f"logits: {self}", hint="give at least 1 sample of 1 token, and a tolerance above 0"
            )

    def run(self, subject: Subject, progress: StepProgress) -> list[Finding]:
        reference = subject.reference
        assert reference is not None, "the check needs a reference"
        if not is_smaller(subject.checkpoint, reference):
            return [
                Finding(
                    "logits", SKIP, "not smaller than the reference: round_trip compares tensors bit for bit"
                )
            ]
        if _recoveries(subject.checkpoint) > _recoveries(reference):
            return [Finding("logits", SKIP, "a recovery changed them: compare with quality")]
        ids, logits, greedy = None, [], []
        for done, path in enumerate((reference.path, subject.checkpoint.path), 1):
            model = load(path, "float32", checksums=False)
            if ids is None:
                generator = torch.Generator().manual_seed(0)
                words = text_config(model).vocab_size
                ids = torch.randint(0, words, (self.samples, self.length), generator=generator)
            with torch.no_grad():
                logits.append(model(ids).logits)
            greedy.append(_greedy(model, ids, self.tokens))
            del model
            progress("logits", done, 2)
        if rounded_more(subject.checkpoint, reference):
            tokens = Finding("greedy tokens", SKIP, "not compared: the weights are rounded to int8")
            return [_compared(logits[0], logits[1], max(self.tolerance, _INT8)), tokens]
        return [_compared(logits[0], logits[1], self.tolerance), _same_tokens(*greedy)]


def _recoveries(checkpoint: Checkpoint) -> int:
    """Return how many recoveries a checkpoint's record tells of."""
    record = RunRecord.beside(checkpoint.path)
    return 0 if record is None else sum(stage.name == RECOVER for stage in record.stages)


def _compared(expected: torch.Tensor, found: torch.Tensor, tolerance: float) -> Finding:
    """Return the finding whether two models' logits are within a tolerance, as a share of the largest."""
    if expected.shape != found.shape:
        return Finding("logits", FAIL, f"{list(found.shape)}", f"{list(expected.shape)}")
    scale = float(expected.abs().max())
    worst = float((expected - found).abs().max()) / scale if scale else float(found.abs().max())
    return Finding(
        "logits",
        OK if worst <= tolerance else FAIL,
        f"differ by {worst:.2g} of the largest, in float32",
        f"at most {tolerance:g}",
        {"difference": worst},
    )


def _greedy(model: torch.nn.Module, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the greedy continuation int64[samples, tokens] through the KV cache; no token ends it."""
    cache, new, chosen = None, ids, []
    with torch.no_grad():
        for _ in range(tokens):
            result = model(new, past_key_values=cache, use_cache=True)
            cache, new = result.past_key_values, result.logits[:, -1:].argmax(dim=-1)
            chosen.append(new)
    return torch.cat(chosen, dim=1)


def _same_tokens(expected: torch.Tensor, found: torch.Tensor) -> Finding:
    same = int((expected == found).sum())
    right = same == expected.numel()
    return Finding("greedy tokens", OK if right else FAIL, f"{same} equal", f"{expected.numel()}")
