"""The check of a checkpoint's perplexity, and of its KL to a reference and to the model before pruning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from msp_plugin.checkpoint.checkpoint import Checkpoint
from msp_plugin.checkpoint.load import load
from msp_plugin.data.calibration import CalibrationSet
from msp_plugin.errors import RecipeError, VerificationError
from msp_plugin.models.device import on_best_device
from msp_plugin.passes.losses import mean_kl, perplexity
from msp_plugin.progress import Progress, StepProgress
from msp_plugin.records.run import RunRecord
from msp_plugin.verify.base import FAIL, OK, SKIP, Check, Finding, Subject
from msp_plugin.verify.rounded import rounded_more
from msp_plugin.verify.sliced import is_smaller

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Largest relative difference of one perplexity measured on two machines or with other thread counts.
_SAME_PERPLEXITY = 1e-3
#: The same with weights in int8, against a run's own, and the largest KL that they may cost, in nats per token: about twice
#: as far as SmolLM2-135M was at 62.5 and 75 %, on 512 tokens of the demo's text (0.025 and 0.0046). The demo runs at 75 % were
#: 0.0005 and 0.00015 away.
_INT8_PERPLEXITY, _INT8_KL = 0.05, 0.01
#: Largest relative difference of one perplexity computed in two dtypes: as loose as that of int8, for models deeper than the
#: demo's, whose runs in bfloat16 were at most 0.0009 away from float32 (qwen2 at 50 and 75 %, llama at 50 %).
_OTHER_DTYPE = 0.05
#: Largest KL, in nats per token, between weights in int8 and the same weights rounded to the checkpoint's dtype: about 30 times
#: as far as the demo qwen2 in bfloat16 was, at 50 and 75 % (0.000012 and 0.00003).
_ROUNDED_AGAIN = 1e-3
#: Largest KL, in nats per token, between a smaller model and the one that it was cut from, in float32.
_ROUNDING = 1e-6
#: What to do where a value is not compared with any.
_NO_RECORD = "not compared: run.json has none of this text, give the run's test text"
_NO_BOUND = "no bound: give one with --set quality.max_kl=..."


@dataclass(frozen=True)
class Quality(Check):
    """Perplexity on the text is finite, KL to the reference is 0, KL to the original is not too large.

    With weights in int8, KL to the reference is small. Perplexity is compared with that of run.json, if that is of this text.

    Args:
        dtype: of all models; ``auto`` for each model's own.
        max_kl: the most that pruning may cost, KL(original || checkpoint) in nats per token; by default it is only shown.
    """

    name = "quality"
    needs = ("text",)

    dtype: str = "float32"
    max_kl: float | None = None

    def __post_init__(self) -> None:
        if self.max_kl is not None and not self.max_kl >= 0:
            raise RecipeError(f"quality: max_kl = {self.max_kl}", hint="give nats per token, at least 0")

    def run(self, subject: Subject, progress: StepProgress) -> list[Finding]:
        text = subject.text
        assert text is not None, "the check needs a text"
        model = load(
            subject.checkpoint.path, self.dtype, checksums=False, trust_remote_code=subject.trust_remote_code
        )
        with on_best_device(model):
            value = perplexity(model, text, progress=partial(progress, "perplexity"))
            dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
            rows = [_recorded(subject.checkpoint, text, value, dtype)]
            compare = partial(self._kl, model=model, text=text, remote_code=subject.trust_remote_code)
            if subject.reference is not None:
                kl, other = compare(subject.reference.path, progress=partial(progress, "KL to the reference"))
                if rounded_more(subject.checkpoint, subject.reference):
                    rows.append(_against_exact(kl, other, again=subject.reference.rounded))
                else:
                    smaller = is_smaller(subject.checkpoint, subject.reference)
                    rows.append(_against_reference(kl, other, smaller=smaller, dtype=dtype))
            if subject.original is not None:
                kl, other = compare(subject.original, progress=partial(progress, "KL to the original"))
                rows.append(self._against_original(kl, other, value))
        return rows

    def _kl(
        self,
        source: str | Path,
        *,
        model: PreTrainedModel,
        text: CalibrationSet,
        remote_code: bool,
        progress: Progress,
    ) -> tuple[float, float]:
        """Return (KL(source || model) in nats per token, the source's perplexity)."""
        other = load(source, self.dtype, checksums=False, trust_remote_code=remote_code)
        sizes = [m.config.get_text_config().vocab_size for m in (other, model)]
        if sizes[0] != sizes[1]:
            raise VerificationError(
                f"{source} has a vocabulary of {sizes[0]:,}, the checkpoint one of {sizes[1]:,}",
                hint="give the model that was pruned",
            )
        with on_best_device(other):
            device = next(other.parameters()).device
            if next(model.parameters()).device != device:  # equal models have KL 0 only on the same device
                torch.nn.Module.to(model, device)
            return mean_kl(other, model, text, progress=progress), perplexity(other, text)

    def _against_original(self, kl: float, before: float, value: float) -> Finding:
        good = math.isfinite(kl) and math.isfinite(value) and (self.max_kl is None or kl <= self.max_kl)
        return Finding(
            "original",
            FAIL if not good else SKIP if self.max_kl is None else OK,
            f"KL {kl:.4f} nats per token, perplexity {before:.4f} -> {value:.4f}",
            f"finite; {_NO_BOUND}" if self.max_kl is None else f"KL at most {self.max_kl:g}",
            {"kl": kl, "perplexity": before},
        )


def _against_reference(kl: float, value: float, *, smaller: bool, dtype: str) -> Finding:
    """Return the finding on the KL to the reference; a smaller model's sums are rounded in another order."""
    most = _ROUNDING if smaller else 0.0
    unknown = smaller and dtype != "float32"
    expected = "KL 0: the same weights give the same logits"
    if smaller:
        expected = f"KL at most {most:g} in float32: the sums of fewer terms are rounded in another order"
    return Finding(
        "reference",
        SKIP if unknown else OK if abs(kl) <= most else FAIL,
        f"KL {kl:.3g} nats per token, its perplexity {value:.4f}",
        expected,
        {"kl": kl, "perplexity": value},
    )


def _against_exact(kl: float, value: float, *, again: bool) -> Finding:
    """Return the finding on the KL of rounded weights to a reference whose weights are more exact.

    Args:
        again: the reference's weights are rounded to int8 too, and one of the two is rounded to its dtype besides.
    """
    most, to = (_ROUNDED_AGAIN, "their dtype and int8") if again else (_INT8_KL, "int8")
    return Finding(
        "reference",
        OK if kl <= most else FAIL,
        f"KL {kl:.3g} nats per token, its perplexity {value:.4f}",
        f"KL at most {most:g}: the weights are rounded to {to}",
        {"kl": kl, "perplexity": value},
    )


def _recorded(checkpoint: Checkpoint, text: CalibrationSet, value: float, dtype: str) -> Finding:
    """Return the finding on the perplexity, compared with run.json's if that is of the same text."""
    details = {"perplexity": value, "tokens": text.tokens, "fingerprint": text.fingerprint}
    recorded, measured_in = _perplexity_in_run(checkpoint, text)
    if recorded is None:
        state = SKIP if math.isfinite(value) else FAIL
        return Finding("perplexity", state, f"{value:.4f}", f"finite; {_NO_RECORD}", details)
    most = _INT8_PERPLEXITY if checkpoint.rounded else _SAME_PERPLEXITY
    expected = f"{recorded:.4f} (run.json, same text)"
    if dtype != measured_in:
        most = max(most, _OTHER_DTYPE)
        expected = f"within {100 * most:g} % of {recorded:.4f} in {measured_in} (run.json, same text)"
    near = abs(value - recorded) <= most * recorded
    return Finding("perplexity", OK if near else FAIL, f"{value:.4f}", expected, details)


def _perplexity_in_run(checkpoint: Checkpoint, text: CalibrationSet) -> tuple[float | None, str]:
    """Return (the perplexity in run.json, its dtype); None if there is none of the same text."""
    record = RunRecord.beside(checkpoint.path)
    if record is None or record.test is None or record.test.fingerprint != text.fingerprint:
        return None, ""
    dtype = record.model.dtype
    if dtype == "auto":
        dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return record.result_perplexity, str(dtype)
