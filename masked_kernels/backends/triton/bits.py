"""pack, unpack, popcount, transpose, decode: one pass over the bits each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import words_per_row
from . import config
from ._helpers import (
    WORDS,
    load_bits,
    load_weight,
    on_device,
    pack_bits,
    population,
    program_tile,
    row_starts,
    store_tile,
    weight_arguments,
    word_elements,
    wrapped,
)

_ROWS, _COLS = 16, 128  # per program of unpack and popcount


def pack(mask: Tensor) -> Tensor:
    rows, cols = mask.shape
    words = mask.new_empty((rows, words_per_row(cols)), dtype=torch.int32)
    if words.numel():
        with on_device(mask):
            _pack_kernel[(config.cdiv(words.numel(), WORDS),)](
                mask.view(torch.uint8), words, rows, cols, words.shape[1], *mask.stride(), WORDS
            )
    return words


def unpack(words: Tensor, cols: int) -> Tensor:
    rows = words.shape[0]
    mask = words.new_empty((rows, cols), dtype=torch.bool)
    if mask.numel():
        words = words.contiguous()
        with on_device(words):
            _unpack_kernel[(config.cdiv(rows, _ROWS) * config.cdiv(cols, _COLS),)](
                words, mask.view(torch.uint8), rows, cols, words.shape[1], _ROWS, _COLS
            )
    return mask


def popcount(words: Tensor) -> Tensor:
    return popcount_of_parts(words, 1, words.shape[1]).view(-1)


def popcount_of_parts(words: Tensor, parts: int, words_per_part: int) -> Tensor:
    """int64 ``[rows, parts]``, set bits of each part of each row."""
    rows, words_per_row = words.shape
    counts = words.new_empty((rows, parts), dtype=torch.int64)
    if counts.numel():
        words = words.contiguous()
        with on_device(words):
            _popcount_kernel[(config.cdiv(rows, _ROWS), parts)](
                words, counts, rows, words_per_row, words_per_part, _ROWS, _COLS
            )
    return counts


def transpose(words: Tensor, cols: int) -> Tensor:
    rows = words.shape[0]
    transposed = words.new_empty((cols, words_per_row(rows)))
    if transposed.numel():
        words = words.contiguous()
        with on_device(words):
            _transpose_kernel[(transposed.shape[1] * words.shape[1],)](
                words, transposed, rows, cols, words.shape[1], transposed.shape[1]
            )
    return transposed


def decode(values: Tensor, words: Tensor, cols: int) -> Tensor:
    rows = words.shape[0]
    weight = values.new_empty((rows, cols))
    if weight.numel():
        tile = config.decode_tile(cols)
        aligned = cols % tile.cols == 0 and values.numel() % tile.cols == 0
        with on_device(words):
            _decode_kernel[(config.cdiv(rows, tile.rows) * config.cdiv(cols, tile.cols),)](
                weight_arguments(values, words, cols, tile.cols), weight, rows, aligned, *tile
            )
    return weight


def decoded(values: Tensor, words: Tensor, cols: int, scale: Tensor | None) -> Tensor:
    """``scale * (w ⊙ m)``"""
    weight = decode(values, words, cols)
    return weight if scale is None else weight.mul_(scale)


def decoded_channels_last(
    values: Tensor, words: Tensor, scale: Tensor | None, channels: int, kernel: tuple[int, int]
) -> Tensor:
    """``scale * (w ⊙ m)`` as filters ``[rows, channels, kh, kw]`` in that memory format."""
    rows, positions = words.shape[0], kernel[0] * kernel[1]
    weight = values.new_empty((rows, *kernel, channels))
    if weight.numel():
        tile = config.decode_channels_last_tile(channels * positions)
        flat, period = wrapped(values, weight.numel(), 2)  # Triton takes a period of 1 as known
        with on_device(words):
            _decode_channels_last_kernel[
                (config.cdiv(rows, tile.rows) * config.cdiv(channels * positions, tile.cols),)
            ](
                flat,
                words.contiguous(),
                weight,
                rows,
                channels * positions,
                words.shape[1],
                period,
                positions,
                *tile,
            )
    weight = weight.permute(0, 3, 1, 2)
    return weight if scale is None else weight.mul_(scale)


@triton.jit
def _pack_kernel(
    mask, words, rows, cols, words_per_row, stride_row, stride_col, BLOCK: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row, col, ok = word_elements(first, rows, cols, words_per_row, BLOCK)
    bits = tl.load(mask + row[:, None] * stride_row + col * stride_col, mask=ok, other=0)
    word = first + tl.arange(0, BLOCK)
    tl.store(words + word, pack_bits(bits), mask=word < rows * words_per_row)


@triton.jit
def _unpack_kernel(words, mask, rows, cols, words_per_row, ROWS: tl.constexpr, COLS: tl.constexpr):
    row, first = program_tile(cols, ROWS, COLS)
    bits = load_bits(words, row, row < rows, first // 32, words_per_row, COLS)
    store_tile(mask, bits, rows, cols, row, first, COLS)


@triton.jit
def _popcount_kernel(
    words, counts, rows, words_per_row, words_per_part, ROWS: tl.constexpr, COLS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * words_per_part
    end = tl.minimum(begin + words_per_part, words_per_row)
    count = tl.zeros((ROWS,), tl.int64)
    for first in range(begin, end, COLS):
        col = first + tl.arange(0, COLS)
        word = tl.load(
            words + row.to(tl.int64)[:, None] * words_per_row + col[None, :],
            mask=(row < rows)[:, None] & (col < end)[None, :],
            other=0,
        )
        count += tl.sum(population(word), axis=1)
    at = counts + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(at, count, mask=row < rows)


@triton.jit
def _transpose_kernel(words, transposed, rows, cols, words_per_row, words_per_col):
    """One block of 32 x 32 bits."""
    row_word = tl.program_id(0) // words_per_row
    col_word = tl.program_id(0) % words_per_row
    row = row_word * 32 + tl.arange(0, 32)
    word = tl.load(words + row.to(tl.int64) * words_per_row + col_word, mask=row < rows, other=0)
    bits = (word[None, :] >> tl.arange(0, 32)[:, None]) & 1  # [col, row]
    col = col_word * 32 + tl.arange(0, 32)
    out = transposed + col.to(tl.int64) * words_per_col + row_word
    tl.store(out, pack_bits(bits), mask=col < cols)


@triton.jit
def _decode_kernel(
    weight, decoded, rows, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    values, words, cols, words_per_row, period = weight
    row, first = program_tile(cols, ROWS, COLS)
    starts = row_starts(row, first, cols, period)
    if ALIGNED:  # no tile wraps
        starts = tl.multiple_of(starts, COLS)
        weight = (values, words, cols, words_per_row, None)
    tile = load_weight(weight, row, row < rows, starts, first, COLS)
    store_tile(decoded, tile, rows, cols, row, first, COLS)


@triton.jit
def _decode_channels_last_kernel(
    values,
    words,
    decoded,
    rows,
    cols,
    words_per_row,
    period,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A tile in the order that it is stored in; what it gathers stays in the cache."""
    row, first = program_tile(cols, ROWS, COLS)
    out = first + tl.arange(0, COLS)
    channels = cols // POSITIONS
    col = out % channels * POSITIONS + out // channels
    ok = (row < rows)[:, None] & (out < cols)[None, :]
    at = row.to(tl.int64)[:, None] * words_per_row + (col // 32)[None, :]
    keep = (tl.load(words + at, mask=ok, other=0) >> (col % 32)[None, :]) & 1
    starts = row_starts(row, 0, cols, period)
    if period is not None:
        if period.dtype == tl.int32:  # unsigned, so that the sum of two fits
            starts = starts.to(tl.uint32)
        index = (starts[:, None] + col.to(starts.dtype)[None, :]) % period.to(starts.dtype)
    else:
        index = starts[:, None] + col[None, :]
    value = tl.load(values + index, mask=ok & (keep != 0), other=0.0)
    store_tile(decoded, value, rows, cols, row, first, COLS)
