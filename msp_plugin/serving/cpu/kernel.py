"""Packed weights on a CPU: which kernel a weight gets, the product with it, and the check against the dense product.

Shape legend: O out_features, I in_features, N kept values, T tokens.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from msp_plugin.errors import FormatError, ServingError
from msp_plugin.serving.algorithms import TOLERANCE, random_input
from msp_plugin.serving.cpu.build import load_operator
from msp_plugin.serving.kernels import Choice

#: From the fastest to the slowest. Each needs what its name says; avx512_bf16 also VBMI and VBMI2, amx_bf16 all of that too,
#: portable nothing.
KERNELS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "portable")
#: The fastest that knows each dtype as it is.
_FIRST = {torch.bfloat16: "amx_bf16", torch.float16: "avx512_bf16", torch.float32: "avx512"}
#: Environment variable: one of KERNELS, or ``dense``, in the place of the choice.
FORCE = "MSP_CPU_KERNEL"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Token counts of the self-check: straight from packed weights, few and many tokens on unpacked tiles.
_CHECKED_TOKENS = (1, 4, 7, 65)
_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


@dataclass(frozen=True)
class PackedWeight:
    """A weight [O, I] as kept values and a bitmask.

    Args:
        values: the kept weights row by row, N of them in any shape, in one of DTYPES, or int8 with a scale.
        bitmask: uint8 [O, ceil(I / 8)], lowest bit first, zero beyond column I.
        row_offsets: int64 [O], the place of each row's first value.
        in_features: I.
        scale: [O], by which the values int8 of each row are multiplied; None for other values.
    """

    values: torch.Tensor
    bitmask: torch.Tensor
    row_offsets: torch.Tensor
    in_features: int
    scale: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        """O."""
        return self.row_offsets.numel()

    @property
    def bytes(self) -> int:
        """Bytes of values, bitmask, row offsets and scale."""
        held = (self.values, self.bitmask, self.row_offsets, self.scale)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


def pack_dense(weight: torch.Tensor) -> PackedWeight:
    """Return a weight [O, I] with the values kept whose bits are not all zero, so that negative zeros come back."""
    weight = weight.detach().contiguous()
    kept = (weight != 0) | torch.signbit(weight)
    counts = kept.sum(1)
    bits = np.packbits(kept.numpy(), axis=1, bitorder="little")
    return PackedWeight(weight[kept], torch.from_numpy(bits), _starts(counts), weight.shape[1])


def pays(weight: torch.Tensor) -> bool:
    """Return True if a weight [O, I] takes fewer bytes packed than dense."""
    rows, columns = weight.shape
    packed = int(torch.count_nonzero(weight)) * weight.element_size() + rows * (-(-columns // 8) + 8)
    return packed < weight.nbytes


def equal_rows(values: torch.Tensor, bitmask: torch.Tensor, in_features: int) -> PackedWeight:
    """Return the weight whose rows keep equally many values [O, n], as ``sparse-24-bitmask`` stores them."""
    rows, kept = values.shape
    return PackedWeight(values, bitmask, torch.arange(rows) * kept, in_features)


def _starts(counts: torch.Tensor) -> torch.Tensor:
    """Return int64 [O], the sum of the counts of the rows before each."""
    return counts.cumsum(0) - counts


def check_structure(weight: PackedWeight, name: str) -> None:
    """Raise unless bitmask, row offsets and values of a weight agree, so that each product reads what was packed.

    Raises:
        FormatError: they contradict each other.
    """
    rows, columns = weight.out_features, weight.in_features
    expected = (rows, -(-columns // 8))
    if tuple(weight.bitmask.shape) != expected or weight.bitmask.dtype != torch.uint8:
        raise FormatError(
            f"{name}: a {weight.bitmask.dtype} bitmask {list(weight.bitmask.shape)} does not belong to a weight "
            f"[{rows}, {columns}]",
            hint=f"expected uint8 {list(expected)}; the file is damaged: export or download it anew",
        )
    bits = weight.bitmask.numpy()
    counts = torch.from_numpy(_ONES[bits].sum(axis=1, dtype=np.int64))
    beyond = columns % 8 and int((bits[:, -1] >> columns % 8).max(initial=0))
    wrong = torch.nonzero(weight.row_offsets != _starts(counts))
    if beyond or len(wrong) or int(counts.sum()) != weight.values.numel():
        found = (
            "the bitmask has ones beyond the last column"
            if beyond
            else (
                f"row {int(wrong[0])} starts at {int(weight.row_offsets[wrong[0]])}, the bitmask has "
                f"{int(_starts(counts)[wrong[0]])} ones before it"
                if len(wrong)
                else f"the bitmask has {int(counts.sum()):,} ones, there are {weight.values.numel():,} values"
            )
        )
        raise FormatError(f"{name}: {found}", hint="the file is damaged: export or download it anew")


def forced_kernel() -> str:
    """Return the kernel that MSP_CPU_KERNEL names; empty where it names none.

    Raises:
        ServingError: it names no kernel.
    """
    forced = os.environ.get(FORCE, "")
    if forced and forced not in (*KERNELS, "dense"):
        raise ServingError(f"{FORCE} is {forced!r}", hint=f"expected one of {', '.join((*KERNELS, 'dense'))}")
    return forced


def choose(dtype: torch.dtype) -> Choice:
    """Return the kernel for packed weights of a dtype on this CPU, and why; "dense" where there is none.

    The first call builds the kernels. The portable form is chosen only where it is measured faster than the
    dense product.

    Raises:
        ServingError: MSP_CPU_KERNEL names no kernel.
    """
    forced = forced_kernel()
    if forced == "dense":
        return Choice("dense", f"{FORCE} says so")
    if dtype not in DTYPES:
        return Choice("dense", f"dtype {dtype}; the CPU kernels take bfloat16, float16 and float32")
    missing = load_operator()
    if missing is not None:
        return Choice("dense", missing)
    if forced:
        if torch.ops.msp_plugin.cpu_supports(forced):
            runs = max(forced, _FIRST[dtype], key=KERNELS.index)
            why = "says so" if runs == forced else f"is {forced}, which is {runs} in {dtype}"
            return Choice(runs, f"{FORCE} {why}")
        return Choice("dense", f"{FORCE} is {forced}, which this CPU does not run")
    kernel = next(k for k in KERNELS[KERNELS.index(_FIRST[dtype]) :] if torch.ops.msp_plugin.cpu_supports(k))
    if kernel != "portable":
        return Choice(kernel, "the CPU has it")
    ratio = _portable_ratio(dtype)
    if ratio > 1:
        return Choice(kernel, f"no AVX2; {ratio:.2f} times as fast as dense")
    return Choice("dense", f"no AVX2, and the portable kernel has {ratio:.2f} of dense speed")


@functools.cache
def _portable_ratio(dtype: torch.dtype) -> float:
    """Return the dense time over the portable one for a 2:4 weight [1024, 1024] and one token."""
    weight = torch.ones(1024, 1024, dtype=dtype)
    weight.view(-1, 4)[:, 2:] = 0
    packed, x = pack_dense(weight), torch.ones(1, 1024, dtype=dtype)
    dense = _fastest(lambda: torch.nn.functional.linear(x, weight))
    return dense / _fastest(lambda: linear(x, packed, "portable"))


def _fastest(call: Callable[[], object], repeats: int = 5) -> float:
    """Return the least seconds of a call, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def linear(
    x: torch.Tensor, weight: PackedWeight, kernel: str, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x [..., I] times the transposed weight plus bias [O], as [..., O]; no gradients."""
    out: torch.Tensor = torch.ops.msp_plugin.bitmask_linear(
        x,
        weight.values,
        weight.bitmask,
        weight.row_offsets,
        weight.scale,
        bias,
        weight.in_features,
        kernel,
    )
    return out


def self_check(weight: torch.Tensor, packed: PackedWeight, kernel: str) -> float:
    """Return how far ``linear`` is from the dense product, relative to the largest dense output.

    Seeded random inputs of several token counts. Where both are NaN or the same infinity they agree; any other
    output that is not finite counts as infinitely far. ``TOLERANCE`` says how much two right kernels can differ.

    Args:
        weight: the dense weight [O, I] that was packed.
    """
    worst = 0.0
    for tokens in _CHECKED_TOKENS:
        x = random_input(tokens, packed.in_features, weight)
        with torch.autocast("cpu", enabled=False):  # the caller's would round one of the two
            dense = torch.nn.functional.linear(x, weight).float()
            sparse = linear(x, packed, kernel).float()
        same = (dense == sparse) | (dense.isnan() & sparse.isnan())
        difference = float((sparse - dense).abs().masked_fill(same, 0).max())
        finite = dense[dense.isfinite()].abs()
        largest = float(finite.max()) if finite.numel() else 0.0
        error = difference / max(largest, torch.finfo(torch.float32).tiny)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def checked_choice(weight: torch.Tensor, packed: PackedWeight) -> Choice:
    """Return the kernel for a packed weight if it passes the self-check, "dense" and why if it does not.

    Args:
        weight: the same weight [O, I] dense, in the dtype of the inputs.
    """
    choice = choose(weight.dtype)
    if choice.kernel == "dense":
        return choice
    try:
        error = self_check(weight, packed, choice.kernel)
    except RuntimeError as failure:
        return Choice("dense", f"{choice.kernel} failed: {str(failure).splitlines()[0]}")
    if error > TOLERANCE[weight.dtype]:
        return Choice("dense", f"{choice.kernel} was wrong by {error:.2g}")
    return choice
