"""compact_linear: a dense weight as its bits and the values that they keep, which alone are read.

A value lies behind as many others as there are set bits before its own: before its row and part of
the columns by a first pass over the bits, before its word and within it by counting on the way.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import config, interpreted
from ._helpers import (
    add_product,
    dot_dtype,
    dot_precision,
    on_device,
    population,
    split,
    store_tile,
)
from .bits import popcount, popcount_of_parts
from .output import Output, finished
from .settings import settings_of

_ROWS, _WORDS = 16, 64  # per program of the pass that writes the weight out
_STEP = tl.constexpr(128)  # columns of one step of it


def compact_linear(
    x: Tensor, kept: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    check_count(kept, words)
    return multiplied(x, kept.contiguous(), words.contiguous(), bias, scale)


def multiplied(
    x: Tensor, kept: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    """``compact_linear`` of as many values as set bits."""
    (tokens, cols), rows = x.shape, words.shape[0]
    y = x.new_empty((tokens, rows))
    if y.numel() == 0:
        return y
    output = Output(bias, scale)
    if config.linear_plan(tokens, rows, cols, 0, x.dtype, False, settings_of(x)) == "library":
        weight = _expanded(kept, words, cols)
        return F.linear(x, weight if scale is None else weight.mul_(scale), bias)
    tile = config.linear_tile(tokens, rows, x.dtype, settings_of(x))
    tiles = config.cdiv(rows, tile.rows) * config.cdiv(tokens, tile.tokens)
    parts, length = split(x, tiles, cols, tile.depth)
    sums = y if parts == 1 else y.new_empty((parts, tokens, rows), dtype=torch.float32)
    with on_device(x):
        _compact_linear_kernel[(tiles, parts)](
            x,
            (kept, words, _starts(words, parts, length // 32), cols, words.shape[1]),
            output.arguments(),
            sums,
            tokens,
            rows,
            length,
            x.stride(),
            dot_dtype(x.dtype),
            dot_precision(),
            parts == 1,
            tile.rows,
            tile.tokens,
            tile.depth,
            *_options(kept),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if parts > 1:
            output.finish(y, sums)
    return y


def check_count(kept: Tensor, words: Tensor) -> None:
    """Raise ``ValueError`` unless there are as many values as set bits. It waits for the device, so
    it does nothing while a CUDA graph is captured; the call before that has checked.
    """
    if words.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if kept.numel() != (count := int(popcount(words).sum())):
        raise ValueError(f"kept: got {kept.numel()} values, expected {count}, as many as set bits")


def _options(kept: Tensor) -> tuple[bool, bool]:
    """Whether an index of the kept values may need 64 bits, whether to count in assembly."""
    return config.is_wide(kept.numel()), not interpreted() and torch.version.hip is None


def _starts(words: Tensor, parts: int, words_per_part: int) -> Tensor:
    """int64 ``[rows, parts]``, where the kept values of each part begin."""
    counts = popcount_of_parts(words, parts, words_per_part)
    return (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)


def _expanded(kept: Tensor, words: Tensor, cols: int) -> Tensor:
    """The weight ``[rows, cols]``, 0 where it is masked."""
    rows, words_per_row = words.shape
    weight = kept.new_empty((rows, cols))
    parts = config.cdiv(words_per_row, _WORDS)
    with on_device(words):
        _expand_kernel[(config.cdiv(rows, _ROWS), parts)](
            (kept, words, _starts(words, parts, _WORDS), cols, words_per_row),
            weight,
            rows,
            _ROWS,
            _WORDS,
            *_options(kept),
        )
    return weight


@triton.jit
def _set_bits(word, ASM: tl.constexpr):
    if ASM:
        count = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], tl.int32, True, 1)
    else:
        count = population(word)
    return count


@triton.jit
def _load_start(weight, row, row_ok, WIDE: tl.constexpr):
    """Where the kept values of this program's part of the rows begin, in 32 bits unless WIDE."""
    at = weight[2] + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    start = tl.load(at, mask=row_ok, other=0)
    return start if WIDE else start.to(tl.int32)


@triton.jit
def _load_kept(weight, row, row_ok, start, col, end, DEPTH: tl.constexpr, ASM: tl.constexpr):
    """Masked weights [row, DEPTH] of the columns from ``col`` on, and where those behind start."""
    kept, words, _starts, _cols, words_per_row = weight
    column, bit = col // 32 + tl.arange(0, DEPTH // 32), tl.arange(0, 32)
    word = tl.load(
        words + row.to(tl.int64)[:, None] * words_per_row + column[None, :],
        mask=row_ok[:, None] & (column * 32 < end)[None, :],
        other=0,
    )  # [row, DEPTH / 32]
    count = _set_bits(word, ASM)
    before = tl.cumsum(count, axis=1) - count
    below = word[:, :, None] & ((1 << bit) - 1)[None, None, :]
    place = start[:, None, None] + (before[:, :, None] + _set_bits(below, ASM))
    keep = (word[:, :, None] & (1 << bit)[None, None, :]) != 0
    value = tl.load(kept + place, mask=keep, other=0.0)
    return tl.reshape(value, (row.shape[0], DEPTH)), start + tl.sum(count, axis=1)


@triton.jit
def _expand_kernel(
    weight,
    expanded,
    rows,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    WIDE: tl.constexpr,
    ASM: tl.constexpr,
):
    cols = weight[3]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = _load_start(weight, row, row < rows, WIDE)
    first = tl.program_id(1) * WORDS * 32
    for col in range(first, tl.minimum(first + WORDS * 32, cols), _STEP):
        tile, start = _load_kept(weight, row, row < rows, start, col, cols, _STEP, ASM)
        store_tile(expanded, tile, rows, cols, row, col, _STEP)


@triton.jit
def _compact_linear_kernel(
    x,
    weight,
    output,
    y,
    tokens,
    rows,
    cols_per_part,
    stride,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    FINISH: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
    ASM: tl.constexpr,
):
    """One tile of y, or of its sums over one part of the columns."""
    down = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % down * ROWS + tl.arange(0, ROWS)
    token = (tl.program_id(0) // down * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    lane = tl.arange(0, DEPTH)
    begin = tl.program_id(1) * cols_per_part
    end = tl.minimum(begin + cols_per_part, weight[3])
    start = _load_start(weight, row, row < rows, WIDE)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for col in range(begin, end, DEPTH):
        w, start = _load_kept(weight, row, row < rows, start, col, end, DEPTH, ASM)
        at = x + token[:, None] * stride[0] + (col + lane).to(tl.int64)[None, :] * stride[1]
        inside = (token < tokens)[:, None] & (col + lane < end)[None, :]
        tile = tl.load(at, mask=inside, other=0.0)  # [TOKENS, DEPTH]
        acc = add_product(acc, w.to(DOT), tl.trans(tile.to(DOT)), PRECISION)
    ok = (token < tokens)[:, None] & (row < rows)[None, :]
    if FINISH:
        acc = finished(acc, output, row, row < rows, rows, "identity", 0)
    else:
        token += tl.program_id(1).to(tl.int64) * tokens
    tl.store(
        y + token[:, None] * rows + row[None, :], tl.trans(acc).to(y.dtype.element_ty), mask=ok
    )
