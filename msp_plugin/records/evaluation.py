"""eval.json: the perplexity of a checkpoint, and its scores on lm-eval's tasks."""

from __future__ import annotations

from typing import ClassVar

from msp_plugin.records.base import Part, Record
from msp_plugin.records.parts import ModelRecord, ReadingRecord


class TextScore(Part):
    """The perplexity on one text."""

    source: str | None = None
    """The text, as the user named it."""
    samples: int | None = None
    """Samples of it."""
    length: int | None = None
    """Tokens of the first sample."""
    tokens: int | None = None
    """Tokens of all samples."""
    fingerprint: str | None = None
    """Digest of the token ids."""
    read: ReadingRecord | None = None
    """What was read of the source."""
    value: float | None = None
    """Perplexity of the model."""
    reference: float | None = None
    """Perplexity of the reference; null without one."""
    kl: float | None = None
    """KL(reference || model), nats per token; null without a reference."""


class MetricScore(Part):
    """One number of a task. Without a reference, the keys that compare with it are null."""

    name: str
    """The metric, as lm-eval calls it."""
    filter: str = "none"
    """lm-eval's filter of the answers."""
    value: float | None = None
    """The model's number."""
    stderr: float | None = None
    """Its standard error."""
    higher_is_better: bool | None = None
    """True if more is better; null if lm-eval does not say."""
    reference: float | None = None
    """The reference's number."""
    reference_stderr: float | None = None
    """Its standard error."""
    difference: float | None = None
    """`value` - `reference`."""
    difference_stderr: float | None = None
    """Standard error of the difference."""
    paired: bool | None = None
    """True if `difference_stderr` comes from the differences by document, false if it assumes independent numbers."""


class TaskScore(Part):
    """A task; or a group of tasks, of which lm-eval does not give every key."""

    version: int | float | str | None = None
    """The task's version."""
    num_fewshot: int | str | None = None
    """Worked examples in a prompt."""
    samples: int | None = None
    """Documents of the task that were used."""
    available: int | None = None
    """Documents that the task has."""
    fingerprint: str | None = None
    """Digest of the prompts and targets."""
    metrics: tuple[MetricScore, ...] = ()
    """The metrics."""


class HarnessRecord(Part):
    """The options of the call of lm-eval."""

    names: tuple[str, ...] = ()
    """Tasks and groups that were requested."""
    limit: int | None = None
    """Documents of each task; null for all."""
    num_fewshot: int | None = None
    """Worked examples in a prompt; null for each task's own number."""
    batch: int | None = None
    """Requests in a forward pass."""
    seeds: dict[str, int] = {}
    """lm-eval's seeds by name."""
    bootstrap: int | None = None
    """Bootstrap resamples for a standard error."""


class EvalRecord(Record):
    """An evaluation. It holds no times, so that equal requests give equal files."""

    FILE: ClassVar[str] = "eval.json"
    TITLE: ClassVar[str] = "record of an evaluation"
    SCHEMA: ClassVar[str] = "msp_plugin/eval"

    model: ModelRecord = ModelRecord()
    """The model."""
    reference: ModelRecord | None = None
    """A model that got the same tasks and texts; null without one."""
    perplexity: tuple[TextScore, ...] = ()
    """Perplexity and KL divergence on each text."""
    tasks: dict[str, TaskScore] = {}
    """Scores by task."""
    harness: HarnessRecord | None = None
    """The call of lm-eval; null without tasks."""
    versions: dict[str, str] = {}
    """Versions of Python and of the packages that ran."""
