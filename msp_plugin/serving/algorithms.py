"""cuSPARSELt's 2:4 multiplication: one call of it, and the search for its fastest algorithms.

Shape legend: O out_features, I in_features, T tokens.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left

import torch

#: Algorithms that a search found, by device name, dtype, O and I; kept by the caller while it loads layers.
FoundAlgorithms = dict[tuple[str, torch.dtype, int, int], tuple[int, ...]]
#: T must be a multiple of this in both kernels, as in the table of ``kernels.MULTIPLES``: they move 16 bytes,
#: 8 values, at a time.
TOKEN_MULTIPLE = 8
#: An algorithm is searched for each of these token counts and serves the counts up to it, the last one all
#: above too. Decoding lives in the first three, prefill in the last two.
BUCKETS = (16, 64, 256, 1024, 8192)
#: What ``self_check`` may find, relative to the largest output. Rounding to 16 bits once moves a value by at
#: most u of itself: 2**-8 in bfloat16, 2**-11 in float16. Both kernels sum in float32 and round the result,
#: which lets them differ by 2 u; a dense kernel that splits the sum over I may round partial sums as well,
#: for which 2 u more are allowed. A kernel that reads the wrong weights is off by about 1.
#: On a CPU the same, and in float32 what sums of 2**14 products in other orders can differ by: 2**-24 times their
#: square root, 2**-17, with room for four times that.
TOLERANCE = {torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11, torch.float32: 4 * 2**-17}


def fastest_algorithms(packed: torch.Tensor, rows: int, columns: int) -> tuple[int, ...]:
    """Return the fastest algorithm for each bucket; other versions of the library number them otherwise."""
    algorithms, fewest = [], 1
    for most in BUCKETS:
        algorithms.append(_fastest(packed, rows, columns, padded(fewest), most))
        fewest = most + 1
    return tuple(algorithms)


def _fastest(packed: torch.Tensor, rows: int, columns: int, fewest: int, most: int) -> int:
    """Return the fastest algorithm at ``most`` tokens, or the default, 0, if the search or its result fails.

    The search may pair its algorithm with a split of the sum over I, which torch's search does not return;
    the algorithm runs unsplit here. It is tried at both ends of the bucket, with and without a bias, and its
    result is compared with the default's at the lower end.
    """
    try:
        x = random_input(most, columns, packed)
        bias = x.new_zeros(rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the search will move to another name one day
            algorithm = int(torch._cslt_sparse_mm_search(packed, x.t(), transpose_result=True))
        for part in (x, x[:fewest]):
            for added in (None, bias):
                out = cusparselt(part, packed, added, algorithm)
        default = cusparselt(x[:fewest], packed, None, 0)
        # Reading the result waits for the kernels: one that fails has failed by here.
        right = float((out - default).abs().max()) <= TOLERANCE[packed.dtype] * float(default.abs().max())
    except (RuntimeError, AttributeError):  # out of memory too; a torch without the search
        return 0
    return algorithm if right else 0


def cusparselt(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, algorithm: int
) -> torch.Tensor:
    """Return x [T, I], contiguous, T a multiple of ``TOKEN_MULTIPLE``, times the packed weight, as [T, O].

    A bias is one value per row of the packed weight, also where the result comes transposed.
    """
    out: torch.Tensor = torch._cslt_sparse_mm(
        packed, x.t(), bias=bias, transpose_result=True, alg_id=algorithm
    )
    return out


def random_input(tokens: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Return seeded normal values [tokens, columns], in the dtype and on the device of ``like``."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(tokens, columns, generator=generator, dtype=like.dtype, device=like.device)


def padded(tokens: int) -> int:
    """Return the least multiple of ``TOKEN_MULTIPLE`` that holds the tokens."""
    return -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def pad_tokens(x: torch.Tensor) -> torch.Tensor:
    """Return x [T, I] with rows of zeros up to ``padded(T)``; x itself if it has that many."""
    missing = padded(x.shape[0]) - x.shape[0]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def bucket(tokens: int) -> int:
    """Return the index in ``BUCKETS`` of the bucket that serves this many tokens."""
    return min(bisect_left(BUCKETS, tokens), len(BUCKETS) - 1)
