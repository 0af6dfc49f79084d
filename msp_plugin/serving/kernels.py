"""torch's 2:4 matrix kernels, as one operator that compiles and can be captured into CUDA graphs.

``choose`` says which kernel a linear layer gets, ``pack`` brings its weight into the kernel's form once, at
load, and ``linear`` multiplies. Importing this module registers the operator ``msp_plugin::sparse24_linear``
and does nothing else; it needs no GPU.

Shape legend: O out_features, I in_features, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import library

from msp_plugin.errors import FormatError, ServingError
from msp_plugin.serving.algorithms import (
    BUCKETS,
    FoundAlgorithms,
    bucket,
    cusparselt,
    fastest_algorithms,
    pad_tokens,
    random_input,
)

Kernel = Literal["cusparselt", "cutlass", "dense"]  # of a GPU; those of a CPU are in cpu/kernel.py

DTYPES = (torch.float16, torch.bfloat16)
#: O and I must be multiples of these, for weights of 16 bits: the limits that torch's own 2:4 tensors hold
#: weights to (``_DTYPE_SHAPE_CONSTRAINTS`` in torch/sparse/semi_structured.py, a test compares them).
MULTIPLES = {"cusparselt": (16, 16), "cutlass": (32, 64)}


@dataclass(frozen=True)
class Choice:
    """A kernel for a layer, by its name, and why."""

    kernel: str
    reason: str


def choose(
    weight_shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    capability: tuple[int, int] | None = None,
    has_cusparselt: bool | None = None,
) -> Choice:
    """Return the kernel for a weight [O, I]; "dense" wherever no 2:4 kernel can run.

    Args:
        capability: compute capability of the device; asked of torch by default.
        has_cusparselt: whether torch was built with cuSPARSELt; asked of torch by default.
    """
    if device.type != "cuda":
        return Choice("dense", f"no sparse kernel on {device.type}")
    if torch.version.hip is not None:  # torch calls AMD GPUs "cuda" as well
        return Choice("dense", "no sparse kernel on ROCm")
    if dtype not in DTYPES:
        return Choice("dense", f"dtype {dtype}; the sparse kernels take float16 and bfloat16")
    if capability is None:
        capability = torch.cuda.get_device_capability(device)
    if has_cusparselt is None:
        has_cusparselt = torch.backends.cusparselt.is_available()
    shown = ".".join(map(str, capability))
    if capability < (8, 0):
        return Choice("dense", f"compute capability {shown}; 2:4 needs 8.0 or later")
    if not has_cusparselt and capability[0] != 8:
        return Choice(
            "dense",
            "this torch has no cuSPARSELt, and its CUTLASS kernels run on compute capability 8.x, "
            f"not {shown}",
        )
    kernel: Kernel = "cusparselt" if has_cusparselt else "cutlass"
    misfit = _misfit(weight_shape, kernel)
    return Choice("dense", misfit) if misfit else Choice(kernel, f"compute capability {shown}")


def _misfit(shape: tuple[int, ...], kernel: str) -> str | None:
    """Return why a kernel cannot run a weight of this shape, None if it can."""
    if all(size > 0 and size % step == 0 for size, step in zip(shape, MULTIPLES[kernel], strict=True)):
        return None
    own, expected = (" x ".join(map(str, sizes)) for sizes in (shape, MULTIPLES[kernel]))
    return f"weight of {own}; {kernel} takes multiples of {expected}"


@dataclass(frozen=True)
class Packed24:
    """A weight [O, I] in the form of one kernel.

    Args:
        kernel: "cusparselt" or "cutlass".
        packed: cusparselt: the kept weights and the metadata, [O, about 9/16 I]; cutlass: the kept weights
            [O, I / 2].
        meta: cutlass: the metadata, int16 [O, I / 16], in the order that the kernel reads; cusparselt: None.
        algorithms: cusparselt: the algorithm for each of ``BUCKETS``; cutlass: empty.
    """

    kernel: str
    packed: torch.Tensor
    meta: torch.Tensor | None
    out_features: int
    in_features: int
    algorithms: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes of the packed weight with its metadata."""
        return sum(t.numel() * t.element_size() for t in (self.packed, self.meta) if t is not None)


def pack(
    weight: torch.Tensor, kernel: str, *, search: bool = True, found: FoundAlgorithms | None = None
) -> Packed24:
    """Return the weight [O, I] in the form of a kernel. Call it at load: it launches and waits for kernels.

    Args:
        weight: on a CUDA device, float16 or bfloat16, at most two nonzeros in every aligned group of four.
        kernel: the one that ``choose`` gave, not "dense".
        search: look for the fastest algorithms (cusparselt); otherwise the library's default serves all.
        found: algorithms found so far. Layers of one shape are searched once; the search adds its result.

    Raises:
        ServingError: the weight cannot be on this kernel.
        FormatError: the weight is not 2:4.
    """
    _check_weight(weight, kernel)
    # A negative zero is a nonzero to code that looks at bits; a positive one adds the same to a sum.
    clean = weight.detach().masked_fill(weight == 0, 0).contiguous()
    rows, columns = weight.shape
    if kernel == "cutlass":
        from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

        convert = cast(
            Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
            sparse_semi_structured_from_dense_cutlass,
        )
        kept, meta = convert(clean)
        return Packed24(kernel, kept, meta, rows, columns)
    packed = torch._cslt_compress(clean)
    algorithms = (0,) * len(BUCKETS)
    if search:
        found = {} if found is None else found
        key = (torch.cuda.get_device_name(weight.device), weight.dtype, rows, columns)
        if key not in found:
            found[key] = fastest_algorithms(packed, rows, columns)
        algorithms = found[key]
    return Packed24(kernel, packed, None, rows, columns, algorithms)


