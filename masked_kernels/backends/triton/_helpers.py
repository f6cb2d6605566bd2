"""What the kernel files share: launching, dtypes, values without a modulo, bits in a kernel."""

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, interpreted

_TL_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

WORDS = 512 if interpreted() else 64
"""Words that a program packs. The interpreter takes its time by the program, not by the word."""


def on_device(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels launch on the current device, which may be another than that of the tensors."""
    if not t.is_cuda or t.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


def tl_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of it."""
    return _TL_DTYPES[dtype]


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """What the operands of a product are; sums are float32.

    The interpreter multiplies the bits of bfloat16 as integers, so there they are widened, which
    changes no product.
    """
    if interpreted() and dtype == torch.bfloat16:
        return tl.float32
    return _TL_DTYPES[dtype]


def dot_precision() -> str:
    """How float32 operands are multiplied: as torch is set to."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def wrapped(values: Tensor, count: int, block: int) -> tuple[Tensor, int | None]:
    """Flat values and a period of at least ``block``, so that a row of a tile wraps once at most.

    ``count`` is the number of weights: values that reach to the last weight have no period.
    """
    flat = values.reshape(-1)
    period = flat.numel()
    if period == 0 or period >= count:
        return flat, None
    times = config.cdiv(block, period)
    return flat if times == 1 else flat.repeat(times), times * period


def weight_arguments(
    values: Tensor, words: Tensor, cols: int, block: int
) -> tuple[Tensor, Tensor, int, int, int | None]:
    """A masked weight as kernels take it, in tiles that read up to ``block`` values at a time:
    values, words, cols, words per row, period (None if the values need not be repeated).
    """
    flat, period = wrapped(values, words.shape[0] * cols, block)
    return flat, words.contiguous(), cols, words.shape[1], period


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(t: Tensor) -> int:
    """How many programs occupy the device of ``t``; four stand for a GPU in the interpreter."""
    return 2 * _multiprocessors(t.device) if t.is_cuda else 4


class Split(NamedTuple):
    """A sum in parts of equal length, the last ones shorter."""

    parts: int
    length: int


def split(t: Tensor, tiles: int, total: int, step: int, least: int = 4) -> Split:
    """How to cut sums of ``total`` terms, one for each of some tiles, for the device of ``t``: into
    parts of whole steps, at least ``least``.
    """
    steps = config.cdiv(total, step)
    parts = config.parts(tiles, steps, programs(t), least)
    return Split(parts, config.cdiv(steps, parts) * step)


@triton.jit
def program_tile(cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows [ROWS] and first column of this program's tile. One axis of the grid counts them all, as
    only the first may be long and a weight may be one long row.
    """
    across = tl.cdiv(cols, COLS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    return row, tl.program_id(0) % across * COLS


@triton.jit
def row_starts(rows, col, cols, period):
    """Index of the value at column ``col`` of each row."""
    start = rows.to(tl.int64) * cols + col
    if period is not None:
        start %= period
    return start


@triton.jit
def advanced(starts, step, period):
    """``starts`` moved by a step that is smaller than the period."""
    starts += step
    if period is not None:
        starts = tl.where(starts >= period, starts - period, starts)
    return starts


@triton.jit
def wrapped_index(starts, offset, period):
    """Indices of the values that lie up to a period behind starts [A]; offset is [B]."""
    if period is not None:
        if period.dtype == tl.int32:
            starts = starts.to(tl.int32)
        over = starts[:, None] >= period - offset[None, :]
        index = starts[:, None] - tl.where(over, period, 0) + offset[None, :]
    else:
        index = starts[:, None] + offset[None, :]
    return index


@triton.jit
def load_bits(words, rows, row_ok, first, words_per_row, BLOCK: tl.constexpr):
    """Bits [rows, BLOCK] from word ``first`` of each row on; false past the end of a row."""
    column = first + tl.arange(0, BLOCK // 32)
    word = tl.load(
        words + rows.to(tl.int64)[:, None] * words_per_row + column[None, :],
        mask=row_ok[:, None] & (column < words_per_row)[None, :],
        other=0,
    )  # [rows, BLOCK / 32]
    bits = word[:, :, None] & (1 << tl.arange(0, 32))[None, None, :]
    return tl.reshape(bits, (rows.shape[0], BLOCK)) != 0


@triton.jit
def load_values(values, row_ok, starts, col, cols, period, BLOCK: tl.constexpr):
    """Values [rows, BLOCK] from the starts on; ``col`` is the column they are for."""
    lane = tl.arange(0, BLOCK)
    ok = row_ok[:, None] & (col + lane < cols)[None, :]
    return tl.load(values + wrapped_index(starts, lane, period), mask=ok, other=0.0)


@triton.jit
def load_weight(weight, rows, row_ok, starts, col, BLOCK: tl.constexpr):
    """Masked weights [rows, BLOCK] of the columns from ``col`` on, a multiple of 32."""
    values, words, cols, words_per_row, period = weight
    bits = load_bits(words, rows, row_ok, col // 32, words_per_row, BLOCK)
    return tl.where(bits, load_values(values, row_ok, starts, col, cols, period, BLOCK), 0.0)


@triton.jit
def store_tile(out, tile, rows, cols, row, first, BLOCK: tl.constexpr):
    """A tile [row, BLOCK] of a contiguous ``[rows, cols]`` from column ``first`` on."""
    col = first + tl.arange(0, BLOCK)
    at = out + row.to(tl.int64)[:, None] * cols + col[None, :]
    ok = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(at, tile.to(out.dtype.element_ty), mask=ok)


@triton.jit
def add_product(acc, left, right, PRECISION: tl.constexpr):
    """``acc + left @ right``. Exact products of float32 are summed step by step: one chain of
    additions over all steps would round more than the sums of a library do.
    """
    if left.dtype == tl.float32 and PRECISION == "ieee":
        # The bound on inexact sums keeps the compiler from making it one chain; it means FP8.
        step = tl.dot(left, right, input_precision=PRECISION, max_num_imprecise_acc=32)
        acc += step
    else:
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def pack_bits(bits):
    """Words [A] of bits [A, 32]."""
    return tl.sum(bits.to(tl.int32) << tl.arange(0, 32)[None, :], axis=1)


@triton.jit
def population(word):
    """int32 number of set bits."""
    word = word.to(tl.uint32, bitcast=True)
    # Sums of 2, then 4, then 8 neighbouring bits, side by side in the word.
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def word_elements(first, rows, cols, words_per_row, BLOCK: tl.constexpr):
    """Of BLOCK consecutive words in flat order: row [BLOCK], column [BLOCK, 32], and whether the
    matrix has that element.
    """
    word = first + tl.arange(0, BLOCK)
    row = word // words_per_row
    column = (word % words_per_row)[:, None] * 32 + tl.arange(0, 32)[None, :]
    return row, column, (row < rows)[:, None] & (column < cols)


@triton.jit
def gelu(x):
    distance = _from_zero(x)
    return tl.maximum(x, 0.0) - distance * _normal_tail(distance)


@triton.jit
def normal_cdf(x):
    """Probability that a standard normal variable is below x."""
    tail = _normal_tail(_from_zero(x))
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def _from_zero(x):
    """|x|, no further than where the tail is nothing in float32: infinity times 0 would be NaN."""
    return tl.minimum(tl.abs(x), 10.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _normal_tail(distance):
    """Probability that a standard normal variable is above ``distance``, of 0 to 10.

    Its logarithm to base 2 is near a parabola: the polynomial was fitted for the least greatest
    error of the probability and of its product with the distance, 1.5e-8. That is a quarter of the
    rounding of ``erf`` in float32, which takes three times the instructions.
    """
    log = -2.334948931e-6 * distance + 3.373781510e-5
    log = log * distance - 1.612938358e-4
    log = log * distance - 1.917035552e-4
    log = log * distance + 7.126864977e-3
    log = log * distance - 5.253361166e-2
    log = log * distance - 4.591982961e-1
    log = log * distance - 1.151106000
    return tl.exp2(log * distance - 1.0)
