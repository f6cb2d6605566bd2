"""Which kernel serves which problem: pure functions of sizes."""

import functools
from typing import Literal

import torch

_ROWS_PER_PATTERN = 16  # one block of aligned_linear
_ROWS_PER_PATTERN_OF_MANY_TOKENS = 256  # so that tables pay against the library's product
_MOST_PHASED_TOKENS = 2  # with more, the multiply-adds hide what loading the values costs
_LEAST_PHASED_COLS = 512  # so that 16 ways to move x are a small part


@functools.lru_cache(maxsize=4096)
def linear_plan(
    tokens: int, rows: int, cols: int, period: int, dtype: torch.dtype, isa: str
) -> Literal["aligned", "phased", "direct", "panels"]:
    """How to multiply ``tokens`` inputs with a weight ``[rows, cols]`` of the given period.

    The bounds are where the ways cross over in time on a 2-core AVX-512 machine.
    """
    if dtype == torch.float64 or isa == "scalar":
        return "panels"
    if isa == "avx512" and (dtype == torch.float32 or tokens <= 32):
        patterns = row_patterns(cols, period)
        least = _ROWS_PER_PATTERN if tokens <= 32 else _ROWS_PER_PATTERN_OF_MANY_TOKENS
        if patterns is not None and rows >= least * patterns:
            return "aligned"
        if (
            tokens <= _MOST_PHASED_TOKENS
            and cols >= _LEAST_PHASED_COLS
            and 2 * period <= rows * cols
        ):
            return "phased"
    if 2 * period > rows * cols:  # the values are read from memory anew for every few tokens
        most = 8 if dtype == torch.float32 else 0  # and widening them costs as much as decoding
    elif isa == "avx2":
        most = 8
    else:
        most = 128 if cols >= 1024 else 32  # short rows spend their time on adding up lanes
    return "direct" if tokens <= most else "panels"


@functools.lru_cache(maxsize=4096)
def row_patterns(cols: int, period: int) -> int | None:
    """The number of distinct weight rows if the period divides ``cols`` or is a multiple of it."""
    if cols == 0 or period == 0 or cols % period == 0:
        return 1
    return period // cols if period % cols == 0 else None
