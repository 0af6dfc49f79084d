"""How fast a checkpoint generates on this CPU, and in how much memory, beside its dense form or another checkpoint."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from msp_plugin.checkpoint.load import is_packed, local_directory
from msp_plugin.errors import ModelError, RecipeError
from msp_plugin.records.parts import BENCH_SCHEMA, BENCH_VERSION
from msp_plugin.serving.cpu.linear import PackedLinear
from msp_plugin.serving.load import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_RATIOS = ("bytes", "resident", "prefill", "decode")


@dataclass(frozen=True)
class BenchOptions:
    """What is measured.

    Args:
        dtype: as for ``load``.
        batch: sequences at once.
        prompt: tokens of each sequence that prefill reads.
        tokens: tokens of each sequence that are decoded then.
        repeats: turns of each form; medians count.
    """

    dtype: str = "auto"
    batch: int = 1
    prompt: int = 256
    tokens: int = 32
    repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "tokens", "repeats"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class FormSpeed:
    """One of the two models.

    Args:
        bytes: of all tensors that the model holds.
        resident: bytes by which the process's resident memory grew when it was loaded, all libraries there already; None
            where Linux does not say it.
        prefill: tokens per second of the prompt.
        decode: tokens per second after it.
    """

    bytes: int
    resident: int | None
    prefill: float
    decode: float


@dataclass(frozen=True)
class BenchRecord:
    """The speed of a checkpoint and of what it is held against, on one machine.

    Args:
        model: its directory or hub id.
        against: that of the other one; None for its own dense form.
        kernels: by kernel, how many packed layers it multiplies.
    """

    model: str
    against: str | None
    options: BenchOptions
    kernels: dict[str, int]
    own: FormSpeed
    other: FormSpeed
    machine: dict[str, Any]

    @property
    def ratios(self) -> dict[str, float]:
        """Its own over the other: below 1 is smaller for bytes, above 1 faster for speeds."""
        pairs = {name: (getattr(self.own, name), getattr(self.other, name)) for name in _RATIOS}
        return {name: ours / theirs for name, (ours, theirs) in pairs.items() if ours and theirs}

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON data."""
        head = {"schema": BENCH_SCHEMA, "version": BENCH_VERSION}
        return {**head, **asdict(self), "ratios": self.ratios}


def bench(
    source: str | Path, options: BenchOptions | None = None, *, against: str | Path | None = None
) -> BenchRecord:
    """Return the speed and the memory of a checkpoint beside those of another one, measured in turns.

    Args:
        source: packed, or of any form with ``against``; a packed one runs on its packed weights.
        against: what it is held against, run dense, e.g. the model that a smaller one was cut from; None for the dense
            form of a packed one.

    Raises:
        ModelError: there is no such model, or it is not packed and there is nothing to hold it against.
        FormatError: files are damaged.
        RecipeError: prompt and tokens are more than a model takes.
    """
    options = options or BenchOptions()
    local = local_directory(source, trust_remote_code=False)  # a packed model of the hub is fetched
    packed = local is not None and is_packed(local)
    if against is None and not packed:
        raise ModelError(
            f"{source} is not packed, and has no other form to compare with",
            hint="give --against, e.g. the dense model; or msp export it --to sparse24 or --to bitmask first",
        )
    models: dict[str, PreTrainedModel] = {}
    resident: dict[str, int | None] = {}
    for form in ("own", "own", "other"):  # the first load brings libraries with it
        models.pop(form, None)
        before = _resident()
        if form == "own":
            models[form] = load(local or source, options.dtype, packed=packed)
        else:
            other = local or source if against is None else against
            models[form] = load(other, options.dtype, checksums=against is not None)
        _check_length(models[form], options)
        after = _resident()
        resident[form] = None if before is None or after is None else after - before
    kernels = Counter(m.kernel for m in models["own"].modules() if isinstance(m, PackedLinear))
    times = _measured(models, options)
    count = {"prefill": options.batch * options.prompt, "decode": options.batch * options.tokens}
    forms = {
        form: FormSpeed(
            _held_bytes(model),
            resident[form],
            **{step: count[step] / statistics.median(times[form, step]) for step in count},
        )
        for form, model in models.items()
    }
    machine = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    name = None if against is None else str(against)
    return BenchRecord(str(source), name, options, dict(kernels), forms["own"], forms["other"], machine)


def _check_length(model: PreTrainedModel, options: BenchOptions) -> None:
    """Raise RecipeError if prompt and tokens are more than a model takes."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and options.prompt + options.tokens > most:
        raise RecipeError(
            f"{options.prompt} tokens of prompt and {options.tokens} after it, the model takes {most} at most",
            hint="give a smaller prompt or fewer tokens",
        )


@torch.no_grad()
def _measured(
    models: dict[str, PreTrainedModel], options: BenchOptions
) -> dict[tuple[str, str], list[float]]:
    """Return seconds by (form, step), a turn of each form after the other; the first turns do not count."""
    vocabulary = min(model.config.get_text_config().vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (options.batch, options.prompt), generator=generator)
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(options.repeats + 1):
        for form, model in models.items():
            seconds, out = _timed(partial(model, prompt, use_cache=True, logits_to_keep=1))
            decode, _ = _timed(partial(_decode, model, out, options.tokens))
            if turn:
                times.setdefault((form, "prefill"), []).append(seconds)
                times.setdefault((form, "decode"), []).append(decode)
    return times


def _decode(model: PreTrainedModel, out: Any, tokens: int) -> None:
    """Decode greedily so many tokens after a prompt's output."""
    cache = next(key for key in ("past_key_values", "cache_params") if key in out)  # the latter is Mamba's
    for _ in range(tokens):
        out = model(out.logits[:, -1:].argmax(-1), use_cache=True, **{cache: out[cache]})


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _held_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a model's parameters and buffers; tied ones count once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _resident() -> int | None:
    """Return the process's resident bytes, after what is free was given back; None where Linux does not say it."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not in every C library
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def processor() -> str:
    """Return the name of the CPU."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