def _check_weight(weight: torch.Tensor, kernel: str) -> None:
    """Raise unless a kernel can run the weight."""
    if kernel not in MULTIPLES:
        raise ServingError(f"there is no 2:4 kernel {kernel!r}", hint=f"known: {', '.join(MULTIPLES)}")
    if not weight.is_cuda or weight.dtype not in DTYPES or weight.dim() != 2:
        raise ServingError(
            f"a {weight.dtype} weight of shape {list(weight.shape)} on {weight.device} cannot be packed for "
            f"{kernel}",
            hint="expected a float16 or bfloat16 matrix on a CUDA device; elsewhere keep the layer dense",
        )
    if misfit := _misfit(tuple(weight.shape), kernel):
        raise ServingError(misfit, hint="keep the layer dense, as choose() says")
    over = (weight.detach().reshape(-1, 4) != 0).sum(-1, dtype=torch.uint8) > 2
    if bool(over.any()):
        raise FormatError(
            f"the weight is not 2:4: {int(over.sum()):,} of {over.numel():,} groups of four hold more "
            "than two nonzeros",
            hint="keep the layer dense, or prune it to a level that 2:4 holds",
        )


@library.custom_op(
    "msp_plugin::sparse24_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor? meta, Tensor? bias, int out_features, str kernel, "
    "int[] algorithms) -> Tensor",
)
def sparse24_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    meta: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    kernel: str,
    algorithms: list[int],
) -> torch.Tensor:
    """Return x [..., I] times the transposed packed weight plus bias [O]: a new contiguous tensor [..., O].

    The number of tokens is read here and not while a graph is traced, so one traced graph serves every
    number.

    Raises:
        ServingError: a tensor is not on a CUDA device, or dtypes differ.
    """
    _check_call(x, packed, bias, kernel)
    flat = x.reshape(-1, x.shape[-1])
    tokens = flat.shape[0]
    if not tokens:
        return x.new_empty((*x.shape[:-1], out_features))
    flat = pad_tokens(flat.contiguous())
    if kernel == "cusparselt":
        out = cusparselt(flat, packed, bias, algorithms[bucket(tokens)] if algorithms else 0)
        return out[:tokens].view(*x.shape[:-1], out_features)
    assert meta is not None, "CUTLASS reads metadata of its own"
    if bias is None:
        out = torch._sparse_semi_structured_mm(packed, meta, flat.t()).t().contiguous()
    else:
        out = torch._sparse_semi_structured_addmm(bias, packed, meta, flat.t()).t().contiguous()
    return out[:tokens].view(*x.shape[:-1], out_features)


@sparse24_linear.register_fake
def _(
    x: torch.Tensor,
    packed: torch.Tensor,
    meta: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    kernel: str,
    algorithms: list[int],
) -> torch.Tensor:
    """Return an empty tensor [..., O], as a graph is traced with it."""
    return x.new_empty((*x.shape[:-1], out_features))


def _check_call(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, kernel: str) -> None:
    """Raise if dtypes or devices differ: the library does not check that they are the packed weight's."""
    if kernel not in MULTIPLES:
        raise ServingError(f"there is no 2:4 kernel {kernel!r}", hint=f"known: {', '.join(MULTIPLES)}")
    tensors = [t for t in (x, packed, bias) if t is not None]
    if not all(t.is_cuda for t in tensors):
        raise ServingError(
            f"sparse24_linear got tensors on {', '.join(sorted({str(t.device) for t in tensors}))}; "
            "it runs on CUDA",
            hint="where choose() says dense, use torch.nn.functional.linear",
        )
    if len({(t.dtype, t.device) for t in tensors}) > 1:
        raise ServingError(
            "sparse24_linear got " + ", ".join(f"{t.dtype} on {t.device}" for t in tensors),
            hint="input, weight and bias must share dtype and device",
        )


def linear(x: torch.Tensor, packed24: Packed24, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [..., I] times the transposed weight plus bias [O], as [..., O]; no gradients.

    A module that is to be compiled with CUDA graphs does better to hold the packed tensors as buffers or
    parameters and to call ``sparse24_linear``: other tensors are inputs to such a graph, which may copy them
    for each replay.

    Raises:
        ServingError: x has another width than the weight, or ``sparse24_linear`` refuses the tensors.
    """
    p = packed24
    if x.shape[-1] != p.in_features:
        raise ServingError(
            f"an input of width {x.shape[-1]} meets a weight with in_features = {p.in_features}"
        )
    out: torch.Tensor = sparse24_linear(
        x, p.packed, p.meta, bias, p.out_features, p.kernel, list(p.algorithms)
    )
    return out


def self_check(weight: torch.Tensor, packed24: Packed24, bias: torch.Tensor | None = None) -> float:
    """Return how far ``linear`` is from the dense product, relative to the largest dense output.

    The largest error over the fewest tokens of every bucket, so that each algorithm is tried, on seeded
    random inputs [tokens, I]. An output that is not finite counts as infinitely far. ``TOLERANCE`` says how
    much two right kernels can differ.

    Args:
        weight: the dense weight [O, I] that was packed, on the same device.
    """
    weight, worst = weight.detach(), 0.0
    for tokens in (1, *(most + 1 for most in BUCKETS[:-1])):
        x = random_input(tokens, packed24.in_features, weight)
        dense = torch.nn.functional.linear(x, weight, bias).float()
        difference = float((linear(x, packed24, bias).float() - dense).abs().max())
        error = difference / max(float(dense.abs().max()), torch.finfo(torch.float32).tiny)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
