"""What becomes of the gradient of the effective weight: ⊙ m for a dense weight, ⊙ w ⊙ sign(scores)
for the scores.

A kernel sums over tokens or pixels. Few tiles leave a GPU idle, so the sum is cut into parts. With
one part the kernel finishes the gradient itself; several go to a float32 workspace, and one more
pass adds them, always in the same order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from ._helpers import load_bits, load_values, program_tile, row_starts, store_tile, wrapped


@dataclass(frozen=True)
class WeightGrad:
    """A gradient to be made, and what finishes it: words for a dense weight, else values, and
    scores if their sign counts.
    """

    grad: Tensor
    words: Tensor | None
    values: Tensor | None
    period: int | None
    scores: Tensor | None
    scale: Tensor | None

    @property
    def rows(self) -> int:
        return self.grad.shape[0]

    @property
    def cols(self) -> int:
        return self.grad.numel() // max(self.rows, 1)

    def destination(self, parts: int) -> Tensor:
        """Where a kernel stores: the gradient itself, or each of several parts."""
        if parts == 1:
            return self.grad
        return self.grad.new_empty((parts, self.rows, self.cols), dtype=torch.float32)

    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """The first argument of ``finish``."""
        words_per_row = 0 if self.words is None else self.words.shape[1]
        return (
            *(self.words, self.values, self.scores, self.scale),
            *(self.rows, self.cols, words_per_row, self.period),
        )

    def add_parts(self, parts: Tensor, positions: int = 1) -> None:
        """Fill the gradient from the parts in ``destination``, unless that is the gradient. One
        part may be filters in channels_last, of so many kernel positions.
        """
        if parts is self.grad:
            return
        tile = config.parts_tile(len(parts))
        if positions > 1:
            tile = config.channels_last_parts_tile(self.period)
        grid = (config.cdiv(self.rows, tile.rows) * config.cdiv(self.cols, tile.cols),)
        _add_parts_kernel[grid](parts, self.grad, len(parts), self.arguments(), *tile, positions)


def masked_grad(grad: Tensor, words: Tensor, scale: Tensor | None) -> WeightGrad:
    """``scale * dL/dw_eff ⊙ m``"""
    return WeightGrad(grad, words.contiguous(), None, None, None, scale)


def scored_grad(
    grad: Tensor, values: Tensor, scores: Tensor, scale: Tensor | None, absolute: bool
) -> WeightGrad:
    """``scale * dL/dw_eff ⊙ w [⊙ sign(scores)]``"""
    # The tile of a depthwise filter holds all of it, that of others GRAD_COLS at most.
    filter_size = grad[0, 0].numel() if grad.dim() == 4 and grad.shape[1] == 1 and len(grad) else 0
    flat, period = wrapped(values, grad.numel(), max(config.GRAD_COLS, filter_size))
    return WeightGrad(grad, None, flat, period, scores.contiguous() if absolute else None, scale)


@triton.jit
def finish(target, tile, row, first, BLOCK: tl.constexpr):
    """The finished gradient of a tile [row, BLOCK] that begins at column ``first``."""
    words, values, scores, scale, rows, cols, words_per_row, period = target
    row_ok = row < rows
    if words is not None:
        bits = load_bits(words, row, row_ok, first // 32, words_per_row, BLOCK)
        tile = tl.where(bits, tile, 0.0)
    else:
        starts = row_starts(row, first, cols, period)
        tile *= load_values(values, row_ok, starts, first, cols, period, BLOCK).to(tl.float32)
    if scores is not None:
        starts = row.to(tl.int64) * cols + first
        score = load_values(scores, row_ok, starts, first, cols, None, BLOCK).to(tl.float32)
        tile = tl.where(score > 0, tile, tl.where(score < 0, -tile, tile * score))
    if scale is not None:
        tile *= tl.load(scale).to(tl.float32)
    return tile


@triton.jit
def store_grad(out, target, tile, row, first, FINISH: tl.constexpr, BLOCK: tl.constexpr):
    """Store a tile of the gradient, or of the part of this program's second index."""
    rows, cols = target[4], target[5]
    if FINISH:
        tile = finish(target, tile, row, first, BLOCK)
    else:
        out += tl.program_id(1).to(tl.int64) * rows * cols
    store_tile(out, tile, rows, cols, row, first, BLOCK)


@triton.jit
def _add_parts_kernel(
    parts,
    grad,
    count,
    target,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    rows, cols = target[4], target[5]
    row, first = program_tile(cols, ROWS, COLS)
    col = first + tl.arange(0, COLS)
    ok = (row < rows)[:, None] & (col < cols)[None, :]
    part = tl.arange(0, PARTS)
    place = col
    if POSITIONS > 1:
        place = col % POSITIONS * (cols // POSITIONS) + col // POSITIONS
    at = parts + row.to(tl.int64)[:, None] * cols + place[None, :]
    at = at[None, :, :] + (part.to(tl.int64) * rows * cols)[:, None, None]
    tile = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, count, PARTS):
        there = ok[None, :, :] & (start + part < count)[:, None, None]
        tile += tl.sum(tl.load(at, mask=there, other=0.0).to(tl.float32), axis=0)
        at += tl.cast(rows, tl.int64) * cols * PARTS
    store_tile(grad, finish(target, tile, row, first, COLS), rows, cols, row, first, COLS)
