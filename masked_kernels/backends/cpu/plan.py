"""Which kernel serves which problem: pure functions of sizes and of measured bounds."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

Plan = Literal["aligned", "direct", "panels"]

PLANS = Path(__file__).with_name("plans.json")
"""The bounds of each instruction set; ``python -m bench tune`` measures them anew."""

FEW_TOKENS = 32  # a batch that the kernels of few tokens are made for
_LONG_ROW = 1024  # shorter rows spend their time on adding up lanes


@dataclass(frozen=True)
class Bounds:
    """Where the ways to multiply cross over in time, on one instruction set.

    Args:
        aligned_rows: rows that each pattern must serve for *aligned* to win, of few tokens and of
            many; None for never.
        direct_tokens: the most tokens at which *direct* wins: with a prototype and long rows, with
            a prototype and short rows, with a dense weight, whose values are read from memory anew
            for every few tokens, and with a compact one, whose values are put in place anew too.
    """

    aligned_rows: tuple[int | None, int | None] = (None, None)
    direct_tokens: tuple[int, int, int, int] = (0, 0, 0, 0)


class Decision(NamedTuple):
    """A plan and the comparison that led to it."""

    plan: Plan
    why: str


@functools.cache
def bounds_of(isa: str) -> Bounds:
    """The shipped bounds; of an instruction set that nobody measured, those that choose panels."""
    table = json.loads(PLANS.read_text())
    return Bounds(**{name: tuple(bounds) for name, bounds in table.get(isa, {}).items()})


@functools.lru_cache(maxsize=4096)
def linear_decision(
    tokens: int,
    rows: int,
    cols: int,
    period: int,
    dtype: torch.dtype,
    bounds: Bounds,
    compact: bool = False,
) -> Decision:
    """How to multiply ``tokens`` inputs with a weight ``[rows, cols]`` of the given period, or,
    where it is compact, of so many kept values.
    """
    if dtype == torch.float64:
        return Decision("panels", "the other kernels compute in float32")
    few = tokens <= FEW_TOKENS
    patterns = None if compact else row_patterns(cols, period)
    least = bounds.aligned_rows[0 if few else 1]
    if patterns is not None and least is not None and (few or dtype == torch.float32):
        rows_per_pattern = rows // patterns
        if rows_per_pattern >= least:
            return Decision("aligned", f"rows per pattern {rows_per_pattern} ≥ {least}")
    is_dense = compact or 2 * period > rows * cols
    if is_dense and dtype != torch.float32:  # widening the values costs as much as decoding
        return Decision("panels", f"a dense weight in {dtype}")
    if dtype == torch.bfloat16 and not few:  # the library multiplies them faster than float32
        return Decision("panels", f"tokens {tokens} > {FEW_TOKENS} in {dtype}")
    kind = 3 if compact else 2 if is_dense else 0 if cols >= _LONG_ROW else 1
    most = bounds.direct_tokens[kind]
    if tokens <= most:
        return Decision("direct", f"tokens {tokens} ≤ {most}")
    return Decision("panels", f"tokens {tokens} > {most}")


@functools.lru_cache(maxsize=4096)
def linear_plan(
    tokens: int,
    rows: int,
    cols: int,
    period: int,
    dtype: torch.dtype,
    isa: str,
    compact: bool = False,
) -> Plan:
    """The plan of ``linear_decision`` with the bounds of ``isa``."""
    return linear_decision(tokens, rows, cols, period, dtype, bounds_of(isa), compact).plan


def many_pixels(isa: str) -> int:
    """Pixels from which on the library's convolution beats a product of ours that is not aligned.

    Measured: on Zen 3 256 favour the product 1.5 times, 25,088 the convolution 1.2; on Zen 5 49
    favour the product 1.4 times, 784 the convolution 1.3.
    """
    return 384 if isa == "avx512" else 1024


Product = Literal["matrix", "convolution"]
"""The library's ways to a matrix product."""


@functools.lru_cache(maxsize=4096)
def grad_weight_plan(tokens: int, rows: int, cols: int, dtype: torch.dtype, isa: str) -> Product:
    """How to multiply ``[rows, tokens]`` with ``[tokens, cols]``.

    Measured on Zen 5: a convolution is up to twice as fast, unless it has few tokens to make up for
    bringing a large weight's gradient into and out of its own layout. With AVX2 never faster.
    """
    if isa != "avx512" or dtype != torch.float32 or not 0 < rows * cols <= 1 << 22:
        return "matrix"
    return "convolution" if tokens >= (128 if rows * cols <= 1 << 20 else 1024) else "matrix"


@functools.lru_cache(maxsize=4096)
def grad_x_plan(tokens: int, rows: int, cols: int, dtype: torch.dtype, isa: str) -> Product:
    """How to multiply ``[tokens, rows]`` with ``[rows, cols]``, measured likewise."""
    if isa != "avx512" or dtype != torch.float32 or rows * cols == 0:
        return "matrix"
    return "convolution" if tokens >= 64 else "matrix"


@functools.lru_cache(maxsize=4096)
def row_patterns(cols: int, period: int) -> int | None:
    """The number of distinct weight rows if the period divides ``cols`` or is a multiple of it."""
    if cols == 0 or period == 0 or cols % period == 0:
        return 1
    return period // cols if period % cols == 0 else None
