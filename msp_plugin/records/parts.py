"""Parts that several records share."""

from __future__ import annotations

from msp_plugin.records.base import Part

#: (forward tokens, loss) or (predicted, measured).
Point = tuple[int | float | None, float | None]


class ModelRecord(Part):
    """A model."""

    source: str | None = None
    """The absolute path of its directory, its name on the hub, or `demo:` and the name of an embedded model."""
    architecture: str | None = None
    """The class of transformers."""
    dtype: str | None = None
    """The dtype in which it was loaded; `auto` means the dtype of its files. After `msp recover`, that of both models."""
    fingerprint: str | None = None
    """Digest of the weights."""


class ReadingRecord(Part):
    """The part of a text that was read from one source."""

    source: str | None = None
    """The file, data set or demo text."""
    samples: int | None = None
    """Samples that came from it."""
    columns: tuple[str, ...] = ()
    """The columns of a table that held the text."""
    rows: int | None = None
    """Documents, or rows of a table, that were read."""
    skipped: int | None = None
    """How many of these rows were null or empty."""
    bos: str | None = None
    """Tokens that each sample starts with, as the tokenizer writes them."""


class TextRecord(Part):
    """Samples of text."""

    source: str | None = None
    """Where they came from, as the user named it; `[2:]` means those from the third on."""
    samples: int | None = None
    """How many there are."""
    length: int | None = None
    """Requested tokens per sample."""
    tokens: int | None = None
    """Tokens of all samples."""
    seed: int | None = None
    """Seed that chose the samples."""
    fingerprint: str | None = None
    """Digest of the token ids."""
    sources: tuple[ReadingRecord, ...] = ()
    """What was read of each source; empty if these samples are a part of another text."""


class SearchRecord(Part):
    """The cost of an allocation, and the losses that its search measured."""

    allocator: str | None = None
    """The allocator's name; null if the allocation was given, or found without measuring the model."""
    ended: str | None = None
    """Why the search stopped where it did."""
    forward_tokens: int | float | None = None
    """Tokens that went through the model to measure candidates; a backward pass counts as two forward passes."""
    sensitivity_tokens: int | float | None = None
    """Tokens that went through the model to measure the sensitivities that the allocator reads."""
    evaluations: int | None = None
    """Candidates that were measured."""
    seconds: float | None = None
    """Duration of the search alone; losses that it read from the cache count with the time that they once took."""
    total_seconds: float | None = None
    """Duration including the sensitivities and the level database, unless they were in the cache."""
    loss: float | None = None
    """Loss of the allocation on the search text, nats per token."""
    uniform_loss: float | None = None
    """Loss of the uniform allocation on the search text, nats per token."""
    curve: tuple[Point, ...] = ()
    """[forward tokens, lowest loss so far], a point for each improvement."""
    holdout: tuple[Point, ...] = ()
    """[forward tokens, loss of the incumbent on the hold-out text], a point for each measurement."""
    predictions: tuple[Point, ...] = ()
    """[predicted, measured] change of the loss by each proposal, nats per token."""
    notes: tuple[str, ...] = ()
    """Remarks of the allocator for a reader of the result."""


#: What ``msp bench`` writes. A report shows it where it lies beside a run's records.
BENCH_FILE, BENCH_SCHEMA, BENCH_VERSION = "bench.json", "msp_plugin/bench", 2


class SpeedRecord(Part):
    """One measurement of speed. No run writes any; the report shows those that you add, and those of bench.json."""

    name: str
    """What was measured."""
    value: float | None = None
    """The number."""
    unit: str = ""
    """Its unit, such as `tokens/s`."""
    source: str = ""
    """The script that measured it."""


class QualityRecord(Part):
    """The quality of a model on the test text."""

    perplexity: float | None = None
    """Perplexity."""
    kl: float | None = None
    """KL divergence from the dense model, nats per token."""
