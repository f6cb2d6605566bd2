"""A masked weight as the operand of a product: tiles of rows whose values are loaded by the vector
and masked in registers.

Rows start anywhere in a prototype, so there is a copy of the values for each place in a vector:
copy j begins with value j, and every start is the multiple of a vector in one of the copies.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, interpreted
from ._helpers import on_device, row_starts

_BLOCK = 1024  # values that a program copies


class RowWeight(NamedTuple):
    """Arguments of a kernel. ``arguments``: values, words, columns, words per row, period, size of
    a copy of the values. ``options``: copies, values of a vector, whether indices need 64 bits,
    whether to mask in assembly.
    """

    arguments: tuple[Tensor, Tensor, int, int, int, int]
    options: tuple[int, int, bool, bool]


def row_weight(values: Tensor, words: Tensor, cols: int) -> RowWeight:
    """The weight ``[rows, cols]`` of flat values that repeat."""
    flat = values.reshape(-1)
    period, count = max(flat.numel(), 1), words.shape[0] * cols
    vector = 16 // flat.element_size()
    wraps = 0 < flat.numel() < count
    copies, size = 1, 0
    if cols % vector or (wraps and period % vector):
        copies = vector = config.value_copies(period, count, cols, vector) if wraps else 1
    if wraps:
        size = config.cdiv(period + cols, vector) * vector
        flat = _copied(flat, copies, size)
    in_assembly = flat.element_size() == 2 and not interpreted() and torch.version.hip is None
    arguments = (flat, words.contiguous(), cols, words.shape[1], period, size)
    return RowWeight(arguments, (copies, vector, config.is_wide(flat.numel()), in_assembly))


def _copied(values: Tensor, copies: int, size: int) -> Tensor:
    """Row j holds ``size`` values from value j on."""
    copied = values.new_empty((copies, size))
    with on_device(values):
        _copy_kernel[(copies * config.cdiv(size, _BLOCK),)](
            values, copied, values.numel(), size, _BLOCK
        )
    return copied


@triton.jit
def _copy_kernel(values, copied, period, size, BLOCK: tl.constexpr):
    across = tl.cdiv(size, BLOCK)
    copy = (tl.program_id(0) // across).to(tl.int64)
    index = (tl.program_id(0) % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = index < size
    value = tl.load(values + (copy + index) % period, mask=ok)
    tl.store(copied + copy * size + index, value, mask=ok)


@triton.jit
def row_offsets(
    rows, row_ok, weight, COPIES: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr
):
    """Where the values of each row start, a multiple of VECTOR. Numbers of 32 bits unless WIDE, as
    each weight adds its column to one.
    """
    starts = row_starts(tl.where(row_ok, rows, 0), 0, weight[2], weight[4])
    shift = starts % COPIES
    starts = tl.multiple_of(shift * weight[5] + starts - shift, VECTOR)
    return starts if WIDE else starts.to(tl.int32)


@triton.jit
def load_weight_of_rows(
    weight, rows, row_ok, offsets, col, BLOCK: tl.constexpr, WHOLE: tl.constexpr, ASM: tl.constexpr
):
    """Masked weights [rows, BLOCK] of the columns from ``col`` on, a multiple of 32. WHOLE promises
    that the columns are all there.
    """
    values, words, cols, words_per_row = weight[0], weight[1], weight[2], weight[3]
    column, bit = tl.arange(0, BLOCK // 32), tl.arange(0, 32)
    word = tl.load(
        words + rows.to(tl.int64)[:, None] * words_per_row + (col // 32 + column)[None, :],
        mask=row_ok[:, None] & (col // 32 + column < words_per_row)[None, :],
        other=0,
    )  # [rows, BLOCK / 32]
    keep = word[:, :, None] << (31 - bit)[None, None, :]  # the sign says
    lane = column[:, None] * 32 + bit[None, :]
    # Rows that are not there read those of another one.
    ok = None if WHOLE else (col + lane < cols)[None, :, :]
    value = tl.load(values + col + (offsets[:, None, None] + lane[None, :, :]), mask=ok)
    return tl.reshape(_kept(value, keep, ASM), (rows.shape[0], BLOCK))


@triton.jit
def _kept(value, keep, ASM: tl.constexpr):
    """Values where ``keep`` is negative, else 0. In assembly, two of 16 bits at a time: their signs
    become a mask, which the compiler would not find.
    """
    if ASM:
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 mask; prmt.b32 mask, $2, $3, 0xFFBB; and.b32 $0, $1, mask; }",
            "=r,r,r,r",
            [value.to(tl.int16, bitcast=True), keep],
            tl.int16,
            True,
            2,
        )
        value = bits.to(value.dtype, bitcast=True)
    else:
        value = tl.where(keep < 0, value, 0.0)
    return value
