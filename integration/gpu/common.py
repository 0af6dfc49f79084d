"""What the sections build on: the run, seeded 2:4 weights and inputs, errors, and graphs of one call."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from msp_plugin.serving import kernels
from msp_plugin.serving.algorithms import TOLERANCE, FoundAlgorithms

#: What two right bfloat16 kernels can differ by.
BF16_TOLERANCE = TOLERANCE[torch.bfloat16]


@dataclass
class Run:
    """The GPU, the time left, and the algorithms found so far."""

    quick: bool
    deadline: float
    device: torch.device
    capability: tuple[int, int]
    found: FoundAlgorithms = field(default_factory=dict)

    def left(self) -> float:
        """Seconds until the script should be done."""
        return self.deadline - time.monotonic()

    def kernels_for(self, shape: tuple[int, int], dtype: torch.dtype) -> list[str]:
        """Return the kernel that ``choose`` gives, and on 8.x, where both run, CUTLASS as well."""
        names = [kernels.choose(shape, dtype, self.device).kernel]
        if self.capability[0] == 8:
            names.append(kernels.choose(shape, dtype, self.device, has_cusparselt=False).kernel)
        return [name for name in dict.fromkeys(names) if name != "dense"]


def masked_24(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight [out, in] with the two smallest of every four in a row set to zero; ties go to the left."""
    size = weight.abs().reshape(-1, 4)
    left, right = size[:, None, :], size[:, :, None]
    earlier = torch.ones(4, 4, dtype=torch.bool, device=weight.device).tril(-1)
    larger = (left > right) | ((left == right) & earlier)  # [groups, 4, 4]: [i, j] says that j goes before i
    return weight.masked_fill((larger.sum(-1, dtype=torch.uint8) >= 2).reshape(weight.shape), 0)


def weight_24(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> torch.Tensor:
    """Return a 2:4 weight [out, in] whose outputs are of size 1; every eighth row is 1:4, and one row is zero."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
    weight = masked_24(weight * (2 / shape[1]) ** 0.5).to(dtype)
    sparser = weight[::8].reshape(-1, 4)
    largest = sparser.abs().amax(-1, keepdim=True)
    weight[::8] = sparser.masked_fill(sparser.abs() < largest, 0).reshape(-1, shape[1])
    weight[shape[0] // 2] = 0
    return weight


def normal(shape: tuple[int, ...], like: torch.Tensor, seed: int) -> torch.Tensor:
    """Return seeded normal values in the dtype and on the device of another tensor."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference relative to the largest expected magnitude; infinite for a NaN."""
    scale = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    error = float((found.float() - expected.float()).abs().max()) / scale
    return error if math.isfinite(error) else math.inf


def all_ok(rows: list[dict]) -> bool:
    """Return whether there are rows and all of them are right."""
    return bool(rows) and all(row["ok"] for row in rows)


def captured(call: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Return a CUDA graph of one call, and the tensor that each replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is set up on first use must not be part of the graph
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def describe(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
